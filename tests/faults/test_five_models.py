"""Five models that take twice the memory there is, asked for in a mix: each gets its turns, and nobody gets too much."""

import asyncio
import math
import statistics
from dataclasses import dataclass, field
from datetime import datetime
from random import Random
from time import monotonic

import aiohttp
import psutil
import pytest

from tests.support.answers import Answer, ask
from tests.support.processes import GONE, lives
from tests.support.server import Server, eventually, serving

MEGA = 10**6
BALLAST = {"smallest": 30, "small": 60, "middle": 90, "large": 120, "largest": 150}
BASE = 46  # what a fake engine takes beside its ballast, with its guard, in MB
BUDGET = (sum(BALLAST.values()) + len(BALLAST) * BASE) // 2
RESIDENCY_SECONDS, PATIENCE_SECONDS = 0.5, 1.0
RUN_SECONDS_MAX = 0.5
CALLERS = 8
SWAP_SECONDS_SPARE = 2.0  # for each swap: a process that ends, and a busy machine's looks at what changed
CONFIG = f"""
default_models = false
[memory]
host_bytes = {BUDGET * MEGA}
residency_seconds = {RESIDENCY_SECONDS}
swap_wait_seconds = {PATIENCE_SECONDS}
measure_seconds = 0.25
available_min_share = 0
""" + "".join(
    f'[models.{name}]\nengine = "fake"\nslots = {CALLERS}\nqueue_timeout_seconds = 300\noptions.ballast_bytes = {mega * MEGA}\n'
    for name, mega in BALLAST.items()
)


@dataclass(slots=True)
class Watch:
    """What was seen while the traffic went on."""

    most_held: int = 0
    ratios: dict[str, list[float]] = field(default_factory=dict)
    server: list[int] = field(default_factory=list)


def held(server: Server) -> int:
    """Bytes of all engines and their guards; what several of them share counts once."""
    found = 0
    for process in server.family():
        try:
            found += process.memory_full_info().pss
        except (*GONE, psutil.AccessDenied):
            continue
    return found


async def look(server: Server, watch: Watch) -> None:
    while True:
        watch.most_held = max(watch.most_held, held(server))
        watch.server.append(server.rss())
        for name, mega in BALLAST.items():
            charged = await server.metric("forebay_memory_charged_bytes", model=name, device="host")
            measured = await server.metric("forebay_memory_measured_bytes", model=name, device="host")
            if measured > mega * MEGA:  # it is up, and has been measured
                watch.ratios.setdefault(name, []).append(charged / measured)
        await asyncio.sleep(0.5)


async def caller(server: Server, end: float, chance: Random, answers: list[Answer]) -> None:
    """Asks one model or another, a few times in a row the same one, with a pause after each answer."""
    name = chance.choice(list(BALLAST))
    while monotonic() < end:
        name = chance.choice(list(BALLAST)) if chance.random() < 0.4 else name
        text = f"{chance.random()} [[fake tokens={chance.randrange(1, 40)} token_ms=10]]"
        answers.append(await ask(server, text, model=name))
        await asyncio.sleep(chance.expovariate(2))


async def traffic(server: Server, seconds: float) -> list[Answer]:
    """As many callers as an engine has places: whoever waits for a model is served when it is up."""
    answers: list[Answer] = []
    end = monotonic() + seconds
    await asyncio.gather(*(caller(server, end, Random(seed), answers) for seed in range(CALLERS)))
    return answers


def load_seconds(server: Server) -> float:
    """The longest that an engine took to come up."""
    began = {event["replica"]: event["timestamp"] for event in server.named("engine.starting")}
    ready = {event["replica"]: event["timestamp"] for event in server.named("engine.ready")}
    times = [_time(ready[each]) - _time(began[each]) for each in ready]
    return max(times)


def _time(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


@pytest.mark.timeout(900)
async def test_five_models_in_half_the_memory_that_they_take(prove: bool) -> None:
    seconds = 600.0 if prove else 12.0
    async with serving(CONFIG, environment={"FOREBAY_LOG_FORMAT": "json"}) as server:
        await server.session.close()
        server.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300))
        watch = Watch()
        looking = asyncio.create_task(look(server, watch))
        answers = await traffic(server, seconds)
        looking.cancel()
        assert all(answer.whole for answer in answers), [answer for answer in answers if not answer.whole][:3]
        assert {event["model"] for event in server.named("engine.ready")} == set(BALLAST)
        assert not server.named("engine.died")

        waits = [int(answer.headers["x-queue-wait-ms"]) / 1000 for answer in answers]
        load, others = load_seconds(server), len(BALLAST) - 1
        bound = PATIENCE_SECONDS + load + others * (RESIDENCY_SECONDS + RUN_SECONDS_MAX + load + SWAP_SECONDS_SPARE)
        swaps = len(server.named("model.swapped"))
        # Of each model the middle one: some readings are of an engine that starts still, and has all reserved.
        ratios = {name: statistics.median(found) for name, found in watch.ratios.items()}
        print(
            f"{len(answers)} answers; longest wait {max(waits):.1f} s of {bound:.1f}; {swaps} swaps; "
            f"held {watch.most_held // MEGA} MB of {BUDGET}; charged / measured "
            f"{min(ratios.values()):.2f} to {max(ratios.values()):.2f}; slowest load {load:.2f} s"
        )
        assert max(waits) <= bound
        assert 0 < swaps <= len(BALLAST) / 2 * seconds / RESIDENCY_SECONDS
        assert watch.most_held <= 1.1 * BUDGET * MEGA
        assert all(math.isclose(ratio, 1.0, rel_tol=0.1) for ratio in ratios.values()), ratios
        if prove:
            third = len(watch.server) // 3
            early, late = max(watch.server[third : 2 * third]), max(watch.server[2 * third :])
            print(f"server {early // MEGA} MB, then {late // MEGA} MB")
            assert late <= 1.05 * early
        family = server.family()
        assert await server.stop() == 0
        await eventually(lambda: not any(lives(process) for process in family), what="the end of every process")
