"""What is known of memory: what engines may take in all, what each model will take and what each replica holds now.

It measures every few seconds, in a thread. It refuses to decide who is loaded: the residency asks it, and the ledger
decides.

What a model will take is, in this order: what its settings say, what it was measured to come to, what its files suggest.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from forebay.clock import Clock
from forebay.errors import SetupError
from forebay.model_config import UpstreamModel
from forebay.peaks import PeakStore, input_class
from forebay.replicas import needs
from forebay.replicas.catalog import Catalog
from forebay.replicas.commands import device_of
from forebay.replicas.gauge import Gauge, Reading, Readings
from forebay.replicas.health import Gate
from forebay.replicas.keeper import Keeper
from forebay.replicas.learned import Learned, largest
from forebay.replicas.memory import HOST, Bytes, charge
from forebay.server_config import MemorySettings
from forebay.telemetry import Log, Metrics

_MORE_AFTER_SHORTAGE = 1.05
_MORE_AT_MOST = 1.5  # times what is known: whoever is short beyond that is so because of others
_SILENT_MAX = 10  # readings for which a GPU is as hot as it was that the driver does not tell of
_PAUSE_PER_LOOK = 10  # times what a look took: the kernel goes through every page of an engine for it
_PAUSE_SECONDS_MAX = 10.0  # the gate, and who waits for what a sleeper gives back, wait as long
_SHORTAGE_SECONDS = 600.0  # two cool-downs: a model that finds its memory for as long has no shortage any longer

Keepers = Callable[[], Iterable[tuple[str, Keeper]]]


@dataclass(frozen=True, slots=True)
class _Common:
    """What replicas of one model share of the host: `bytes` in all, of which one is counted without `others`' parts."""

    bytes: int = 0
    others: int = 0


