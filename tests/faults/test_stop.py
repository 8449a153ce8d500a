"""How a server ends: asked to, told to, or killed; while it serves or while it still loads."""

import asyncio
import os
import signal
from functools import partial
from pathlib import Path
from time import monotonic

import aiohttp
import psutil
import pytest

from tests.faults.test_engine_death import begin
from tests.support.answers import ask
from tests.support.models import smollm2_path
from tests.support.processes import lives
from tests.support.server import Server, eventually, serving

JSON_LOG = {"FOREBAY_LOG_FORMAT": "json"}
CONFIG = """
default_models = false
drain_seconds = {drain}
[models.fake]
engine = "fake"
preload = true
slots = 2
[models.other]
engine = "fake"
preload = true
"""


def _gone(processes: list[psutil.Process]) -> bool:
    return not any(map(lives, processes))


async def _end(server: Server, number: int, within_seconds: float) -> float:
    """Send a signal, wait for a clean end, and check that nothing is left; how long it took."""
    family = server.family()
    began = monotonic()
    assert await server.stop(number, within_seconds) == 0
    took = monotonic() - began
    assert [one for one in family if lives(one)] == []
    assert "Traceback" not in server.log
    assert server.named("server.stopped")
    return took


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stream_that_outlasts_the_drain_ends_with_an_error(number: signal.Signals) -> None:
    async with serving(CONFIG.format(drain=1), environment=JSON_LOG) as server:
        streams = [(await begin(server, f"{each} [[fake tokens=3000 token_ms=10]]"))[0] for each in range(2)]
        waiting = asyncio.create_task(ask(server, "Wait."))
        whole = asyncio.create_task(ask(server, "[[fake delay_ms=30000]]", model="other", stream=False))
        await server.until_load(2, 1)
        await server.until_load(1, 0, "other")
        ending = asyncio.create_task(_end(server, number, 30))
        dismissed = await waiting
        assert (dismissed.status, dismissed.code) == (503, "shutting_down")
        for stream in await asyncio.gather(*streams):
            assert (stream.code, stream.done) == ("shutting_down", False)
        cut = await whole
        assert (cut.status, cut.code) == (503, "shutting_down")
        took = await ending
        print(f"{number.name} with running streams and a drain of 1 s: gone after {took:.2f} s")
        assert took < 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stream_that_fits_into_the_drain_is_finished(number: signal.Signals) -> None:
    async with serving(CONFIG.format(drain=20), environment=JSON_LOG) as server:
        stream, _ = await begin(server, "[[fake tokens=150 token_ms=10]]")
        whole = asyncio.create_task(ask(server, "[[fake delay_ms=1500]]", stream=False))
        await server.until_load(2, 0)
        ending = asyncio.create_task(_end(server, number, 30))
        await eventually(lambda: server.named("server.stopping"), what="the drain")
        await eventually(lambda: _refuses(server), what="the end of accepting")
        answer = await stream
        assert answer.whole
        assert answer.tokens == 150
        assert (await whole).whole
        took = await ending
        print(f"{number.name} with a stream that has 1.5 s to go: gone after {took:.2f} s")
        assert took < 5


async def _refuses(server: Server) -> bool:
    async with aiohttp.ClientSession() as session:
        try:
            async with session.get(server.url + "/health"):
                return False
        except aiohttp.ClientConnectorError:
            return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_idle_server_ends_at_once(number: signal.Signals) -> None:
    async with serving(CONFIG.format(drain=20), environment=JSON_LOG) as server:
        took = await _end(server, number, 30)
        print(f"{number.name} while idle: gone after {took:.2f} s")
        assert took < 5


async def test_a_hung_engine_does_not_hold_up_the_end() -> None:
    async with serving(CONFIG.format(drain=1), environment=JSON_LOG) as server:
        stream, _ = await begin(server, "[[fake tokens=3000 token_ms=10]]")
        psutil.Process(server.engine_pid()).suspend()
        psutil.Process(server.engine_pid("other")).suspend()
        took = await _end(server, signal.SIGTERM, 30)
        assert (await stream).code == "shutting_down"
        print(f"SIGTERM with stopped engines: gone after {took:.2f} s")
        assert took < 15


async def test_a_hung_guard_does_not_hold_up_the_end() -> None:
    async with serving(CONFIG.format(drain=1), environment=JSON_LOG) as server:
        psutil.Process(server.guard_pid()).suspend()
        psutil.Process(server.engine_pid()).suspend()
        took = await _end(server, signal.SIGTERM, 30)
        print(f"SIGTERM with a stopped guard: gone after {took:.2f} s")
        assert took < 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_server_that_still_loads_ends_at_once(number: signal.Signals) -> None:
    config = CONFIG.format(drain=20) + "options.start_delay_seconds = 30\n"
    async with serving(config, environment=JSON_LOG, wait=False) as server:
        await eventually(lambda: server.named("engine.starting", model="other"), what="the start of an engine")
        await eventually(lambda: len(server.engine_pids()) == 2, what="both engines")
        took = await _end(server, number, 10)
        print(f"{number.name} while a model loads: gone after {took:.2f} s")
        assert took < 5


async def test_ctrl_c_while_llama_cpp_loads() -> None:
    config = f"""
default_models = false
[models.small]
engine = "llama.cpp"
source = "file:{smollm2_path()}"
preload = true
"""
    async with serving(config, environment=JSON_LOG, wait=False) as server:
        await eventually(lambda: server.engine_pids(), what="the engine")
        took = await _end(server, signal.SIGINT, 10)
        print(f"SIGINT while llama.cpp loads: gone after {took:.2f} s")
        assert took < 5


async def test_kill_9_of_the_server_leaves_nothing_behind(prove: bool) -> None:
    times = []
    for _ in range(20 if prove else 2):
        async with serving(CONFIG.format(drain=20), environment=JSON_LOG) as server:
            stream, _ = await begin(server, "[[fake tokens=3000 token_ms=10]]")
            family = server.family()
            assert len(family) == 4  # two guards, two engines
            psutil.Process(server.engine_pid("other")).suspend()
            killed_at = monotonic()
            os.kill(server.pid, signal.SIGKILL)
            await eventually(partial(_gone, family), within_seconds=4, what="the end of every engine")
            times.append(monotonic() - killed_at)
            with pytest.raises(aiohttp.ClientError):
                await stream
    print(f"kill -9 of the server: everything was gone after {max(times):.2f} s")
    assert max(times) < 4


async def test_kill_9_while_engines_start_leaves_nothing_behind(tmp_path: Path) -> None:
    config = CONFIG.format(drain=20) + "options.start_delay_seconds = 30\n"
    async with serving(config, folder=tmp_path, environment=JSON_LOG, wait=False) as server:
        await eventually(lambda: len(server.engine_pids()) == 2, what="both engines")
        family = server.family()
        os.kill(server.pid, signal.SIGKILL)
        await eventually(partial(_gone, family), within_seconds=4, what="the end of every engine")
