"""Models that come, work and leave in simulated time, housed by the real residency and the real ledger.

It refuses to know a real clock or a process: a run is a function of its models, its arrivals and its seed.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from forebay.config import Settings
from forebay.model_config import FakeModel
from forebay.replicas.keeper import Keeper
from forebay.replicas.memory import HOST, Bytes
from forebay.replicas.record import ModelRecord
from forebay.replicas.residency import Residency, Wanted
from forebay.telemetry import Log, Metrics
from tests.support.clock import FakeClock

STEP_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Kind:
    """A model: what it takes, how long it takes to load and to stop, and for how long each request runs."""

    name: str
    bytes: int
    load_seconds: float = 2.0
    run_seconds: float = 1.0
    stop_seconds: float = 0.25
    slots: int = 4
    replicas: int = 1
    pinned: bool = False
    asleep_bytes: int = 0
    idle_unload_seconds: float | None = None
    least_bytes: int | None = None  # where `bytes` was learned


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request; `batch` for batch work."""

    at: float
    model: str
    batch: bool = False


class Stand:
    """One engine process, as the residency sees a keeper."""

    def __init__(self, kind: Kind, number: int, now: float) -> None:
        self.id = f"keeper_{number}"
        self.kind = kind
        self.load_seconds = kind.load_seconds
        self.ready_at: float | None = None
        self.asleep_at: float | None = None
        self.sleep_level = 0
        self.sleeps = False
        self.leaving = False
        self.ended = False
        self.hopeful = True
        self.failure = None
        self.retry_at_epoch: float | None = None
        self.runs: list[tuple[float, bool]] = []
        self.idle = asyncio.Event()
        self.idle.set()
        self.replica = SimpleNamespace(id=f"replica_{number}", idle=self.idle)
        self.loaded_by = now + kind.load_seconds
        self.gone_by: float | None = None

    def ask_stop(self) -> None:
        self.leaving = True

    def move(self, now: float) -> None:
        self.runs = [run for run in self.runs if run[0] > now]
        if self.ready_at is None and now >= self.loaded_by and not self.leaving:
            self.ready_at = now
        if self.leaving and not self.runs:
            self.gone_by = now + self.kind.stop_seconds if self.gone_by is None else self.gone_by
            self.ended = now >= self.gone_by
        (self.idle.clear if self.runs else self.idle.set)()

    @property
    def free(self) -> int:
        return 0 if self.leaving or self.ready_at is None else self.kind.slots - len(self.runs)


@dataclass(slots=True)
class Story:
    """What became of a run: who came up and left when, and how long models waited that somebody asked for."""

    loads: list[tuple[float, str]] = field(default_factory=list)
    leaves: list[tuple[float, str]] = field(default_factory=list)
    stays: list[float] = field(default_factory=list)
    absences: list[tuple[str, float]] = field(default_factory=list)
    served: list[tuple[float, Arrival]] = field(default_factory=list)
    most_bytes: int = 0