class MeasuredBooks:
    """The books of a server. Its constructor measures the machine once; `run` goes on measuring."""

    def __init__(
        self, catalog: Catalog, settings: MemorySettings, gauge: Gauge, clock: Clock, metrics: Metrics, log: Log
    ) -> None:
        self.keepers: Keepers = tuple
        self.on_turn: Callable[[], None] = lambda: None  # the gate opened or closed
        self.gate = Gate(settings)
        self._catalog = catalog
        self._settings = settings
        self._gauge, self._readings = gauge, Readings(gauge, clock)
        self._clock = clock
        self._metrics = metrics
        self._log = log
        prints = {name: needs.fingerprint(catalog.get(name)) for name in catalog.names()}
        self._learned = Learned(prints, settings.peak_days, clock, log)
        self._pinned = tuple(name for name in catalog.names() if catalog.get(name).pinned)
        self._shortages: dict[str, tuple[float, float]] = {}  # how many times as much a model asks for, and until when
        self._estimates: dict[str, Bytes] = {}
        self._along: dict[str, int] = {}
        self._silent: dict[str, int] = {}  # readings in a row without a GPU, or without its temperature
        self._labels: set[tuple[str, str]] = set()
        self._held: dict[int, Bytes] = {}
        self._common: dict[int, _Common] = {}
        self._unmeasured, self._read_at = False, 0.0
        self._reading = gauge.read()
        self._totals = gauge.totals(self._reading, {})
        self._take(self._reading)
        self._allowed: Bytes = self._totals

    def totals(self) -> Bytes:
        """What engines may take in all, by device."""
        return self._totals

    def others(self) -> Bytes:
        """What the programs of others hold of what engines could take of each GPU; of the host they are given a part."""
        return {gpu.name: self._whole(gpu.name) - self._totals[gpu.name] for gpu in self._reading.gpus}

    def allowed(self) -> Bytes:
        """What engines may hold now: as much, or less while the machine has too little left for all the rest."""
        return self._allowed

    def need(self, model: str) -> Bytes:
        """What one more replica of `model` will take; for a while after one of it found no memory, somewhat more."""
        return self._needed(model, self._more(model))

    def least(self, model: str) -> Bytes:
        """What a replica of `model` is sure to take: what was learned counts only where it is less than the estimate."""
        guess, told = self._estimate(model), self._told(model)
        return {
            device: count if device in told else min(count, guess.get(device, 0))
            for device, count in self._needed(model).items()
        }

    def _needed(self, model: str, more: float = 1.0) -> Bytes:
        """What a replica of `model` takes, and `more` times that where it computes."""
        if isinstance(self._catalog.get(model), UpstreamModel):
            return {}
        needed = {**self._expected(model, more), **self._told(model)}
        # Where no driver tells of any GPU there may be one all the same, of another maker: its engine will say.
        return needed if self._reading.gpus else {HOST: needed.get(HOST, 0)}

    def _told(self, model: str) -> Bytes:
        """What an operator has said of it."""
        settings = self._catalog.get(model)
        return {} if settings.memory_bytes is None else needs.declared(settings, settings.memory_bytes)

    def held(self, model: str, keeper: Keeper) -> Bytes:
        """What a replica is charged with now. What an operator has said it takes, it is charged with at least.

        What it shares with others of its model one of them is charged with, who holds it to the last: the others give back
        only what is their own. What a shortage adds is no part of that: it is asked for before a start, and counts for no
        engine that runs.
        """
        need, measured = self._needed(model), self._measured(keeper)
        if keeper.asleep_at is not None:
            return self._asleep(model, measured, fresh=self._read_at > keeper.asleep_at)
        said = self._catalog.get(model).memory_bytes is not None
        reserved = said or keeper.ready_at is None or keeper.ready_at >= self._read_at
        common = _Common() if said else self._common.get(_pid(keeper) or 0, _Common())
        measured = _with(measured, common.others)
        charged = {
            device: self._charged(model, device, need.get(device, 0), measured.get(device), reserved=reserved)
            for device in need.keys() | measured.keys()
        }
        return _with(charged, 0 if not common.bytes or self._carries(model, keeper) else -common.bytes)

    def _carries(self, model: str, keeper: Keeper) -> bool:
        """Whether it is the one that is charged with what it shares: one that stays, if there is any, and does not sleep."""
        awake = [one for name, one in self.keepers() if name == model and one.asleep_at is None]
        sharing = [one for one in awake if _pid(one) in self._common]
        return keeper is min(sharing, key=lambda one: one.leaving, default=keeper)

    def _charged(self, model: str, device: str, needed: int, measured: int | None, *, reserved: bool) -> int:
        worked = self._learned.at_work(model, device)
        # What it holds before it has worked says nothing of what its first requests will take. And what it came to once, but
        # is not to count on beside what is pinned, it is charged with when it has it.
        known = None if worked is None else min(worked, needed)
        return charge(needed, measured, known, reserved=reserved or worked is None)

    def _asleep(self, model: str, measured: Bytes, *, fresh: bool) -> Bytes:
        """What one that sleeps holds still: what is measured; until then all of the host, and nothing of its GPU."""
        host, along = measured.get(HOST, 0), self._taken_along(model)
        if fresh:
            return {**measured, HOST: max(host, along)}
        return {HOST: max(self._needed(model).get(HOST, 0), host) + along}

    def may_sleep(self, model: str, beside: Bytes) -> bool:
        """Whether the host has room for what a replica of `model` takes there when it sleeps, and for `beside`."""
        along = self._taken_along(model)
        if not along:
            return True
        falling = sum(self._taken_along(name) for name, one in self.keepers() if one.sleeps and one.asleep_at is None)
        charged = sum(self.held(name, keeper).get(HOST, 0) for name, keeper in self.keepers())
        return charged + falling + along + beside.get(HOST, 0) <= self._totals[HOST]

    def _taken_along(self, model: str) -> int:
        if model not in self._along:
            path = self._catalog.path(model) if self._catalog.needs_file(model) else None
            self._along[model] = needs.taken_along(self._catalog.get(model), path)
        return self._along[model]

    def closed(self) -> str | None:
        """Why nothing may be loaded now, if so."""
        return self.gate.reason or None

    def out_of_memory(self, model: str) -> None:
        """An engine of `model` found no memory: for a while its next start asks for more where it computes.

        It may have been another's fault, so nothing is learned from that.
        """
        more = min(self._more(model) * _MORE_AFTER_SHORTAGE, _MORE_AT_MOST)
        self._shortages[model] = more, self._clock.monotonic() + _SHORTAGE_SECONDS

    def _more(self, model: str) -> float:
        more, until = self._shortages.get(model, (1.0, 0.0))
        return more if self._clock.monotonic() < until else 1.0

    def measured_at(self) -> float:
        """When engines were last measured."""
        return self._read_at

    async def recall(self, store: PeakStore) -> None:
        """Take over what earlier starts have learned, and let later ones have what this one learns."""
        await self._learned.recall(store)

    async def run(self) -> None:
        """Measure and learn, until cancelled."""
        try:
            pause = 0.0
            while True:
                await self._clock.sleep(max(self._settings.measure_seconds, pause))
                began = self._clock.monotonic()
                await self.measure()
                pause = min(_PAUSE_PER_LOOK * (self._clock.monotonic() - began), _PAUSE_SECONDS_MAX)
                await self._learned.save_when_due()
        finally:
            await self._learned.save()

    async def measure(self) -> None:
        """Measure the machine and every engine that runs."""
        running = {pid: (model, keeper) for model, keeper in self.keepers() if (pid := _pid(keeper)) is not None}
        since, began = self._read_at, self._clock.monotonic()
        try:
            reading = await self._readings.read(tuple(running))
        except SetupError as error:
            if not self._unmeasured:
                self._log.warning("memory.unmeasured", reason=str(error))
            self._unmeasured = True
            return
        self._unmeasured, self._read_at = False, began
        self._common = _found_common({pid: model for pid, (model, _) in running.items()}, reading)
        self._take(reading)
        for pid, (model, keeper) in running.items():
            if _pid(keeper) == pid:  # what the next one needs does not depend on who shares with it then
                others = self._common.get(pid, _Common()).others
                held, peaks = (_with(found.get(pid, {}), others) for found in (reading.held, reading.peaks))
                self._learn(model, keeper, held, peaks, since)
        self._allowed = self._allowance()
        self._show(reading)

    def _allowance(self) -> Bytes:
        lacking = self.gate.lacking_bytes
        if not lacking:
            return self._totals
        charged = sum(self.held(model, keeper).get(HOST, 0) for model, keeper in self.keepers())
        return {**self._totals, HOST: max(0, min(self._totals[HOST], charged - lacking))}

    def _expected(self, model: str, more: float) -> Bytes:
        """What it was seen to come to; before it has worked at least what its files suggest."""
        guess, computes = self._estimate(model), needs.named(device_of(self._catalog.get(model)))
        devices = guess.keys() | {device for device in self._totals if self._learned.most(model, device) is not None}
        return {
            device: self._expected_on(model, device, guess.get(device, 0), more if device == computes else 1.0)
            for device in devices
        }

    def _expected_on(self, model: str, device: str, guess: int, more: float) -> int:
        known = int(self._known(model, device, guess) * more)
        # What has run here is not refused for what it came to once: it runs alone, or with the pinned ones.
        return known if known <= guess else min(known, max(guess, self._whole(device) - self._beside(model, device)))

    def _known(self, model: str, device: str, guess: int) -> int:
        """What was learned of it, whether or not there is as much, or what its files suggest."""
        most = self._learned.most(model, device)
        return max(guess, self._learned.at_rest(model, device)) if most is None else most

    def _beside(self, model: str, device: str) -> int:
        """What the pinned ones but `model` come to. What each leaves for the others is not asked: that would go round."""
        pinned = 0
        for name in self._pinned:
            if name != model:
                known = self._known(name, device, self._estimate(name).get(device, 0))
                pinned += self._told(name).get(device, known) * self._catalog.get(name).processes
        return pinned

    def _whole(self, device: str) -> int:
        """What engines may take of `device` while nobody else holds any of it."""
        gpus = {gpu.name: int(gpu.total_bytes * self._settings.gpu_share) for gpu in self._reading.gpus}
        return gpus.get(device, self._totals.get(device, 0))

    def _estimate(self, model: str) -> Bytes:
        """From its files, once they are there; they do not change while the server runs."""
        if model in self._estimates:
            return self._estimates[model]
        path = self._catalog.path(model) if self._catalog.needs_file(model) else None
        gpus = {gpu.name: gpu.total_bytes for gpu in self._reading.gpus}
        found = needs.estimate(self._catalog.get(model), path, gpus)
        if path is None or path.exists():
            self._estimates[model] = found
        return found

    def _measured(self, keeper: Keeper) -> Bytes:
        pid = _pid(keeper)
        return self._held.get(pid, {}) if pid is not None else {}

    def _take(self, reading: Reading) -> None:
        # A GPU that the driver does not tell of for once, or not of its temperature, is as it was: nobody is refused, or
        # leaves, for that, and a hot one is not cool. But one that is gone for good is not hot for ever.
        told = {gpu.name: gpu.celsius for gpu in reading.gpus}
        silent = tuple(gpu for gpu in self._reading.gpus if gpu.name not in told)
        before = {gpu.name: gpu.celsius for gpu in self._reading.gpus if told.get(gpu.name) is None}
        self._silent = {name: self._silent.get(name, 0) + 1 for name, known in before.items() if known is not None}
        kept = {name: before[name] for name, times in self._silent.items() if times <= _SILENT_MAX}
        celsius = {**kept, **{name: known for name, known in told.items() if known is not None}}
        gpus = tuple(replace(gpu, celsius=celsius.get(gpu.name)) for gpu in (*reading.gpus, *silent))
        self._reading = replace(reading, gpus=gpus)
        self._held = dict(reading.held)
        as_it_was = {gpu.name: self._totals[gpu.name] for gpu in silent}
        self._totals = {**self._gauge.totals(reading, self._untold(reading)), **as_it_was}
        if self.gate.update(self._reading):
            if self.gate.open:
                self._log.info("memory.gate_opened")
            else:
                self._log.warning("memory.gate_closed", reason=self.gate.reason)
            self.on_turn()

    def _untold(self, reading: Reading) -> Bytes:
        """What engines are charged with on each GPU where the driver does not tell of them."""
        untold: dict[str, int] = {}
        for model, keeper in self.keepers() if reading.gpus else ():
            for device, count in self.held(model, keeper).items():
                if device != HOST and device not in self._measured(keeper):
                    untold[device] = untold.get(device, 0) + count
        return untold

    def _learn(self, model: str, keeper: Keeper, held: Bytes, peaks: Bytes, since: float) -> None:
        """What it came to since the last reading. Where that was its start as well, work is known only by what it holds,
        and by nothing once it may have given some of that back.
        """
        replica = keeper.replica
        if replica is None:
            return
        up_at = keeper.ready_at
        started = up_at is None or up_at > since
        if started:
            self._observe(model, keeper, 0, peaks)
        if up_at is not None and up_at >= self._read_at:
            return  # this reading began before it was up: what it has worked on meanwhile counts in the next one
        size = input_class(replica.largest_input)
        replica.largest_input = largest(request.body for request in replica.in_flight.values())
        if up_at is not None and size and not (started and keeper.leaving):
            self._observe(model, keeper, size, held if started else peaks)

    def _observe(self, model: str, keeper: Keeper, size_class: int, counts: Bytes) -> None:
        for device, count in counts.items():
            self._learned.observe(model, device, size_class, count, keeper.load_seconds)

    # What the metrics show.

    def _show(self, reading: Reading) -> None:
        metrics = self._metrics
        metrics.memory_available.labels(HOST).set(reading.available_bytes)
        for device, count in self._totals.items():
            metrics.memory_total.labels(device).set(count)
        metrics.memory_gate.set(int(self.gate.open))
        metrics.host_cpu.set(reading.cpu_share)
        if reading.celsius is not None:
            metrics.celsius.labels(HOST).set(reading.celsius)
        for gpu in reading.gpus:
            metrics.memory_available.labels(gpu.name).set(gpu.total_bytes - gpu.used_bytes)
            if gpu.celsius is not None:
                metrics.celsius.labels(gpu.name).set(gpu.celsius)
            if gpu.utilisation is not None:
                metrics.gpu_utilisation.labels(gpu.name).set(gpu.utilisation)
        self._show_models()

    def _show_models(self) -> None:
        """What replicas hold and are charged with, by model; one that is gone holds nothing."""
        measured: dict[tuple[str, str], int] = {}
        charged: dict[tuple[str, str], int] = {}
        for model, keeper in self.keepers():
            for device, count in self._measured(keeper).items():
                measured[model, device] = measured.get((model, device), 0) + count
            for device, count in self.held(model, keeper).items():
                charged[model, device] = charged.get((model, device), 0) + count
        self._labels |= measured.keys() | charged.keys()
        for labels in self._labels:
            self._metrics.memory_measured.labels(*labels).set(measured.get(labels, 0))
            self._metrics.memory_charged.labels(*labels).set(charged.get(labels, 0))
            self._metrics.memory_peak.labels(*labels).set(self._learned.most(*labels) or 0)


def _found_common(models: Mapping[int, str], reading: Reading) -> dict[int, _Common]:
    """What each engine shares with others of its model: what is counted for these, as far as they can have it in common."""
    processes = Counter(model for pid, model in models.items() if pid in reading.held)
    found = {}
    for pid, model in models.items():
        sisters = processes[model] - 1
        others = min(reading.shared.get(pid, 0), sisters * reading.held.get(pid, {}).get(HOST, 0))
        if others > 0:
            found[pid] = _Common(others + others // sisters, others)
    return found


def _with(counts: Bytes, more: int) -> Bytes:
    return {**counts, HOST: counts.get(HOST, 0) + more} if more else counts


def _pid(keeper: Keeper) -> int | None:
    """The first process of the engine that it keeps now."""
    replica = keeper.replica
    return replica.process.pid if replica is not None and replica.process is not None else None
