"""The routes of the `speakers` engine: vectors of voices from sound, and turns from vectors.

It refuses to keep anything between two requests, and to compute on for who has gone.
"""

import asyncio
import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forebay.engines import reports
from forebay.engines.clustering import Floats
from forebay.engines.connection import Answer, Refused, Route, Visit
from forebay.engines.ge2e import DIMENSIONS, HOP_SAMPLES, Ge2e, gain, mel_frames
from forebay.engines.serving import OutOfMemory
from forebay.engines.speakers_orders import Order, Stretch, read_order, read_stretch
from forebay.engines.threads import Threads, Unwanted, Wanted, all_ended, cores
from forebay.engines.turns import Region, turns
from forebay.engines.vad import WINDOW_SAMPLES, Vad, VadOptions, regions
from forebay.engines.whisper_chunks import consumed, until
from forebay.speech import SAMPLE_RATE, turn_to_wire

if TYPE_CHECKING:
    from forebay.engines.speakers import Spec

_WINDOWS_AT_ONCE = 16  # more are no faster
_FULL_SCALE = 32768.0
_SPEECH = VadOptions(min_silence_ms=100, pad_ms=60)  # the times of speech are answers here, so they have no margins
_LIFE_SECONDS = 5.0
_PART_WINDOWS = 1875  # a minute: of what speech is looked for in at once
_LEAD_WINDOWS = 64  # two seconds: what the network hears before, to know where it is

_say = partial(reports.say, "speakers")


@dataclass(slots=True)
class _Figures:
    """Sums since the start."""

    items: int = 0  # windows
    audio_seconds: float = 0.0
    out_of_memory: int = 0


@dataclass(frozen=True, slots=True)
class _Heard:
    """What of a stretch has voices: the regions with speech, the first frame of each window, and up to where that is."""

    regions: list[Region]
    frames: list[int]
    mels: Floats
    gains: Floats
    consumed: int