class House:
    """The models, whoever waits for them, and the time."""

    def __init__(self, kinds: Iterable[Kind], total: int, **memory: float) -> None:
        self.clock = FakeClock()
        self.kinds = {kind.name: kind for kind in kinds}
        self.total = total
        self.shut: str | None = None
        self.relief: int | None = None
        self.taken = 0  # by the programs of others
        self.story = Story()
        self.lines: dict[str, list[Arrival]] = {name: [] for name in self.kinds}
        self.last: dict[tuple[str, bool], float] = {}
        self.absent_since: dict[str, float] = {}
        settings = Settings.model_validate({"memory": memory}).memory
        self.records = [ModelRecord(kind.name, _settings(kind)) for kind in self.kinds.values()]
        self.residency = Residency(self, settings, self.clock, Metrics(), Log())
        self.residency.demand = self.wanted
        self.residency.on_leave = self.clear_out
        self._number = 0

    # What the residency asks.

    def totals(self) -> Bytes:
        return {HOST: self.total - self.taken}

    def others(self) -> Bytes:
        return {HOST: self.taken}

    def allowed(self) -> Bytes:
        return {HOST: self.total - self.taken if self.relief is None else self.relief}

    def need(self, model: str) -> Bytes:
        count = self.kinds[model].bytes
        return {HOST: count} if count else {}

    def least(self, model: str) -> Bytes:
        count = self.kinds[model].least_bytes
        return self.need(model) if count is None else {HOST: count}

    def held(self, model: str, keeper: Keeper) -> Bytes:
        asleep = keeper.asleep_at is not None
        return {HOST: self.kinds[model].asleep_bytes} if asleep else self.need(model)

    def may_sleep(self, model: str, beside: Bytes) -> bool:
        return True

    def closed(self) -> str | None:
        return self.shut

    def measured_at(self) -> float:
        return self.now

    def out_of_memory(self, model: str) -> None:
        pass

    def wanted(self, model: str) -> Wanted:
        now, line = self.now, self.lines[model]
        online, batch = [one for one in line if not one.batch], [one for one in line if one.batch]
        on = {
            side: frozenset(stand.replica.id for stand in self.stands(model) if any(b is side for _, b in stand.runs))
            for side in (False, True)
        }
        for side, waits in ((False, online), (True, batch)):
            if waits or on[side]:
                self.last[model, side] = now
        last = [self.last[key] for key in ((model, False), (model, True)) if key in self.last]
        return Wanted(
            len(online),
            len(batch),
            online[0].at if online else None,
            batch[0].at if batch else None,
            self.last.get((model, False)),
            max(last, default=None),
            on[False],
            on[True],
        )

    def clear_out(self, model: str) -> None:
        """Batch work gives its place back, and comes again."""
        for stand in self.stands(model):
            if stand.leaving:
                again = [Arrival(self.now, model, True) for _, batch in stand.runs if batch]
                stand.runs = [run for run in stand.runs if not run[1]]
                for one in again:
                    self.arrive(one)

    # What happens.

    @property
    def now(self) -> float:
        return self.clock.monotonic()

    def record(self, model: str) -> ModelRecord:
        return next(record for record in self.records if record.name == model)

    def stands(self, model: str) -> list[Stand]:
        return cast(list[Stand], self.record(model).keepers)

    def arrive(self, arrival: Arrival) -> None:
        self.lines[arrival.model].append(arrival)
        self.record(arrival.model).want(self.now)

    def step(self) -> None:
        """What ends, who starts, who is served; then the time moves on."""
        for record in self.records:
            for stand in self.stands(record.name):
                self._move(stand)
            record.keepers = [keeper for keeper in record.keepers if not keeper.ended]
            if not record.wanted:
                for keeper in record.keepers:
                    keeper.ask_stop()
        for record in self.residency.review(self.records, lambda _record: True):
            self._number += 1
            record.keepers.append(cast(Keeper, Stand(self.kinds[record.name], self._number, self.now)))
        for name in self.kinds:
            self._serve(name)
        self._look()
        self.clock.advance(STEP_SECONDS)

    def run(self, arrivals: Iterable[Arrival], seconds: float, watch: Callable[[], Any] = lambda: None) -> Story:
        """All of `arrivals`, whose times count from now, and `seconds` in all."""
        begin = self.now
        coming = sorted(arrivals, key=lambda one: one.at, reverse=True)
        while self.now < begin + seconds:
            while coming and begin + coming[-1].at <= self.now:
                one = coming.pop()
                self.arrive(Arrival(self.now, one.model, one.batch))
            self.step()
            watch()
        return self.story

    def _move(self, stand: Stand) -> None:
        before = stand.ready_at
        for _, batch in stand.runs:
            self.last[stand.kind.name, batch] = self.now
        stand.move(self.now)
        if before is None and stand.ready_at is not None:
            self.story.loads.append((self.now, stand.kind.name))
        if stand.ended and stand.ready_at is not None:
            self.story.leaves.append((self.now, stand.kind.name))
            self.story.stays.append(self.now - stand.ready_at)

    def _serve(self, model: str) -> None:
        line = self.lines[model]
        for stand in self.stands(model):
            while line and stand.free > 0:
                one = min(line, key=lambda each: each.batch)
                line.remove(one)
                stand.runs.append((self.now + stand.kind.run_seconds, one.batch))
                self.story.served.append((self.now, one))
                stand.idle.clear()

    def _look(self) -> None:
        held = sum(stand.kind.bytes for name in self.kinds for stand in self.stands(name) if not stand.ended)
        self.story.most_bytes = max(self.story.most_bytes, held)
        for name, line in self.lines.items():
            up = any(
                stand.free >= 0 and stand.ready_at is not None and not stand.leaving for stand in self.stands(name)
            )
            asked = any(not one.batch for one in line) and not up
            if asked:
                self.absent_since.setdefault(name, self.now)
            elif name in self.absent_since:
                self.story.absences.append((name, self.now - self.absent_since.pop(name)))


def _settings(kind: Kind) -> FakeModel:
    return FakeModel(
        engine="fake",
        slots=kind.slots,
        replicas=kind.replicas,
        pinned=kind.pinned,
        idle_unload_seconds=kind.idle_unload_seconds,
    )
