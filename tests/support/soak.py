"""Work of every kind at a steady pace, each caller tidying up after himself, and what a server holds meanwhile."""

import asyncio
import itertools
import sqlite3
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import psutil

from tests.support import picture_jobs, transcriptions
from tests.support.batches import content, create, jsonl, line, upload
from tests.support.items import embed, rerank
from tests.support.jobs import result
from tests.support.picture_requests import edited
from tests.support.processes import GONE
from tests.support.receiver import Receiver, receiving
from tests.support.server import Server, eventually

NETWORK = "127.0.0.2"  # where the receiver of the webhooks is
LINES = 8
SECONDS_OF_SPEECH = 4
_LOOK_SECONDS = 1.0
_TOLD_SECONDS = 60.0
_SLICES = 5


@dataclass(frozen=True, slots=True)
class Timed:
    """One piece of work: when it was begun, and how long it took."""

    at: float
    seconds: float


@dataclass(slots=True)
class Seen:
    """All that was done, by kind, and all that was looked at, by what it is; a look is a moment and a number."""

    begun: float = 0.0
    ended: float = 0.0
    done: dict[str, list[Timed]] = field(default_factory=dict)
    looks: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def quarters(self, what: str) -> tuple[float, float]:
        """The least that was seen in the third and in the fourth quarter of the time.

        What is under way comes and goes with the moment of a look; what is left behind is there at every one.
        """
        found = [[value for at, value in self.looks[what] if begin <= at < end] for begin, end in self._halves()]
        return min(found[0]), min(found[1])

    def slowest(self, kind: str, share: float = 0.99) -> tuple[float, float]:
        """Below which seconds a share of this kind stays, in the third and in the fourth quarter of the time.

        Each quarter is cut into slices, and the median of theirs counts: one moment of a busy machine moves one slice.
        """
        found = [self._slices(self.done[kind], begin, end, share) for begin, end in self._halves()]
        return statistics.median(found[0]), statistics.median(found[1])

    def _halves(self) -> list[tuple[float, float]]:
        middle, quarter = (self.begun + self.ended) / 2, (self.ended - self.begun) / 4
        return [(middle, middle + quarter), (middle + quarter, self.ended)]

    @staticmethod
    def _slices(done: list[Timed], begin: float, end: float, share: float) -> list[float]:
        length, found = (end - begin) / _SLICES, []
        for number in range(_SLICES):
            border = begin + number * length
            inside = sorted(each.seconds for each in done if border <= each.at < border + length)
            found += [inside[min(len(inside) - 1, int(len(inside) * share))]] if inside else []
        return found


