"""What models were seen to hold of memory, by the size of what they worked on: for this start and for later ones.

It keeps the highest figure of each class in memory and writes it to the store now and then. It refuses to believe for
ever what a model came to once, and to hold anybody up where the store does not answer.
"""

from collections.abc import Iterable
from dataclasses import replace

from forebay.clock import Clock
from forebay.errors import ForebayError
from forebay.peaks import Peak, PeakStore
from forebay.telemetry import Log

_DAY_SECONDS = 86_400.0
_SAVE_SECONDS = 30.0  # between two writes
_STORE_SECONDS_MAX = 5.0  # for one write, or one reading
_WORTH_KEEPING = 1.02  # a figure that is higher by less than this is the same
_AS_MUCH_AGAIN = 0.9  # what shows that a model comes to its peak still
_AT_REST = 0  # the class of no input: what a start and rest come to


class Learned:
    """The peaks of all models of a server. Used on one event loop."""

    def __init__(self, fingerprints: dict[str, str], peak_days: int, clock: Clock, log: Log) -> None:
        self._fingerprints = fingerprints
        self._believed_seconds = peak_days * _DAY_SECONDS
        self._clock = clock
        self._log = log
        self._store: PeakStore | None = None
        self._recalled = False
        self._peaks: dict[tuple[str, str], dict[int, Peak]] = {}  # by model and device, then by class
        self._unsaved: set[tuple[str, str, int]] = set()
        self._saved_at = clock.monotonic()
        self._away = False

    async def recall(self, store: PeakStore) -> None:
        """Take over what is known from earlier starts; from now on `store` gets what is learned.

        Where the store does not answer, that is done before the next write.
        """
        self._store = store
        await self._recall(store)

    async def _recall(self, store: PeakStore) -> None:
        try:
            async with self._clock.timeout(_STORE_SECONDS_MAX):
                found = await store.load(self._since())
        except (ForebayError, TimeoutError) as error:
            self._tell(error)
            return
        self._recalled = True
        for peak in found:
            if self._fingerprints.get(peak.model) == peak.fingerprint:
                peaks = self._of(peak.model, peak.device)
                known = peaks.get(peak.input_class)
                if known is None or known.peak_bytes < peak.peak_bytes:
                    peaks[peak.input_class] = peak

    def observe(self, model: str, device: str, size_class: int, count: int, load_seconds: float) -> None:
        """A replica of `model` came to `count` bytes while nothing larger than `size_class` was in flight on it."""
        peaks, now = self._of(model, device), self._clock.now()
        known = peaks.get(size_class)
        if known is None or known.measured_at < self._since() or count > known.peak_bytes * _WORTH_KEEPING:
            peaks[size_class] = Peak(model, self._fingerprints[model], device, size_class, count, load_seconds, now)
            self._unsaved.add((model, device, size_class))
        elif count >= known.peak_bytes * _AS_MUCH_AGAIN and now - known.measured_at > _DAY_SECONDS:
            peaks[size_class] = replace(known, measured_at=now)
            self._unsaved.add((model, device, size_class))

    def most(self, model: str, device: str) -> int | None:
        """The most that a replica of `model` came to, its start included; None before it has worked."""
        known = self._known(model, device)
        return max(known.values()) if any(known) else None

    def at_work(self, model: str, device: str) -> int | None:
        """The most that a replica of `model` came to at work; None before it has worked."""
        return max((count for size_class, count in self._known(model, device).items() if size_class), default=None)

    def at_rest(self, model: str, device: str) -> int:
        """The most that a start of `model` came to; 0 if it was never seen."""
        return self._known(model, device).get(_AT_REST, 0)

    async def save_when_due(self) -> None:
        """Write what is new, if the last time was long enough ago."""
        if self._clock.monotonic() - self._saved_at < _SAVE_SECONDS:
            return
        if self._store is not None and not self._recalled:
            await self._recall(self._store)
        await self.save()

    async def save(self) -> None:
        """Write what is new now. Where the store does not answer, it is written the next time."""
        self._saved_at = self._clock.monotonic()
        if self._store is None or not self._unsaved:
            return
        keys, self._unsaved = self._unsaved, set()
        try:
            async with self._clock.timeout(_STORE_SECONDS_MAX):
                rows = [self._of(model, device)[size_class] for model, device, size_class in keys]
                await self._store.save(rows, self._since())
            self._away = False
        except (ForebayError, TimeoutError) as error:
            self._unsaved |= keys
            self._tell(error)

    def _of(self, model: str, device: str) -> dict[int, Peak]:
        return self._peaks.setdefault((model, device), {})

    def _known(self, model: str, device: str) -> dict[int, int]:
        """Bytes by class, without those that nobody believes any longer."""
        since = self._since()
        peaks = self._peaks.get((model, device), {})
        return {size_class: peak.peak_bytes for size_class, peak in peaks.items() if peak.measured_at >= since}

    def _since(self) -> float:
        return self._clock.now() - self._believed_seconds

    def _tell(self, error: Exception) -> None:
        if not self._away:
            self._log.warning("memory.peaks_away", reason=str(error) or "it did not answer in time")
        self._away = True


def largest(bodies: Iterable[bytes]) -> int:
    """The size of the largest of `bodies`."""
    return max((len(body) for body in bodies), default=0)