class Engine:
    """The routes of one loaded model. Made in the loading thread; the routes run in the event loop."""

    def __init__(self, spec: "Spec") -> None:
        """Raises NotWeights, OSError or OutOfMemory."""
        self._spec = spec
        self._vad = Vad()
        self._model = Ge2e(Path(spec.model_path), 1)
        self._cores = spec.threads or cores()
        self._threads = Threads(self._cores)
        self._at_once = _WINDOWS_AT_ONCE
        self._figures = _Figures()
        self._visits = reports.Visits("speakers")
        self._window = max(1, round(spec.window_seconds * SAMPLE_RATE / HOP_SAMPLES))
        self._step = max(1, round(spec.step_seconds * SAMPLE_RATE / HOP_SAMPLES))
        self._warm_up()

    def _warm_up(self) -> None:
        """Compute something once, so that the first request finds everything in its place."""
        heard = self._hear(Stretch(np.zeros(2 * SAMPLE_RATE, np.int16), last=True), Wanted())
        self._model.vectors(heard.mels[None, : self._window])

    @property
    def routes(self) -> Mapping[tuple[str, str], Route]:
        """What this engine answers."""
        return {
            ("GET", "/slots"): self._slots,
            ("GET", "/metrics"): self._metrics,
            ("POST", "/v1/audio/voices"): self._voices,
            ("POST", "/v1/audio/speakers"): self._speakers,
        }

    async def _voices(self, visit: Visit) -> Answer:
        with self._visits.noted(visit) as note:
            stretch = read_stretch(visit.body)
            note["audio_seconds"] = round(len(stretch.pcm) / SAMPLE_RATE, 2)
            wanted = Wanted()
            heard = await self._threads.run(lambda: self._hear(stretch, wanted), wanted)
            note["windows"] = len(heard.frames)
            await self._tell_vectors(visit, heard, wanted)
            self._figures.items += len(heard.frames)
            self._figures.audio_seconds += heard.consumed / SAMPLE_RATE
        visit.tell(json.dumps({"type": "done", "consumed": heard.consumed}).encode())
        return b""

    async def _tell_vectors(self, visit: Visit, heard: _Heard, wanted: Wanted) -> None:
        """One record for as many windows as the threads compute at once."""
        found, place = heard.regions, 0
        while True:
            parts = []
            for _ in range(self._cores):
                parts.append(heard.frames[place : place + self._at_once])
                place += len(parts[-1])
            work = [asyncio.ensure_future(self._vectors(heard, part, wanted)) for part in parts if part]
            try:
                vectors = [row for rows in await asyncio.gather(*work) for row in rows]
            finally:
                wanted.gone = any(not each.done() for each in work)
                for each in work:
                    each.cancel()
                await all_ended(work)
            visit.tell(self._record(found, [frame for part in parts for frame in part], vectors))
            found = []
            if place >= len(heard.frames):
                return

    async def _vectors(self, heard: _Heard, frames: Sequence[int], wanted: Wanted) -> list[Floats]:
        """The vectors of windows; in halves, as long as memory runs out."""
        try:
            return list(await self._threads.run(lambda: self._compute(heard, frames, wanted), wanted))
        except (OutOfMemory, MemoryError):
            self._figures.out_of_memory += 1
            if len(frames) == 1:
                raise _no_memory("This recording needs more memory than there is.") from None
        half = len(frames) // 2
        self._at_once = max(1, min(self._at_once, half))
        _say(f"event=batch_halved windows={self._at_once}")
        return [row for part in (frames[:half], frames[half:]) for row in await self._vectors(heard, part, wanted)]

    def _compute(self, heard: _Heard, frames: Sequence[int], wanted: Wanted) -> Floats:
        _check(wanted)
        if 0 < self._spec.rehearse_windows_max < len(frames):
            raise OutOfMemory
        windows = [heard.mels[frame : frame + self._window] * heard.gains[frame] for frame in frames]
        return self._model.vectors(np.stack(windows))

    def _hear(self, stretch: Stretch, wanted: Wanted) -> _Heard:
        """Find speech, and the windows to take voices from, in a thread."""
        pcm = stretch.pcm
        likely = np.concatenate(list(self._likely(stretch, wanted)))
        end = len(pcm) if stretch.last else consumed(likely, _SPEECH.offset, len(pcm)) or len(pcm)
        speech = until(regions(likely, _SPEECH, len(pcm)), end)
        margin = self._window * HOP_SAMPLES
        samples = np.pad(pcm.astype(np.float32) / _FULL_SCALE, margin)
        frames = [frame for region in speech for frame in self._frames(*region)]
        _check(wanted)
        mels = mel_frames(samples)
        gains = np.ones(len(mels), dtype=np.float32)
        for frame in frames:
            gains[frame] = gain(samples[frame * HOP_SAMPLES : frame * HOP_SAMPLES + margin]) ** 2
        seconds = [(begin / SAMPLE_RATE, stop / SAMPLE_RATE) for begin, stop in speech]
        return _Heard(seconds, frames, mels, gains, end)

    def _likely(self, stretch: Stretch, wanted: Wanted) -> Iterator[Floats]:
        """How likely somebody speaks, a minute at a time."""
        for first in range(0, -(-len(stretch.pcm) // WINDOW_SAMPLES), _PART_WINDOWS):
            _check(wanted)
            lead = min(first, _LEAD_WINDOWS)
            part = slice((first - lead) * WINDOW_SAMPLES, (first + _PART_WINDOWS) * WINDOW_SAMPLES)
            yield self._vad.probabilities(stretch.pcm[part])[lead:]

    def _frames(self, begin: int, end: int) -> Iterator[int]:
        """Where the windows of a region begin, in frames of the stretch with a window of silence around it.

        They reach a quarter of a window over both ends; one window is in the middle of a region that is shorter.
        """
        first, last = begin // HOP_SAMPLES + self._window, end // HOP_SAMPLES + self._window
        if last - first <= self._window:
            yield (first + last - self._window) // 2
            return
        low, high = first - self._window // 4, last + self._window // 4 - self._window
        count = max(1, -(-(high - low) // self._step))
        yield from (low + (high - low) * each // count for each in range(count + 1))

    def _record(self, found: Sequence[Region], frames: Sequence[int], vectors: Sequence[Floats]) -> bytes:
        second = SAMPLE_RATE // HOP_SAMPLES
        begins = [(frame - self._window) / second for frame in frames]
        record = {
            "type": "voices",
            "regions": [[round(begin, 3), round(end, 3)] for begin, end in found],
            "windows": [[round(begin, 2), round(begin + self._window / second, 2)] for begin in begins],
            "vectors": base64.b64encode(np.array(vectors, dtype="<f2").tobytes()).decode(),
            "dimensions": DIMENSIONS,
        }
        return json.dumps(record).encode()

    async def _speakers(self, visit: Visit) -> Answer:
        with self._visits.noted(visit) as note:
            wanted = Wanted()
            work = asyncio.ensure_future(self._threads.run(lambda: self._turns(visit.body, wanted), wanted))
            try:
                while not (await asyncio.wait([work], timeout=_LIFE_SECONDS))[0]:
                    visit.tell(b"")
                order, found = await work
            finally:
                work.cancel()
                await all_ended([work])
            note["windows"], note["turns"] = len(order.windows.vectors), len(found)
        names = list(dict.fromkeys(turn["speaker"] for turn in found))
        visit.tell(json.dumps({"type": "turns", "turns": found, "speakers": names}).encode())
        visit.tell(b'{"type":"done"}')
        return b""

    def _turns(self, body: bytes, wanted: Wanted) -> tuple[Order, list[dict[str, Any]]]:
        try:
            order = read_order(body, DIMENSIONS, self._spec.speakers_max)
            found = turns(order.regions, order.windows, order.count, order.known, lambda: _check(wanted))
        except MemoryError:
            raise _no_memory("This recording has more voices than there is memory for.") from None
        return order, [turn_to_wire(turn) for turn in found]

    async def _slots(self, visit: Visit) -> Answer:
        return reports.slots(self._spec.slots, self._visits.running)

    async def _metrics(self, visit: Visit) -> Answer:
        now = {"requests_running": self._visits.running, "batch_budget_windows": self._at_once}
        return reports.metrics({**asdict(self._figures), **self._visits.sums}, **now)


def _check(wanted: Wanted) -> None:
    if wanted.gone:
        raise Unwanted


def _no_memory(message: str) -> Refused:
    return Refused(500, message, "out_of_memory", "server_error")
