"""A server that is killed while images are worked on: no program and no child of one works on for nobody."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import aiohttp
import psutil
import pytest

from tests.support.images import data_url, message, part, png
from tests.support.picture_requests import send
from tests.support.processes import GONE, lives, programs
from tests.support.server import FAKE, Server, eventually, serving

CONFIG = f"""{FAKE}
[models.fake.options]
vision = true
[media]
pixels_max = 100_000_000
[images]
pixels_max = 100_000_000
"""
SLOW = png(9000, 9000)  # to find its child at work before it is done
LEFT_ALONE = """
import os, signal, sys
from forebay.engines import fence
class Late:
    def prctl(self, *_):
        os.kill(os.getpid(), signal.SIGSTOP)  # until the program has gone
print(fence.fork(lambda _: os.remove(sys.argv[1]), fence.Cost(2**40, 5), Late())[0], flush=True)
sys.stdin.read()
"""

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel"), pytest.mark.timeout(120)]


def test_a_program_whose_server_ended_before_it_could_be_told_ends() -> None:
    begin = f"import sys; from forebay.engines import fence; fence.begin({os.getppid()}); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", begin], stdin=subprocess.PIPE) as program:
        try:
            assert program.wait(30) == 0
        finally:
            program.kill()


def left_alone(file: Path) -> psutil.Process:
    """A child that would remove the file; its program ended before the kernel knew that it is to end with that."""
    with subprocess.Popen(
        [sys.executable, "-c", LEFT_ALONE, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as program:
        assert program.stdout is not None
        child = psutil.Process(int(program.stdout.readline()))
        program.kill()
    return child


async def test_a_child_whose_program_ended_before_it_could_be_told_looks_at_nothing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    child = left_alone(file)

    def gone() -> bool:
        with suppress(*GONE):
            child.resume()
        return not lives(child)

    await eventually(gone, what="the end of the child")
    assert file.exists()


async def checked(server: Server) -> None:
    body = {"model": "fake", "messages": [message([part(data_url(SLOW))])]}
    async with await server.send(body) as response:
        await response.read()


async def edited(server: Server) -> None:
    await send(server, ("image", SLOW))


def at_work(server: Server, module: str) -> list[psutil.Process]:
    """A program of the server and its child, once that one is fenced in."""
    found = programs(module, psutil.Process(server.pid))
    with suppress(*GONE):
        if any(each.ppid() != server.pid and each.rlimit(psutil.RLIMIT_NOFILE) == (0, 0) for each in found):
            return found
    return []


@pytest.mark.parametrize(
    ("module", "ask"), [("forebay.engines.image_check", checked), ("forebay.engines.image_work", edited)]
)
async def test_nobody_outlives_a_server_that_is_killed(module: str, ask: Callable[[Server], Awaitable[None]]) -> None:
    async with serving(CONFIG) as server:
        asking = asyncio.ensure_future(ask(server))

        def child_at_work() -> list[psutil.Process]:
            nonlocal asking
            if asking.done():  # nobody looked while the child lived
                asking = asyncio.ensure_future(ask(server))
            return at_work(server, module)

        working: list[psutil.Process] = await eventually(child_at_work, what="a child at work")
        try:
            for each in working:
                if each.ppid() != server.pid:
                    each.suspend()  # or it may be done in time by itself
            server.process.kill()
            await eventually(lambda: not any(map(lives, working)), within_seconds=2, what="the end of all of them")
        finally:
            for each in working:
                with suppress(*GONE):
                    each.kill()
            with suppress(aiohttp.ClientError):
                await asking
