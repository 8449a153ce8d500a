"""Models of several kinds on one machine: how online work fares beside a batch, and what both get done (P7).

First each kind is asked for alone, as often as the machine can: the time of one is its weight, and so requests of
different kinds can be added. Then all of them come as a Poisson load that takes a share of the machine, with the lines of
a batch beside them and without, in turns, with the same requests at the same moments. At last there is a batch alone, and
a burst of chat: how soon has the engine of the batch stopped?

It refuses to count lines of a batch after the load has ended.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from forebay.bench.mixed import EDGE, PIECE_SECONDS, TEXT_WORDS, TOKENS, Answers, Kind, alone, kinds, offer
from forebay.bench.mixed_batches import Batches, handing_in
from forebay.bench.processes import below, spent_seconds
from forebay.bench.recordings import telephone_call
from forebay.bench.report import Measure, Report, percentile
from forebay.bench.speech import model_of
from forebay.bench.stage import config_of, place_of, served
from forebay.bench.wire import now
from forebay.clock import seeded
from forebay.config import Settings
from forebay.errors import SetupError
from forebay.model_config import Model
from forebay.replicas.catalog import Catalog

_MODELS = {
    "chat": "smollm2-135m-instruct",
    "embeddings": "all-minilm-l6-v2",
    "recordings": "whisper-tiny.en",
    "images": "opencv-telea",
}
_PROGRAMS = {"embeddings": "forebay.engines.onnx_text", "recordings": "forebay.engines.whisper"}
_BATCH_REPLICAS = {
    "chat": 1
}  # so that lines of a batch can stand still where they are for their own model's online requests
_BURST = 8
_BURST_LINES_MIN = 400  # so that some are left when the burst comes
_LOOK_SECONDS = 0.02
_STILL_SECONDS = 0.2  # an engine that computes next to nothing for so long has stepped aside
_STILL_SHARE = 0.1
_BEGIN_SECONDS = 60.0
_BUSY_SECONDS = 10.0
_OTHER_LINES = 1_000_000  # than those beside the load


@dataclass(frozen=True, slots=True)
class Size:
    """How much to measure: seconds of each load, lines of a batch, the share of the machine.

    Each kind alone is measured for `alone_seconds`, with `at_once_max` requests at once at most.
    """

    seconds: float
    lines: int
    load: float
    alone_seconds: float = 8.0
    at_once_max: int = 64


QUICK = Size(3.0, 40, 0.4, 0.2, 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """Who shares the machine: the share of each kind in the online load, and of what the lines of a batch are.

    `stops` is the kind whose engine does nothing but lines when a burst of chat comes.
    """

    name: str
    online: Mapping[str, float]
    lines: Sequence[str]
    stops: str

    @property
    def kinds(self) -> list[str]:
        """All of them."""
        return list(dict.fromkeys([*self.online, *self.lines]))


MIXED = Plan(
    "coserve",
    {"chat": 0.55, "embeddings": 0.15, "recordings": 0.15, "images": 0.15},
    ("embeddings", "chat"),
    stops="embeddings",
)
SPEECH = Plan("coserve-speech", {"chat": 1.0}, ("recordings",), stops="recordings")

_WHERE = ("alone", "beside a batch")
_SHARES = {"p50": 0.5, "p99": 0.99}
_FIRST = ("time to first token", "time per output token")
_TIMELY = {"floor": 1.25, "goal": 1.1}
_ASIDE = "from a burst of chat until the batch has stepped aside"


def measures(plan: Plan) -> dict[str, Measure]:
    """What a run fills in."""
    bounds: dict[str, dict[str, Any]] = {f"{name}, beside a batch / alone, p99": _TIMELY for name in _FIRST}
    ratio = "work done per second, beside a batch / alone"
    judged = {**bounds, ratio: {"floor": 1.5, "goal": 2, "more_is_better": True}, _ASIDE: {"floor": 1}}
    ratios = {f"{name}, beside a batch / alone, {share}": "" for name in (*_FIRST, *plan.online) for share in _SHARES}
    told = {
        **ratios,
        **{f"work done per second, {where}": "x the machine" for where in _WHERE},
        **{f"CPU time that is used, {where}": "%" for where in _WHERE},
        **{
            f"{name}, {where}, {share}": "ms"
            for name in (*_FIRST, *plan.online)
            for where in _WHERE
            for share in _SHARES
        },
        **{f"lines of a batch per second: {name}": "/s" for name in plan.lines},
        **{f"one of many alone: {name}": "ms" for name in plan.kinds},
    }
    found = [Measure("P7", name, "s" if name == _ASIDE else "", **bound) for name, bound in judged.items()]
    found += [Measure("P7", name, unit) for name, unit in told.items() if name not in judged]
    return {measure.name: measure for measure in found}


async def run(settings: Settings, plan: Plan, seeds: int, size: Size, say: Callable[[str], None]) -> Report:
    """Measure everything once for each seed on one server. Raises SetupError."""
    report = Report(plan.name, seeds, measures(plan))
    call = await telephone_call(settings)
    nothing_kept = ["[embeddings]", "cache_bytes = 0"]
    models = {_MODELS[kind]: _model(settings, kind) for kind in plan.kinds}
    async with AsyncExitStack() as stack:
        url, key, pid = await stack.enter_async_context(served(config_of(models, *nothing_kept)))
        asked = {kind: _MODELS[kind] for kind in plan.kinds}
        found = await stack.enter_async_context(kinds(url, key, asked, call))
        batches = await stack.enter_async_context(handing_in(url, key, asked, report))
        bench = _Bench(plan, size, report, found, batches, pid, say)
        await bench.calibrate()
        for seed in range(1, seeds + 1):
            await bench.measure(seed)
    report.notes += _notes(plan, size)
    return report


def _notes(plan: Plan, size: Size) -> list[str]:
    shares = ", ".join(f"{share:.0%} {kind}" for kind, share in plan.online.items())
    return [
        f"{', '.join(_MODELS[kind] for kind in plan.kinds)}, with the settings of the catalogue, but chat has a replica for batch work; no vectors are kept.",
        f"Online: {size.load:.0%} of the machine for {size.seconds:g} s, of that {shares}.",
        f"A batch of {size.lines} lines ({', '.join(plan.lines)}); those count that are done in this time, over all of it. Then it is cancelled.",
        f"Chat has {TOKENS} tokens at most, texts {TEXT_WORDS[0]} to {TEXT_WORDS[1]} words. Lines are about the same.",
        f"Recordings are {PIECE_SECONDS:g} s of a telephone call, images {EDGE} x {EDGE} pixels.",
        "Work is counted in the time that the machine takes for one of that kind, with nothing else and enough of these.",
        "A request that is sent late, because the machine is busy, has waited since the moment at which it was due.",
        f"A burst is {_BURST} requests at once while nothing but lines runs ({plan.stops}).",
        f"Their engine has stepped aside when it uses less than {_STILL_SHARE:.0%} of a core for {_STILL_SECONDS:g} s.",
        f"Looks are {_LOOK_SECONDS:g} s apart, the first as the burst is sent: a time of next to nothing says that it stood still from there on.",
        "If it never does, the length of the burst is told.",
        "Client, server and engines share the machine's cores.",
    ]


def _model(settings: Settings, kind: str) -> Model:
    """The model of a kind as it is run here. Raises SetupError."""
    name = _MODELS[kind]
    if kind == "recordings":
        return model_of(settings, name)[0]
    model = Catalog(settings).get(name)
    model = model.model_copy(update={"batch_replicas": _BATCH_REPLICAS.get(kind, 0)})
    if model.source is None:
        return model
    return model.model_copy(update={"source": f"file:{place_of(settings, name)}", "files": {}})


@dataclass(frozen=True, slots=True)
class _Seen:
    """One load: its answers, the share of the machine's CPU time that it used, and lines per second beside it."""

    answers: Answers
    cpu_share: float
    lines: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Bench:
    plan: Plan
    size: Size
    report: Report
    kinds: Mapping[str, Kind]
    batches: Batches
    server_pid: int
    say: Callable[[str], None]
    seconds_of: dict[str, float] = field(default_factory=dict)

    async def calibrate(self) -> None:
        """What one of each kind costs, once everything has worked once."""
        for name, kind in self.kinds.items():
            self.say(f"{name} alone")
            await alone(kind, 0.0, 0, 1)
            measured = alone(kind, self.size.alone_seconds, 1, self.size.at_once_max)
            self.seconds_of[name], replies = await measured
            self.report.count(reply.trouble for reply in replies)
            self.report.add(f"one of many alone: {name}", 1000 * self.seconds_of[name])

    async def measure(self, seed: int) -> None:
        """The load with a batch and without, in turns, and a burst."""
        seen = {}
        for where in _WHERE if seed % 2 else reversed(_WHERE):
            self.say(f"seed {seed}: {self.size.seconds:g} s {where}")
            seen[where] = await (self._load(seed, 0) if where == "alone" else self._beside(seed))
        self._add(seen)
        self.say(f"seed {seed}: a burst")
        self.report.add(_ASIDE, await self._burst(seed))

    async def _beside(self, seed: int) -> _Seen:
        """The load beside a batch of each kind of lines, which are cancelled at its end."""
        count = self.size.lines // len(self.plan.lines)
        async with AsyncExitStack() as stack:
            for name in self.plan.lines:
                await stack.enter_async_context(self.batches.hand_in(self.kinds[name], count, seed))
            return await self._load(seed, 1, self.plan.lines)

    async def _load(self, seed: int, salt: int, lines: Sequence[str] = ()) -> _Seen:
        rates = {name: self.size.load * share / self.seconds_of[name] for name, share in self.plan.online.items()}
        cpu, before, began = spent_seconds(self.server_pid), await self.batches.done(), now()
        offering = asyncio.create_task(offer(self.kinds, rates, self.size.seconds, seed, salt))
        await asyncio.sleep(self.size.seconds)
        seconds, used = now() - began, spent_seconds(self.server_pid) - cpu
        after = await self.batches.done()
        done = {name: (after[name] - before[name]) / seconds for name in lines}
        answers = await offering
        for replies in answers.values():
            self.report.count(reply.trouble for reply in replies)
        return _Seen(answers, used / seconds / (os.cpu_count() or 1), done)

    def _add(self, seen: Mapping[str, _Seen]) -> None:
        timed = {where: times(each.answers) for where, each in seen.items()}
        for name in timed["alone"]:
            for shown, share in _SHARES.items():
                found = [percentile(timed[where][name], share) for where in _WHERE]
                self.report.add(f"{name}, beside a batch / alone, {shown}", found[1] / found[0])
                for where, value in zip(_WHERE, found, strict=True):
                    self.report.add(f"{name}, {where}, {shown}", 1000 * value)
        done = [self._work(each) for each in seen.values()]
        work = dict(zip(seen, done, strict=True))
        self.report.add("work done per second, beside a batch / alone", work[_WHERE[1]] / work[_WHERE[0]])
        for where, each in seen.items():
            self.report.add(f"work done per second, {where}", work[where])
            self.report.add(f"CPU time that is used, {where}", 100 * each.cpu_share)
            for name, rate in each.lines.items():
                self.report.add(f"lines of a batch per second: {name}", rate)

    def _work(self, seen: _Seen) -> float:
        """Seconds of the machine's work that were done in each second."""
        online = sum(len(replies) * self.seconds_of[name] for name, replies in seen.answers.items())
        return online / self.size.seconds + sum(rate * self.seconds_of[name] for name, rate in seen.lines.items())

    async def _burst(self, seed: int) -> float:
        """Seconds from a burst of chat until the engine of a batch has stepped aside."""
        pid = below(self.server_pid, _PROGRAMS[self.plan.stops])
        if pid is None:
            raise SetupError("The engine of a batch was not found. Leave P7 to a Linux machine.")
        chat, chance = self.kinds["chat"], seeded(seed)
        lines, before = max(self.size.lines, _BURST_LINES_MIN), await self.batches.done()
        async with self.batches.hand_in(self.kinds[self.plan.stops], lines, seed + _OTHER_LINES):
            await self._until_begun(before)
            await _until_busy(pid)
            requests = [chat.request(chance) for _ in range(_BURST)]
            came, looks = now(), list[tuple[float, float]]()
            burst = asyncio.ensure_future(asyncio.gather(*(chat.target.ask(request) for request in requests)))
            while not burst.done():
                looks.append((now(), spent_seconds(pid)))
                await asyncio.sleep(_LOOK_SECONDS)
            self.report.count(reply.trouble for reply in burst.result())
        return stepped_aside(looks) - came

    async def _until_begun(self, before: Mapping[str, float]) -> None:
        """Wait until a line is done."""
        try:
            async with asyncio.timeout(_BEGIN_SECONDS):
                while True:
                    if await self.batches.done() != before:
                        return
                    await asyncio.sleep(_STILL_SECONDS)
        except TimeoutError:
            raise SetupError("The batch did not begin. Measure on a machine that does nothing else.") from None


async def _until_busy(pid: int) -> None:
    """Wait until an engine computes; lines have pauses between them. Not for long: they may all be done."""
    until, used = now() + _BUSY_SECONDS, spent_seconds(pid)
    while now() < until:
        await asyncio.sleep(_LOOK_SECONDS)
        before, used = used, spent_seconds(pid)
        if used > before:
            return


def stepped_aside(looks: Sequence[tuple[float, float]]) -> float:
    """When, of looks at a clock and at CPU time, that begins to stand still; the last look if it never does."""
    for place, (at, used) in enumerate(looks):
        later = next((after for then, after in looks[place:] if then - at >= _STILL_SECONDS), None)
        if later is not None and later - used <= _STILL_SHARE * _STILL_SECONDS:
            return at
    return looks[-1][0]


def times(answers: Answers) -> dict[str, list[float]]:
    """Seconds to the first token and from one to the next, in chat, and from request to answer, in each kind."""
    chat = answers["chat"]
    return {
        _FIRST[0]: [reply.first_token_seconds for reply in chat if reply.first],
        _FIRST[1]: [reply.token_seconds for reply in chat if reply.tokens > 1],
        **{name: [reply.seconds for reply in replies] for name, replies in answers.items()},
    }
