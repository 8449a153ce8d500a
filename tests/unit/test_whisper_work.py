"""What waits for the compute process of the whisper engine, which is played here: nobody is kept longer than a step."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from forebay.engines import whisper_child, whisper_work
from forebay.engines.whisper_chunks import Chunk
from forebay.engines.whisper_options import Model, Options, Request
from forebay.engines.whisper_work import Listener, Work
from tests.support.cancels import cancel_twice
from tests.support.server import eventually

PCM = np.zeros(16_000, dtype=np.int16)
REQUEST = Request("transcribe", "en", words=False, last=True, options=Options(), samples=PCM.data)


class Child:
    """Answers a step when it may, with nothing in any of its chunks."""

    def __init__(self) -> None:
        self.model = Model(multilingual=True, languages=("en",), tokens=448)
        self.killed = False
        self.asked = 0
        self.gate = asyncio.Event()

    async def ask(self, head: Mapping[str, Any], data: bytes = b"") -> dict[str, Any]:
        self.asked += 1
        await self.gate.wait()
        done = {"next": "done", "segments": [], "rest": None}
        return {"seconds": 0.0, "chunks": [done for _ in head["chunks"]]}

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
async def child(monkeypatch: pytest.MonkeyPatch) -> Child:
    child = Child()

    async def start(*_: object) -> Child:
        return child

    monkeypatch.setattr(whisper_child, "start", start)
    return child


@pytest.fixture
async def work(child: Child) -> AsyncIterator[Work]:
    made = Work({}, chunks_at_once=4, encode_at_once=4, cooldown_seconds=60.0, hung_seconds=60.0)
    await made.start()
    yield made
    for each in (made._worker, made._teller):
        each.remove_done_callback(whisper_work._die)
        each.cancel()
        with suppress(asyncio.CancelledError):
            await each


async def test_who_is_cancelled_twice_is_kept_no_longer_than_the_step(work: Work, child: Child) -> None:
    chunks = [Chunk(((0, len(PCM)),))]
    task = asyncio.create_task(work.run(REQUEST, PCM, chunks, Listener()))
    await eventually(lambda: child.asked >= 1)
    await cancel_twice(task)
    child.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work._jobs == {}
    assert (work.waiting, work.figures.cancelled) == (0, 1)
    await work.run(REQUEST, PCM, chunks, Listener())
    assert child.asked == 2
