"""What the server itself adds, with an engine that costs next to nothing: P1 to P4.

It refuses to compare figures of different moments: every control runs between the runs that it is compared with.
"""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass

from forebay.bench.report import Measure, Report, percentile
from forebay.bench.stage import Stage, cpu_seconds, staged
from forebay.bench.wire import Reply, Target, now
from forebay.clock import seeded
from forebay.errors import SetupError
from forebay.model_config import FakeModel

_MODEL = "fake"
_SLOTS = 512
_RATE = 500.0
_CONNECTIONS = 32
_STREAMS = 100
_TOKENS_PER_SECOND = 100
_WARM_UP = 200
_SETTINGS = f"""
default_models = false
[models.{_MODEL}]
engine = "fake"
preload = true
slots = {_SLOTS}
queue_places = 1000
"""


@dataclass(frozen=True, slots=True)
class Size:
    """How much to measure for each seed."""

    pairs: int
    seconds: float
    streams: int = _STREAMS


def measures() -> dict[str, Measure]:
    """What a run fills in."""
    found = [
        Measure("P1", "added latency, one after the other, p50", "ms", floor=1.0, goal=0.5),
        Measure("P1", "added latency, one after the other, p99", "ms", floor=5.0, goal=1.5),
        Measure("P1", "latency straight to the engine, p50", "ms"),
        Measure("P1", "added latency at 500 requests/s, p50", "ms"),
        Measure("P1", "added latency at 500 requests/s, p99", "ms", goal=3.0),
        Measure("P1", "how late the client itself was at 500 requests/s, p99", "ms"),
        Measure("P2", "requests per second, 32 connections", "/s", floor=1000, goal=2500, more_is_better=True),
        Measure("P2", "requests per second straight to the engine", "/s"),
        Measure("P2", "cores that the server process used", ""),
        Measure("P2", "cores that the client and both engines used meanwhile", ""),
        Measure("P3", "server CPU per streamed token, 100 streams", "us", floor=40, goal=15),
        Measure("P3", "tokens per second through / direct", "", floor=0.97, goal=0.99, more_is_better=True),
        Measure("P3", "tokens per second through", "/s"),
        Measure("P4", "added time to first token, p50", "ms", goal=1.0),
        Measure("P4", "added time to first token, p99", "ms", floor=5.0),
    ]
    return {measure.name: measure for measure in found}


async def run(seeds: int, size: Size, say: Callable[[str], None]) -> Report:
    """Measure everything once for each seed."""
    report = Report("overhead", seeds, measures())
    model = FakeModel(engine="fake", slots=_SLOTS)
    async with staged(_MODEL, model, None, _SETTINGS) as stage:
        await _alternate(stage, _WARM_UP, stream=False, salt="warm")
        for seed in range(1, seeds + 1):
            say(f"seed {seed}: one after the other")
            await _added_latency(stage, size, seed, report)
            say(f"seed {seed}: 500 requests/s")
            await _at_rate(stage, size, seed, report)
            say(f"seed {seed}: {_CONNECTIONS} connections")
            await _throughput(stage, size, seed, report)
            say(f"seed {seed}: {size.streams} streams")
            await _streaming(stage, size, seed, report)
    report.notes += [
        "Client, server and engines share the machine's cores; what client and engine take is in every figure.",
        "Latency at a rate counts from when a request was due; the client's own lateness is in it, on both sides.",
        f"Streams are asked for {_TOKENS_PER_SECOND} tokens per second each, one event each.",
    ]
    return report


async def _alternate(stage: Stage, pairs: int, *, stream: bool, salt: str) -> dict[str, list[Reply]]:
    """`pairs` requests to each side, one at a time, in turns, each pair with a prompt of its own."""
    replies: dict[str, list[Reply]] = {stage.engine.name: [], stage.server.name: []}
    for number in range(pairs):
        order = (stage.engine, stage.server) if number % 2 else (stage.server, stage.engine)
        for target in order:
            request = target.request(f"{salt} {number} [[fake tokens=8]]", 8, stream=stream)
            replies[target.name].append(await target.ask(request))
    return replies