class Callers:
    """Those who ask `server`, each for one kind of work, and hear of the end of what is done in the background."""

    def __init__(self, server: Server, receiver: Receiver) -> None:
        self._server = server
        self._receiver = receiver
        self._read = 0
        self._told: set[str] = set()
        self._number = itertools.count()
        self._speech = transcriptions.speech(SECONDS_OF_SPEECH)

    def every(self) -> dict[str, tuple[Callable[[], Awaitable[None]], float]]:
        """What each kind of caller does, and how many seconds after the last beginning he does it again."""
        return {
            "chat": (self._chat, 0.4),
            "embeddings": (self._embeddings, 0.4),
            "rerank": (self._rerank, 0.6),
            "speech": (self._transcription, 1.0),
            "images": (self._image, 1.5),
            "batch": (self._batch, 2.0),
            "speech in the background": (self._transcription_job, 3.0),
            "images in the background": (self._image_job, 3.0),
        }

    async def _chat(self) -> None:
        text = f"{next(self._number)} [[fake tokens=20 token_ms=10]]"
        async with await self._server.chat(text, stream=True) as response:
            assert response.status == 200, await response.text()
            assert (await response.read()).endswith(b"data: [DONE]\n\n")

    async def _embeddings(self) -> None:
        await embed(self._server, [f"{next(self._number)} [[fake delay_ms=150]]"])

    async def _rerank(self) -> None:
        number = next(self._number)
        await rerank(self._server, f"{number} [[fake delay_ms=150]]", [f"first {number}", f"second {number}"])

    async def _transcription(self) -> None:
        status, body, _ = await transcriptions.post(self._server, self._speech, background=False)
        assert status == 200, body

    async def _image(self) -> None:
        found = await edited(self._server, model="opencv", response_format="b64_json")
        assert found["data"][0]["b64_json"]

    async def _batch(self) -> None:
        number = next(self._number)
        lines = jsonl(
            line(f"{number}-{each}", f"{number} {each} [[fake tokens=4 token_ms=5]]") for each in range(LINES)
        )
        file = await upload(self._server, lines)
        status, batch = await create(self._server, file["id"], webhook_url=self._receiver.url)
        assert status == 200, batch
        await self._until_told(batch["id"])
        ended = await self._server.get(f"/v1/batches/{batch['id']}")
        assert (ended["status"], ended["request_counts"]["completed"]) == ("completed", LINES), ended
        assert len(await content(self._server, ended["output_file_id"])) == LINES
        await self._remove(file["id"], ended["output_file_id"])

    async def _transcription_job(self) -> None:
        job = await transcriptions.handed_in(self._server, self._speech, webhook_url=self._receiver.url)
        await self._until_told(job)
        status, body = await result(self._server, job, "text")
        assert (status, bool(body)) == (200, True), body

    async def _image_job(self) -> None:
        job = await picture_jobs.handed_in(self._server, model="opencv", webhook_url=self._receiver.url)
        await self._until_told(job)
        status, body = await result(self._server, job)
        assert status == 200, body
        await self._remove(*(file["id"] for file in await picture_jobs.pictures_of(self._server)))

    async def _remove(self, *files: str) -> None:
        for file in files:
            url = f"{self._server.url}/v1/files/{file}"
            async with self._server.session.delete(url, headers=self._server.headers) as response:
                assert response.status == 200, await response.text()

    async def _until_told(self, what: str) -> None:
        def told() -> bool:
            for request in self._receiver.received[self._read :]:
                self._read += 1
                self._told.add(request.event["data"]["id"])
            return what in self._told

        await eventually(told, within_seconds=_TOLD_SECONDS, what=f"word of the end of {what}")


async def soak(server: Server, seconds: float) -> Seen:
    """Everybody asks for so long; what was seen, once all of them have what they asked for last."""
    seen = Seen(monotonic())
    seen.ended = seen.begun + seconds
    async with receiving(NETWORK) as receiver, looking(server, seen), asyncio.TaskGroup() as group:
        for kind, (work, every) in Callers(server, receiver).every().items():
            seen.done[kind] = []
            group.create_task(_again(work, every, seen, seen.done[kind]))
    return seen


async def _again(work: Callable[[], Awaitable[None]], every: float, seen: Seen, done: list[Timed]) -> None:
    """A caller who is late leaves out what he would have done meanwhile: he loads nobody who is slow already."""
    while (began := monotonic()) < seen.ended:
        await work()
        done.append(Timed(began, monotonic() - began))
        await asyncio.sleep(max(0.0, began + every - monotonic()))


@asynccontextmanager
async def looking(server: Server, seen: Seen) -> AsyncIterator[None]:
    """Look at the server once a second for as long as the block lasts."""

    async def look() -> None:
        while True:
            for what, value in (await _held(server)).items():
                seen.looks.setdefault(what, []).append((monotonic(), value))
            await asyncio.sleep(_LOOK_SECONDS)

    looks = asyncio.create_task(look())
    try:
        yield
        assert not looks.done(), looks.result()
    finally:
        looks.cancel()
        await asyncio.gather(looks, return_exceptions=True)


async def _held(server: Server) -> dict[str, Any]:
    engines = server.engine_pids()
    process = psutil.Process(server.pid)
    return {
        "bytes of the server": server.rss(),
        "bytes of the engines": sum(map(_bytes, engines)),
        "engines": len(engines),
        "file descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "tasks": await server.metric("forebay_tasks"),
        **{f"rows of {table}": count for table, count in _rows(server).items()},
    }


def _bytes(pid: int) -> int:
    """What a process has resident; nothing once it has ended, as those that decode do at any moment."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except GONE:
        return 0


def _rows(server: Server) -> dict[str, int]:
    """How many rows each table has; no snapshot of all of them at one moment."""
    with closing(sqlite3.connect(f"file:{server.folder / 'data' / 'forebay.db'}?mode=ro", uri=True)) as database:
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: database.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in names}
