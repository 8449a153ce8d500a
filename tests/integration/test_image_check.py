"""The program that looks at images, as the server runs it: what it costs, and what becomes of it when something goes wrong."""

import asyncio
import base64
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from random import Random
from typing import Any

import psutil
import pytest
import uvloop
from PIL import Image

from forebay.clock import SystemClock
from forebay.config import MediaSettings
from forebay.errors import CallerError, ServerError
from forebay.media.checker import Checker
from tests.support.images import data_url, encoded, message, part, picture, png
from tests.support.processes import command_line, lives
from tests.support.server import FAKE, eventually, serving

MIB = 2**20
PROGRAM = "forebay.engines.image_check"
SEES = f"{FAKE}\n[models.fake.options]\nvision = true\n"
FENCED = """
import os, socket, sys
from forebay.engines import fence
fence.close(fence.Cost(512 * 2**20, 5), None)
reached = []
for name, attempt in {
    "file": lambda: open("/etc/hostname"),
    "socket": lambda: socket.socket(),
    "memory": lambda: bytearray(2**30),
}.items():
    try:
        attempt()
        reached.append(name)
    except (OSError, MemoryError):
        pass
print(reached)
"""


@pytest.fixture
async def made() -> AsyncIterator[Any]:
    """Makes checkers with further settings."""
    checkers = []

    def make(**settings: Any) -> Checker:
        checkers.append(Checker(MediaSettings(**settings), SystemClock()))
        return checkers[-1]

    yield make
    for checker in checkers:
        await checker.close()


def programs(pid: int | None = None) -> list[psutil.Process]:
    """Those that run below a process, this one unless another is named."""
    return [each for each in psutil.Process(pid).children() if PROGRAM in command_line(each)]


def _gone(program: psutil.Process) -> bool:
    return not lives(program)


async def check(checker: Checker, data: bytes) -> str:
    return await checker.check(data, declared=None, in_base64=False, low=False)


async def refusal(checker: Checker, data: bytes) -> str:
    with pytest.raises(CallerError) as refused:
        await check(checker, data)
    return refused.value.code


def test_whoever_decodes_opens_no_file_and_no_socket_and_has_little_memory() -> None:
    ended = subprocess.run([sys.executable, "-c", FENCED], check=True, capture_output=True, text=True)
    assert ended.stdout.strip() == "[]"


async def test_an_image_that_needs_too_much_memory_is_too_large(made: Any) -> None:
    checker = made(check_memory_bytes_max=128 * MIB)
    assert await refusal(checker, png(6300, 6300)) == "media_too_large"
    assert (await check(checker, picture())).startswith("data:image/png;base64,")


async def test_an_image_that_needs_too_much_time_is_too_large(made: Any) -> None:
    checker = made(check_seconds_max=1, check_memory_bytes_max=8 * 2**30, pixels_max=2**30)
    assert await refusal(checker, png(20_000, 20_000)) == "media_too_large"
    assert (await check(checker, picture())).startswith("data:image/png;base64,")


async def test_a_program_that_dies_is_replaced_once_for_each_image(made: Any) -> None:
    checker = made()
    await check(checker, picture())
    (first,) = programs()
    first.send_signal(signal.SIGSTOP)
    waiting = asyncio.create_task(check(checker, picture()))
    await asyncio.sleep(0)  # it has begun
    first.kill()
    assert await waiting
    (second,) = checker._programs.idle
    second._process.send_signal(signal.SIGSTOP)
    waiting = asyncio.create_task(check(checker, picture()))
    await asyncio.sleep(0)
    start = checker._programs._start

    async def stopped() -> Any:
        program = await start()
        program._process.send_signal(signal.SIGSTOP)
        return program

    checker._programs._start = stopped
    second.kill()
    third = await eventually(
        lambda: [each for each in checker._programs.busy if each is not second], what="another program"
    )
    third[0].kill()
    with pytest.raises(ServerError):
        await waiting
    checker._programs._start = start
    assert await check(checker, picture())


