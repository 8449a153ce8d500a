"""Work that outlives whoever asked for it."""

import asyncio
import gc
from pathlib import Path
from typing import Any

import pytest

from forebay.blobs.local import LocalBlobs
from forebay.blobs.shielded import shielded
from forebay.errors import NotFound


async def test_a_cancel_ends_the_waiting_and_not_the_work() -> None:
    begun, go_on, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await go_on.wait()
        done.set()

    waiting = asyncio.create_task(shielded(work()))
    await begun.wait()
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    go_on.set()
    await asyncio.wait_for(done.wait(), 5)


async def test_what_goes_wrong_reaches_whoever_still_waits(tmp_path: Path) -> None:
    async def fail() -> None:
        raise ValueError("so")

    with pytest.raises(ValueError, match="so"):
        await shielded(fail())
    with pytest.raises(NotFound):
        await LocalBlobs(tmp_path, 0).read("nothing/here")


async def test_what_goes_wrong_after_he_has_left_is_not_complained_of(tmp_path: Path) -> None:
    complaints: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: complaints.append(context))
    before = asyncio.all_tasks()
    reading = asyncio.create_task(LocalBlobs(tmp_path, 0).read("nothing/here"))
    while not (working := asyncio.all_tasks() - before - {reading}):
        await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait([reading, *working])
    assert reading.cancelled()
    assert ["exception=FileNotFoundError" in repr(one) for one in working] == [True]  # looked at, but not retrieved
    del reading, working
    gc.collect()
    assert complaints == []
