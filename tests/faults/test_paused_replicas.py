"""A replica that stands still for batch work's sake: nothing counts that time, and whatever needs the engine wakes it."""

import asyncio
import json
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from forebay.app import Machine
from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.dialects.openai.call import Call, Context, parse
from forebay.dialects.openai.chat import ChatBody, chat_call
from forebay.errors import EngineCrashed, EngineTimeout, ForebayError
from forebay.inference import Priority
from forebay.model_config import FakeModel, OpencvModel
from forebay.replicas.connection import EngineStream
from forebay.replicas.replica import Replica
from forebay.scheduler.gather import gather
from forebay.server_config import PaceSettings, SupervisorSettings
from forebay.telemetry import Metrics
from tests.support.processes import lives
from tests.support.server import chat_body, eventually

STALL_SECONDS = 1.0
TIMEOUT_SECONDS = 3.0
SILENT_SECONDS = 1.0  # after so long an engine may have hung
LINE = "[[fake tokens=60 token_ms=10]]"
ENDLESS = "[[fake tokens=100000 token_ms=10]]"


@dataclass(slots=True)
class Line:
    """Batch work that has begun."""

    running: "asyncio.Task[bytes]"
    replica: Replica


@dataclass(slots=True)
class Hall:
    """A machine room whose models are up, with the scheduler in front of it."""

    machine: Machine
    metrics: Metrics

    @property
    def replica(self) -> Replica:
        (found,) = self.machine.supervisor.replicas("fake")
        return found

    async def ask(
        self,
        text: str,
        priority: Priority,
        begun: asyncio.Event | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> bytes:
        """The whole answer."""
        wanted, scheduler = _call(text, priority), self.machine.scheduler
        admit = scheduler.admit_when_room if priority is Priority.BATCH else scheduler.admit
        limits = {"timeout_seconds": timeout_seconds, "stall_seconds": STALL_SECONDS}
        async with admit(wanted.request) as permit:
            on_first = (begun or asyncio.Event()).set
            return (await gather(permit, wanted, **limits, clock=SystemClock(), on_first=on_first)).body

    async def begin(self, text: str) -> Line:
        """Batch work whose engine has begun to answer."""
        begun = asyncio.Event()
        running = asyncio.create_task(self.ask(text, Priority.BATCH, begun))
        await asyncio.wait([running, asyncio.create_task(begun.wait())], return_when=asyncio.FIRST_COMPLETED)
        return Line(running, self.replica)

    async def paused(self, text: str) -> Line:
        """Batch work on an engine that stands still."""
        line = await self.begin(text)
        assert line.replica.pausable
        line.replica.pause()
        assert line.replica.paused
        await eventually(lambda: _still(line.replica), what="the pause")
        return line


def _call(text: str, priority: Priority) -> Call:
    context = Context("req_test", "default", None, max_tokens=200_000, slots=4)
    made = chat_call(parse(ChatBody, json.dumps(chat_body(text)).encode()), context)
    return replace(made, request=replace(made.request, priority=priority))


def _family(replica: Replica) -> list[psutil.Process]:
    assert replica.process is not None
    return list(psutil.Process(replica.process.pid).children(recursive=True))


def _still(replica: Replica) -> bool:
    return {each.status() for each in _family(replica)} == {psutil.STATUS_STOPPED}


@asynccontextmanager
async def _hall(tmp_path: Path, stall_seconds: float = STALL_SECONDS) -> AsyncIterator[Hall]:
    models = {"fake": FakeModel(engine="fake", slots=4), "telea": OpencvModel(engine="opencv")}
    limits = SupervisorSettings(stall_seconds=stall_seconds, cancel_grace_seconds=5, backoff_seconds_min=0.05)
    nobody = PaceSettings(enabled=False)  # who would pause them and wake them by himself
    settings = Settings(data_dir=tmp_path, default_models=False, models=models, supervisor=limits, pace=nobody)
    metrics = Metrics()
    machine = Machine(settings, dict(os.environ), SystemClock(), metrics)
    supervising = asyncio.create_task(machine.supervisor.run())
    try:
        await machine.supervisor.wait_until_ready("fake")
        yield Hall(machine, metrics)
    finally:
        supervising.cancel()
        with suppress(asyncio.CancelledError):
            await supervising


@pytest.fixture
async def hall(tmp_path: Path) -> AsyncIterator[Hall]:
    async with _hall(tmp_path) as found:
        yield found


def _deaths(hall: Hall) -> float:
    return sum(sample.value for sample in next(iter(hall.metrics.engine_deaths.collect())).samples)


async def test_a_pause_longer_than_every_limit_ends_nobody(hall: Hall) -> None:
    wanted = await hall.ask(LINE, Priority.BATCH)
    line = await hall.paused(LINE)
    before = line.replica.paused_seconds
    await eventually(lambda: line.replica.paused_seconds - before > TIMEOUT_SECONDS * 1.1, what="a long pause")
    assert not line.running.done()
    line.replica.resume()
    assert _said(await line.running) == _said(wanted)
    assert hall.replica is line.replica
    assert not line.replica.paused
    await eventually(lambda: line.replica.pauses.limits == 0, what="the end of every limit; a probe has one, too")
    assert _deaths(hall) == 0


def _said(body: bytes) -> str:
    return str(json.loads(body)["choices"][0]["message"]["content"])


async def test_limits_count_again_after_a_pause(hall: Hall) -> None:
    line = await hall.paused("[[fake tokens=60 token_ms=10 hang_at=20]]")
    line.replica.resume()
    with pytest.raises(EngineTimeout):
        await line.running


async def test_what_is_cancelled_in_a_pause_gives_its_place_back_in_time(hall: Hall) -> None:
    other = await hall.begin(ENDLESS)
    line = await hall.paused(ENDLESS)
    line.running.cancel()
    await asyncio.wait([line.running])
    assert not line.replica.paused
    await eventually(lambda: len(line.replica.in_flight) == 1, within_seconds=4, what="the place")
    assert line.replica.ready, "it stopped within the grace period"
    await eventually(lambda: line.replica.pausable, what="the end of the stop")
    assert not other.running.done()
    other.running.cancel()
    await eventually(lambda: line.replica.idle.is_set(), within_seconds=4, what="the other place")


async def test_a_pause_is_no_silence(hall: Hall) -> None:
    line = await hall.paused(ENDLESS)
    before = line.replica.paused_seconds
    await eventually(lambda: line.replica.paused_seconds - before > SILENT_SECONDS * 1.1, what="a long pause")
    line.running.cancel()
    await asyncio.wait([line.running])
    assert not line.replica.doubtful
    await eventually(lambda: line.replica.idle.is_set(), within_seconds=4, what="the place")


async def test_silence_counts_on_both_sides_of_a_pause(hall: Hall) -> None:
    async def read_all(stream: EngineStream) -> None:
        while await stream.read():
            pass

    replica, request = hall.replica, _call("[[fake tokens=60 token_ms=10 hang_at=5]]", Priority.BATCH).request
    async with replica.run(request, 5.0, lambda _replica: None, lambda: None) as stream:
        reading = asyncio.create_task(read_all(stream))
        await eventually(lambda: stream.silent_seconds > SILENT_SECONDS / 2, what="a hang")
        replica.pause()
        silent = stream.silent_seconds
        await eventually(lambda: replica.paused_seconds > SILENT_SECONDS, what="a long pause")
        assert stream.silent_seconds == pytest.approx(silent, abs=0.01)
        replica.resume()
        await eventually(lambda: stream.silent_seconds >= SILENT_SECONDS, what="a long silence")
        reading.cancel()
    assert replica.doubtful
    await eventually(lambda: replica.idle.is_set(), within_seconds=6, what="the place")
    assert not replica.doubtful


async def test_an_engine_that_hangs_is_found_however_often_it_stands_still(hall: Hall) -> None:
    running = asyncio.create_task(hall.ask("[[fake block_at=0]]", Priority.BATCH, timeout_seconds=3600))
    replica, began = hall.replica, time.monotonic()
    await eventually(lambda: replica.in_flight, what="the line on its engine")

    def told() -> bool:
        """Whether it was found; until then it stands still and goes on all the time."""
        if replica.paused:
            replica.resume()
        elif replica.pausable:
            replica.pause()
        return _deaths(hall) > 0

    await eventually(told, within_seconds=20 * STALL_SECONDS, what="a death of the frozen engine")
    with pytest.raises(ForebayError):
        await running
    stood = replica.paused_seconds
    print(f"found after {time.monotonic() - began:.1f} s, {stood:.1f} s of which it stood still")


async def test_a_sound_engine_that_stands_still_most_of_the_time_is_not_blamed(hall: Hall) -> None:
    line = await hall.begin(ENDLESS)
    replica, began = line.replica, time.monotonic()
    turns = 0

    def enough() -> bool:
        nonlocal turns
        turns += 1
        if turns % 10 == 0:
            replica.resume()
        elif not replica.paused:
            replica.pause()
        return time.monotonic() - began > 4 * STALL_SECONDS

    await eventually(enough, within_seconds=5 * STALL_SECONDS, what="several times the limit")
    assert replica.paused_seconds > 2 * STALL_SECONDS
    assert _deaths(hall) == 0
    line.running.cancel()
    await asyncio.wait([line.running])


async def test_it_may_stand_still_again_as_soon_as_a_stop_is_over(hall: Hall) -> None:
    line = await hall.paused(ENDLESS)
    seen: list[bool] = []

    def refused(_replica: Replica) -> None:
        raise AssertionError("it did not stop")

    request = _call(ENDLESS, Priority.BATCH).request
    line.replica.resume()
    async with line.replica.run(request, 5.0, refused, lambda: seen.append(line.replica.pausable)) as stream:
        assert await stream.read()
    assert not line.replica.pausable
    await eventually(lambda: seen == [True], what="the end of the stop")
    line.running.cancel()
    await asyncio.wait([line.running])


async def test_it_stands_still_for_batch_work_alone(hall: Hall) -> None:
    line = await hall.paused(ENDLESS)
    online = asyncio.create_task(hall.ask(LINE, Priority.DEFAULT))
    await eventually(lambda: len(line.replica.in_flight) == 2, what="the online request")
    assert not line.replica.paused
    line.replica.pause()
    assert not line.replica.paused, "an online request is in flight"
    assert _said(await online)
    line.replica.pause()
    assert line.replica.paused
    line.running.cancel()
    await asyncio.wait([line.running])


async def test_an_engine_that_dies_in_a_pause_is_replaced(hall: Hall) -> None:
    line = await hall.paused(LINE)
    for each in _family(line.replica):
        each.kill()
    with pytest.raises(EngineCrashed):
        await line.running
    await eventually(lambda: hall.machine.supervisor.replicas("fake"), what="another engine")
    assert hall.replica is not line.replica
    assert not hall.replica.paused
    assert not line.replica.paused
    line.replica.pause()
    assert not line.replica.paused, "it is dead"
    assert _said(await hall.ask(LINE, Priority.BATCH))


@pytest.mark.parametrize("order", ["restart", "unload"])
async def test_an_engine_that_is_to_leave_wakes_and_finishes_first(hall: Hall, order: str) -> None:
    line = await hall.paused(LINE)
    getattr(hall.machine.supervisor, order)("fake")
    await eventually(lambda: not line.replica.paused, what="the end of the pause")
    assert _said(await line.running)
    await asyncio.wait([line.replica.death])
    assert _deaths(hall) == 0


async def test_a_closing_server_asks_a_paused_engine_to_end(tmp_path: Path) -> None:
    async with _hall(tmp_path) as hall:
        line = await hall.paused(ENDLESS)
        family = _family(line.replica)
    assert not any(lives(each) for each in family)
    assert line.replica.death.result().exit_code == 0, "it was asked, and did not have to be killed"
    await asyncio.wait([line.running])


async def test_figures_do_not_wait_for_a_paused_engine(hall: Hall) -> None:
    supervisor = hall.machine.supervisor
    await supervisor.wait_until_ready("telea")
    (replica,) = supervisor.replicas("telea")
    assert b"forebay_engine_" in await supervisor.engine_figures()
    replica.pause()
    assert await supervisor.engine_figures() == b""
    replica.resume()
    assert b"forebay_engine_" in await supervisor.engine_figures()


SERVER = """
import asyncio, os, sys
import psutil, uvloop
from forebay.model_config import FakeModel
from forebay.replicas.commands import command_for
from forebay.replicas.local_launcher import LocalLauncher

async def main():
    launcher = LocalLauncher(os.environ, 10, 1000)
    command = command_for("fake", FakeModel(engine="fake"), 1, None, "key", 0)
    process = await launcher.launch(command, lambda line: None)
    await process.address()
    process.pause()
    family = [process.pid, *(each.pid for each in psutil.Process(process.pid).children(recursive=True))]
    while psutil.Process(family[-1]).status() != psutil.STATUS_STOPPED:
        await asyncio.sleep(0.01)
    print(*family, flush=True)
    await process.wait()

uvloop.run(main())
"""


async def test_kill_9_of_the_server_leaves_nothing_of_a_paused_engine() -> None:
    server = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, stdout=PIPE)
    assert server.stdout is not None
    said = await server.stdout.readline()
    family = [psutil.Process(int(pid)) for pid in said.split()]
    assert len(family) == 2
    server.send_signal(signal.SIGKILL)
    await server.wait()
    await eventually(lambda: not any(lives(each) for each in family), what="the end of the family")