async def test_a_program_that_died_while_it_had_nothing_to_do_is_not_noticed(made: Any) -> None:
    checker = made()
    await check(checker, picture())
    (program,) = programs()
    program.kill()
    await eventually(partial(_gone, program), what="the end of the program")
    assert await check(checker, picture())


def test_a_program_whose_end_is_not_told_yet_is_not_asked() -> None:
    async def ask() -> None:
        checker = Checker(MediaSettings(), SystemClock())
        try:
            await check(checker, picture())
            (program,) = checker._programs.idle
            assert program._process.stdin is not None
            program._process.stdin.close()
            with pytest.raises(OSError):
                await program.ask(b"{}", b"")
            assert not program.lives
            assert await check(checker, picture())
        finally:
            await checker.close()

    uvloop.run(ask())  # the loop of the server, where a write to a closed pipe is a RuntimeError


async def test_whoever_gives_up_leaves_no_answer_for_the_next(made: Any) -> None:
    checker = made(checks_at_once=1)
    plain = await check(checker, picture())
    (program,) = programs()
    program.send_signal(signal.SIGSTOP)
    waiting = asyncio.create_task(check(checker, picture(colour="blue")))
    await asyncio.sleep(0)  # it has begun
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await check(checker, picture()) == plain


async def test_many_at_once_share_few_programs(made: Any) -> None:
    checker = made(checks_at_once=2)
    sizes = [(10 + number, 20) for number in range(40)]
    found = await asyncio.gather(*(check(checker, picture(*size)) for size in sizes))
    assert len(set(found)) == len(sizes)
    assert len(programs()) <= 2


async def test_base64_that_is_none_is_not_called_a_damaged_image(made: Any) -> None:
    checker, plain = made(), base64.b64encode(picture())
    for wrong in (plain[:76] + b"\n" + plain[76:], plain.rstrip(b"="), plain + b"%3D", b" " + plain, plain + b"="):
        with pytest.raises(CallerError, match="base64 is not valid") as refused:
            await checker.check(wrong, declared="png", in_base64=True, low=False)
        assert refused.value.code == "media_invalid"
    assert await checker.check(plain, declared="png", in_base64=True, low=False)


async def test_a_transparent_image_is_on_white_and_16_bits_are_8(made: Any) -> None:
    checker = made()
    white = await check(checker, picture(8, 8, "white"))
    assert await check(checker, encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))) == white
    assert await check(checker, encoded(Image.new("I;16", (8, 8), 65_535))) == white
    assert await check(checker, encoded(Image.new("LA", (8, 8), (0, 0)))) == white


async def test_whatever_was_done_to_an_image_it_is_a_picture_or_a_refusal(made: Any, prove: bool) -> None:
    checker, chance = made(), Random(5)
    speckled = Image.frombytes("RGB", (60, 40), chance.randbytes(60 * 40 * 3))
    whole = [encoded(speckled, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF")]
    refused = 0
    for number in range(4000 if prove else 200):
        data = bytearray(whole[number % 4])
        for _ in range(chance.randrange(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if number % 3 == 0:
            del data[chance.randrange(len(data)) :]
        try:
            assert (await check(checker, bytes(data))).startswith("data:image/")
        except CallerError as error:
            assert error.code in {"media_invalid", "media_too_large"}
            refused += 1
    assert refused > 50
    assert len(programs()) == 1, "and the program has lived through all of it"


async def test_the_programs_end_with_the_server() -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        async with serving(SEES) as server:
            body = {"model": "fake", "messages": [message([part(data_url(picture()))])]}
            async with await server.send(body) as response:
                assert response.status == 200
            (program,) = programs(server.pid)
            await server.stop(number)
            await eventually(partial(_gone, program), what="the end of the program")
            assert "Traceback" not in server.log