async def _added_latency(stage: Stage, size: Size, seed: int, report: Report) -> None:
    whole = await _alternate(stage, size.pairs, stream=False, salt=f"whole {seed}")
    streamed = await _alternate(stage, size.pairs // 2, stream=True, salt=f"streamed {seed}")
    for replies in (*whole.values(), *streamed.values()):
        report.count(reply.trouble for reply in replies)
    for share, label in ((0.5, "p50"), (0.99, "p99")):
        times = {name: percentile([r.seconds for r in replies], share) for name, replies in whole.items()}
        report.add(f"added latency, one after the other, {label}", 1000 * (times["through"] - times["direct"]))
        firsts = {
            name: percentile([r.first_token_seconds for r in replies], share) for name, replies in streamed.items()
        }
        report.add(f"added time to first token, {label}", 1000 * (firsts["through"] - firsts["direct"]))
        if share == 0.5:
            report.add("latency straight to the engine, p50", 1000 * times["direct"])


async def _at_rate(stage: Stage, size: Size, seed: int, report: Report) -> None:
    direct, _ = await _poisson(stage.engine, size.seconds, seed)
    through, late = await _poisson(stage.server, size.seconds, seed)
    report.count(reply.trouble for reply in (*direct, *through))
    for share, label in ((0.5, "p50"), (0.99, "p99")):
        added = percentile([r.seconds for r in through], share) - percentile([r.seconds for r in direct], share)
        report.add(f"added latency at 500 requests/s, {label}", 1000 * added)
    report.add("how late the client itself was at 500 requests/s, p99", 1000 * percentile(late, 0.99))


async def _poisson(target: Target, seconds: float, seed: int) -> tuple[list[Reply], list[float]]:
    """Requests that come when they come, answered or not; the replies, and how late each one was sent."""
    chance = seeded(seed)
    asking: list[asyncio.Task[Reply]] = []
    late: list[float] = []
    due = began = now()
    while due - began < seconds:
        due += chance.expovariate(_RATE)
        request = target.request(f"rate {seed} {len(asking)} [[fake tokens=8]]", 8, stream=False)
        if (wait := due - now()) > 0:
            await asyncio.sleep(wait)
        late.append(now() - due)
        asking.append(asyncio.create_task(target.ask(request, due)))
    replies = await asyncio.gather(*asking)
    drop = len(replies) // 10  # the warm-up: connections are still being opened
    return replies[drop:], late[drop:]


async def _throughput(stage: Stage, size: Size, seed: int, report: Report) -> None:
    half = size.seconds / 2
    _, direct, _ = await _closed_loop(stage, stage.engine, half, f"{seed} a")
    rest_before = sum(map(cpu_seconds, (os.getpid(), *stage.engine_pids)))
    replies, through, server_cores = await _closed_loop(stage, stage.server, size.seconds, f"{seed} b")
    rest = sum(map(cpu_seconds, (os.getpid(), *stage.engine_pids))) - rest_before
    report.count(reply.trouble for reply in replies)
    report.add("requests per second straight to the engine", direct)
    report.add("requests per second, 32 connections", through)
    report.add("cores that the server process used", server_cores)
    report.add("cores that the client and both engines used meanwhile", rest / size.seconds)


async def _closed_loop(stage: Stage, target: Target, seconds: float, salt: str) -> tuple[list[Reply], float, float]:
    """As many requests as 32 connections carry: the replies, how many per second, and the server's cores."""
    replies: list[Reply] = []
    began, cpu = now(), cpu_seconds(stage.server_pid)
    until = began + seconds

    async def connection(number: int) -> None:
        count = 0
        while now() < until:
            count += 1
            request = target.request(f"loop {salt} {number} {count} [[fake tokens=8]]", 8, stream=False)
            replies.append(await target.ask(request))

    await asyncio.gather(*(connection(number) for number in range(_CONNECTIONS)))
    took = now() - began
    return replies, len(replies) / took, (cpu_seconds(stage.server_pid) - cpu) / took


async def _streaming(stage: Stage, size: Size, seed: int, report: Report) -> None:
    direct, direct_rate, _ = await _streams(stage, stage.engine, size, seed)
    through, through_rate, cpu = await _streams(stage, stage.server, size, seed)
    report.count(reply.trouble for reply in (*direct, *through))
    tokens = sum(reply.tokens for reply in through)
    if not tokens or not direct_rate:
        raise SetupError("No tokens were streamed. Look at the errors of a run with --quick.")
    report.add("server CPU per streamed token, 100 streams", 1e6 * cpu / tokens)
    report.add("tokens per second through / direct", through_rate / direct_rate)
    report.add("tokens per second through", through_rate)


async def _streams(stage: Stage, target: Target, size: Size, seed: int) -> tuple[list[Reply], float, float]:
    """All streams at once: the replies, tokens per second, and the server's CPU seconds."""
    tokens = max(8, int(_TOKENS_PER_SECOND * size.seconds))
    ask = f"[[fake tokens={tokens} rate={_TOKENS_PER_SECOND}]]"
    began, cpu = now(), cpu_seconds(stage.server_pid)
    replies = await asyncio.gather(
        *(
            target.ask(target.request(f"streams {seed} {number} {ask}", tokens, stream=True))
            for number in range(size.streams)
        )
    )
    took = now() - began
    return replies, sum(reply.tokens for reply in replies) / took, cpu_seconds(stage.server_pid) - cpu
