"""One device in simulated time: online requests and batch work on engines that slow each other down, and the real pace.

It refuses to know a real clock: a run is a function of its trace, its machine, its settings and its seed.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from forebay.scheduler.demand import Demand
from forebay.scheduler.pace import Claim, Pace, Signal, to_run
from forebay.scheduler.policy import reserved
from forebay.server_config import PaceSettings

HEADROOM_SECONDS = 10.0
TURN_SECONDS = 10.0
MODEL = "chat"


@dataclass(frozen=True, slots=True)
class Machine:
    """How its engines compute: alone a token takes `token_seconds`; each other online request makes it longer by `crowd`.

    `room` places of batch work do no harm, and those beyond it make tokens longer by `harm` times the root of their number. Lines on the model that is
    online take `line_seconds` and cannot be paused; `engines` others do batch work with so many places each, and can.
    """

    token_seconds: float = 0.012
    first_seconds: float = 0.04
    tokens: int = 16
    slots: int = 8
    crowd: float = 0.25
    room: int = 0
    harm: float = 0.9
    noise: float = 0.08
    engines: tuple[int, ...] = (1,)
    line_seconds: float = 0.0


@dataclass(slots=True)
class Visit:
    joined_at: float
    granted_at: float = 0.0
    first_at: float = 0.0
    ended_at: float = 0.0
    tokens: int = 0
    wanted: int = 1

    @property
    def first(self) -> float:
        return self.first_at - self.joined_at

    @property
    def gap(self) -> float:
        return (self.ended_at - self.first_at) / max(1, self.wanted - 1)


@dataclass(slots=True)
class Engine:
    name: str
    places: int
    runs: bool = True
    since: float = 0.0
    done: float = 0.0
    held_longest: float = 0.0


@dataclass(slots=True)
class Seen:
    """What came of a run. `left_running` counts engines that ran on when somebody came to a device without online work.

    `batch_seconds` is batch work done, in seconds of one place alone; `held_longest` the longest pause of an engine.
    """

    visits: list[Visit] = field(default_factory=list)
    batch_seconds: float = 0.0
    online_seconds: float = 0.0
    changes: list[tuple[float, int]] = field(default_factory=list)
    left_running: int = 0
    held_longest: float = 0.0
    seconds: float = 0.0


def poisson(chance: Random, rate: float, seconds: float) -> Iterator[float]:
    """Arrivals that know nothing of each other."""
    at = chance.expovariate(rate)
    while at < seconds:
        yield at
        at += chance.expovariate(rate)


def bursty(chance: Random, rate: float, seconds: float) -> Iterator[float]:
    """The same mean rate in bursts of eight or so."""
    for start in poisson(chance, rate / 8, seconds):
        at = start
        for _ in range(1 + int(chance.expovariate(1 / 7))):
            yield at
            at += chance.expovariate(20 * rate)


def diurnal(chance: Random, rate: float, seconds: float) -> Iterator[float]:
    """A rate that goes from nothing to twice the mean and back, three times."""
    for at in poisson(chance, 2 * rate, seconds):
        if chance.random() < (1 - math.cos(6 * math.pi * at / seconds)) / 2:
            yield at


class Simulation:
    """One run. Without batch work it is what online requests see alone."""

    def __init__(self, machine: Machine, settings: PaceSettings, seed: int, *, batch: bool) -> None:
        self.machine = machine
        self.pace = Pace(settings)
        self.seen = Seen()
        self._noise = Random(seed)
        self._demand = Demand(HEADROOM_SECONDS)
        self._batch = batch
        self._engines = [Engine(f"engine_{n}", places) for n, places in enumerate(machine.engines)] if batch else []
        self._lines = 0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0
        self._waiting: deque[Visit] = deque()
        self._running = 0
        self._now = 0.0

    def run(self, arrivals: list[float], seconds: float) -> Seen:
        """Play `arrivals`; batch work is there all the time."""
        for at in sorted(arrivals):
            self._at(at, self._join)
        self._at(0.0, self._look)
        self._at(seconds, lambda: None)
        while self._events and self._now <= seconds:
            at, _, what, arguments = heapq.heappop(self._events)
            if at > seconds:
                break
            self._advance(at)
            what(*arguments)
        for engine in self._engines:
            self.seen.held_longest = max(
                self.seen.held_longest, engine.held_longest, 0 if engine.runs else seconds - engine.since
            )
        self.seen.visits = [visit for visit in self.seen.visits if visit.ended_at]
        self.seen.seconds = seconds
        return self.seen

    def _at(self, at: float, what: Callable[..., None], *arguments: Any) -> None:
        self._number += 1
        heapq.heappush(self._events, (at, self._number, what, arguments))

    def _advance(self, at: float) -> None:
        """Count the batch work that was done until `at`, in seconds of the whole device."""
        gone, self._now = at - self._now, at
        share = 1 / (1 + self._running / max(1, self.machine.room))
        self.seen.batch_seconds += gone * share * min(max(1, self.machine.room), self._computing())

    def _computing(self) -> int:
        return sum(engine.places for engine in self._engines if engine.runs) + self._lines

    def _slow(self) -> float:
        """How many times as long as alone everything takes just now."""
        machine = self.machine
        over = max(0, self._computing() - machine.room)
        noise = self._noise.lognormvariate(0, machine.noise)
        return (1 + machine.crowd * (self._running - 1)) * (1 + machine.harm * math.sqrt(over)) * noise

    def _join(self) -> None:
        visit = Visit(self._now, wanted=max(2, int(self._noise.expovariate(1 / self.machine.tokens))))
        self.seen.visits.append(visit)
        self._demand.change(1, self._now)
        self.pace.joined(self._now)
        self._waiting.append(visit)
        first = self.pace.online == 1 and self.pace.bound(self._now).yielding == 0
        self._apply()
        self.seen.left_running += sum(engine.runs for engine in self._engines) if first else 0
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self._running < self.machine.slots - min(self._lines, self.machine.slots - 1):
            visit = self._waiting.popleft()
            visit.granted_at = self._now
            self._running += 1
            self._see(Signal.WAIT, self._now - visit.joined_at)
            self._at(self._now + self.machine.first_seconds * self._slow(), self._token, visit)

    def _token(self, visit: Visit, before: float = 0.0) -> None:
        if visit.tokens == 0:
            visit.first_at = self._now
            self._see(Signal.FIRST, self._now - visit.granted_at)
        else:
            self._see(Signal.TOKEN, self._now - before)
        visit.tokens += 1
        if visit.tokens < visit.wanted:
            self._at(self._now + self.machine.token_seconds * self._slow(), self._token, visit, self._now)
            return
        visit.ended_at = self._now
        self.seen.online_seconds += self.machine.first_seconds + (visit.wanted - 1) * self.machine.token_seconds
        self._running -= 1
        self._demand.change(-1, self._now)
        self.pace.left(self._now)
        self._grant()
        self._apply()
        self._plan_look()

    def _see(self, signal: Signal, seconds: float) -> None:
        if self.pace.seen(signal, MODEL, seconds, self._now):
            self.seen.changes.append((self._now, self.pace.level))
            self._apply()

    def _look(self) -> None:
        self.pace.tick(self._now)
        self._apply()
        self._plan_look()

    def _plan_look(self) -> None:
        due = self.pace.next_look(self._now)
        if self._batch and due is not None:
            self._at(due, self._look)

    def _apply(self) -> None:
        """Pause and resume engines, and let lines in, as the pace allows now."""
        if not self._batch:
            return
        bound = self.pace.bound(self._now)
        self._admit(bound.staying)
        places = None if bound.yielding is None else max(0, bound.yielding - self._lines)
        claims = [Claim(engine.name, engine.places, engine.runs, engine.since) for engine in self._engines]
        running = to_run(claims, places, self._now, TURN_SECONDS)
        for engine in self._engines:
            runs = engine.name in running
            if runs and not engine.runs:
                engine.held_longest = max(engine.held_longest, self._now - engine.since)
            if runs != engine.runs:
                engine.runs, engine.since = runs, self._now
        paced = sum(engine.places for engine in self._engines if engine.runs)
        paced = paced if places is None else min(paced, places)
        before = self.pace.next_look(self._now)
        self.pace.batch(paced + self._lines, self._now, held=len(running) < len(self._engines))
        if self.pace.next_look(self._now) != before:
            self._plan_look()

    def _admit(self, bound: int | None) -> None:
        if not self.machine.line_seconds:
            return
        room = self.machine.slots - reserved(self._demand.peak(self._now), self.machine.slots)
        places = room if bound is None else min(room, bound)
        while self._lines < places and self._running + self._lines < self.machine.slots:
            self._lines += 1
            self._at(self._now + self.machine.line_seconds * (1 + self.machine.crowd * self._running), self._line_ended)

    def _line_ended(self) -> None:
        self._lines -= 1
        self._grant()
        self._apply()


def compare(
    machine: Machine,
    settings: PaceSettings,
    seed: int,
    trace: Callable[..., Iterator[float]],
    load: float,
    seconds: float,
) -> tuple[Seen, Seen]:
    """The same arrivals without batch work and with it."""
    chance = Random(seed)
    alone = machine.first_seconds + (machine.tokens - 1) * machine.token_seconds
    arrivals = list(trace(chance, load / alone, seconds))
    return tuple(Simulation(machine, settings, seed, batch=batch).run(arrivals, seconds) for batch in (False, True))  # type: ignore[return-value]


def p99(values: list[float]) -> float:
    """The value that one in a hundred exceeds."""
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]
