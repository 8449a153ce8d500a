"""/v1/jobs of a running server; the test is the worker, over the same database."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import sqlalchemy as sa

from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.store.database import Database
from forebay.store.job_records import Lease, NewJob, Verdict
from forebay.store.job_state import JobState
from forebay.store.jobs import JobStore
from tests.support.batches import line, submit
from tests.support.server import FAKE, Server, eventually, serving

CONFIG = FAKE + "[jobs]\nenabled = false\nwatch_seconds = 0.02\nwatchers_max = 3\n"
KIND = "webhook"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(CONFIG) as running:
        yield running
        assert "request.bug" not in running.log


@pytest_asyncio.fixture(loop_scope="module")
async def jobs(server: Server) -> AsyncIterator[JobStore]:
    database = await Database.open(Settings(data_dir=server.folder / "data"))
    yield JobStore(database, SystemClock())
    async with database.begin() as transaction:
        await transaction.execute(sa.text("DELETE FROM jobs"))
        await transaction.execute(sa.text("DELETE FROM line_rates"))
    await database.close()


async def insert(jobs: JobStore, **fields: Any) -> str:
    async with jobs.database.begin() as transaction:
        (job_id,) = await jobs.insert(transaction, [NewJob(KIND, "default", **fields)])
    return job_id


async def lease(jobs: JobStore, job_id: str) -> Lease:
    leases = await jobs.lease({KIND: 10}, "test", 60)
    return next(held for held in leases if held.id == job_id)


async def settle(jobs: JobStore, held: Lease, state: JobState, error: tuple[str, str] | None = None) -> None:
    async with jobs.database.begin() as transaction:
        verdict = Verdict(state, jobs.now(), error=error, counts_as_failure=error is not None)
        await jobs.settle(transaction, held, verdict)


async def count(jobs: JobStore, job_id: str, **counts: int) -> None:
    async with jobs.database.begin() as transaction:
        await jobs.count(transaction, job_id, **counts)


async def ask(
    server: Server, method: str, path: str = "", *, key: str | None = None, body: Any = None
) -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {key or server.key}"}
    async with server.session.request(method, f"{server.url}/v1/jobs{path}", headers=headers, json=body) as response:
        return response.status, await response.json()


class Watched:
    """An open stream of events."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def next(self) -> tuple[str, dict[str, Any]]:
        async with asyncio.timeout(10):
            block = await self.response.content.readuntil(b"\n\n")
        if block.startswith(b":"):
            return await self.next()
        name, data = block.decode().strip().split("\n")
        return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    async def ended(self) -> bool:
        async with asyncio.timeout(10):
            return await self.response.content.read() == b""


@asynccontextmanager
async def watching(server: Server, job_id: str) -> AsyncIterator[Watched]:
    async with server.session.get(f"{server.url}/v1/jobs/{job_id}/events", headers=server.headers) as response:
        yield Watched(response)


async def test_a_job_as_it_goes(server: Server, jobs: JobStore) -> None:
    job_id = await insert(jobs, total=4, priority=-1, model="fake", stage="sending")
    status, found = await ask(server, "GET", f"/{job_id}")
    assert status == 200
    created = found.pop("created_at")
    assert abs(created - SystemClock().now()) < 60
    assert found == {
        "id": job_id, "object": "job", "kind": KIND, "status": "available", "priority": 1, "model": "fake",
        "started_at": None, "finished_at": None, "cancel_requested_at": None, "queue_position": 0, "eta_seconds": None,
        "progress": {"total": 4, "completed": 0, "failed": 0, "stage": "sending", "percent": 0.0, "step": None, "steps": None},
        "attempts": [], "error": None,
    }  # fmt: skip
    held = await lease(jobs, job_id)
    await count(jobs, job_id, completed=2, failed=1)
    _, found = await ask(server, "GET", f"/{job_id}")
    assert (found["status"], found["queue_position"]) == ("running", None)
    assert found["progress"]["percent"] == 75.0
    assert found["started_at"] >= created
    assert 0 <= found["eta_seconds"] < 10
    await settle(jobs, held, JobState.FAILED, ("engine_crashed", "It died."))
    _, found = await ask(server, "GET", f"/{job_id}")
    assert (found["status"], found["eta_seconds"]) == ("failed", None)
    assert found["error"] == {"code": "engine_crashed", "message": "It died."}
    assert [(each["attempt"], each["code"]) for each in found["attempts"]] == [(1, "engine_crashed")]
    assert found["finished_at"] >= found["started_at"]


async def test_the_outlook_goes_by_the_line_and_the_rate_of_the_model(server: Server, jobs: JobStore) -> None:
    async with jobs.database.begin() as transaction:
        await transaction.execute(sa.text("INSERT INTO line_rates VALUES ('fake', 10.0, 0)"))
    first = await insert(jobs, total=100, model="fake")
    other = await insert(jobs, total=500, model="another")
    last = await insert(jobs, total=50, model="fake")
    urgent = await insert(jobs, total=20, model="fake", priority=-1)
    outlooks = {}
    for job_id in (urgent, first, other, last):
        _, found = await ask(server, "GET", f"/{job_id}")
        outlooks[job_id] = (found["queue_position"], found["eta_seconds"])
    assert outlooks == {urgent: (0, 2.0), first: (1, 12.0), other: (2, None), last: (3, 17.0)}
    await lease(jobs, urgent)
    await count(jobs, urgent, completed=20)
    _, found = await ask(server, "GET", f"/{last}")
    assert found["eta_seconds"] == 15.0
    _, found = await ask(server, "GET", f"/{urgent}")
    assert found["eta_seconds"] == 0.0


async def test_the_list_is_filtered_and_paged(server: Server, jobs: JobStore) -> None:
    made = [await insert(jobs) for _ in range(5)]
    async with jobs.database.begin() as transaction:
        await jobs.insert(transaction, [NewJob("chunk", "default")])
    seen: list[str] = []
    after = ""
    for _ in range(4):
        _, page = await ask(server, "GET", f"?limit=2{after}")
        assert page["object"] == "list"
        seen += [job["id"] for job in page["data"]]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        after = f"&after={page['last_id']}"
        if not page["has_more"]:
            break
    assert seen == made[::-1]
    held = await lease(jobs, made[0])
    await settle(jobs, held, JobState.COMPLETED)
    _, page = await ask(server, "GET", "?state=completed")
    assert [job["id"] for job in page["data"]] == [made[0]]
    _, page = await ask(server, "GET", "?state=cancelled")
    assert (page["data"], page["has_more"], page["first_id"]) == ([], False, None)
    _, page = await ask(server, "GET", f"?kind={KIND}")
    assert len(page["data"]) == 5
    for wrong in ("?kind=chunk", "?kind=nothing", "?state=nothing", "?limit=0", "?limit=101", "?limit=x"):
        status, error = await ask(server, "GET", wrong)
        assert (status, set(error["error"])) == (400, {"message", "type", "param", "code"}), wrong
    status, _ = await ask(server, "GET", "?after=job_nothing")
    assert status == 404


async def test_cancel_retry_and_log(server: Server, jobs: JobStore) -> None:
    job_id = await insert(jobs)
    status, found = await ask(server, "POST", f"/{job_id}/cancel")
    assert (status, found["status"], found["error"]["code"]) == (200, "cancelled", "job_cancelled")
    assert await ask(server, "POST", f"/{job_id}/cancel") == (200, found)
    status, found = await ask(server, "POST", f"/{job_id}/retry")
    assert (status, found["status"], found["error"]) == (200, "available", None)
    held = await lease(jobs, job_id)
    status, found = await ask(server, "POST", f"/{job_id}/cancel")
    assert (found["status"], found["cancel_requested_at"] is not None) == ("running", True)
    await settle(jobs, held, JobState.COMPLETED)
    status, error = await ask(server, "POST", f"/{job_id}/retry")
    assert (status, error["error"]["code"]) == (409, "conflict")
    _, log = await ask(server, "GET", f"/{job_id}/log")
    assert [line["event"] for line in log["data"]] == [
        "job.cancel_requested", "job.cancelled", "job.retried", "job.cancel_requested",
    ]  # fmt: skip


async def test_only_a_finished_job_is_removed(server: Server, jobs: JobStore) -> None:
    job_id = await insert(jobs)
    assert (await ask(server, "DELETE", f"/{job_id}"))[0] == 409
    held = await lease(jobs, job_id)
    assert (await ask(server, "DELETE", f"/{job_id}"))[0] == 409
    await settle(jobs, held, JobState.COMPLETED)
    assert await ask(server, "DELETE", f"/{job_id}") == (200, {"id": job_id, "object": "job", "deleted": True})
    assert (await ask(server, "GET", f"/{job_id}"))[0] == 404
    assert (await ask(server, "DELETE", f"/{job_id}"))[0] == 404


async def test_nobody_sees_the_jobs_of_another_project(server: Server, jobs: JobStore) -> None:
    job_id = await insert(jobs)
    stranger = await server.create_key("stranger")
    for method, path in (
        ("GET", ""), ("GET", "/log"), ("GET", "/events"), ("POST", "/cancel"), ("POST", "/retry"), ("DELETE", ""),
    ):  # fmt: skip
        assert (await ask(server, method, f"/{job_id}{path}", key=stranger))[0] == 404, (method, path)
    assert (await ask(server, "GET", key=stranger))[1]["data"] == []
    reader = await server.create_key("default", "read_only")
    assert (await ask(server, "GET", f"/{job_id}", key=reader))[0] == 200
    for method, path in (("POST", "/cancel"), ("POST", "/retry"), ("DELETE", "")):
        assert (await ask(server, method, f"/{job_id}{path}", key=reader))[0] == 403, (method, path)


async def test_a_chunk_is_not_shown(server: Server, jobs: JobStore) -> None:
    async with jobs.database.begin() as transaction:
        (job_id,) = await jobs.insert(transaction, [NewJob("chunk", "default")])
    assert (await ask(server, "GET", f"/{job_id}"))[0] == 404


async def test_events_tell_a_job_to_its_end(server: Server, jobs: JobStore) -> None:
    job_id = await insert(jobs, total=2)
    async with watching(server, job_id) as watched:
        assert watched.response.headers["content-type"].startswith("text/event-stream")
        name, job = await watched.next()
        assert (name, job["status"], job["queue_position"]) == ("state", "available", 0)
        held = await lease(jobs, job_id)
        name, job = await watched.next()
        assert (name, job["status"]) == ("state", "running")
        await count(jobs, job_id, completed=1)
        name, job = await watched.next()
        assert (name, job["progress"]["completed"]) == ("progress", 1)
        await settle(jobs, held, JobState.COMPLETED)
        name, job = await watched.next()
        assert (name, job["status"], job["progress"]["percent"]) == ("done", "completed", 100.0)
        assert await watched.ended()
    async with watching(server, job_id) as watched:  # of a job that has ended, the end alone
        assert (await watched.next())[0] == "done"
        assert await watched.ended()


async def test_events_of_a_job_that_is_removed_end(server: Server, jobs: JobStore) -> None:
    job_id = await insert(jobs)
    async with watching(server, job_id) as watched:
        await watched.next()
        async with jobs.database.begin() as transaction:
            await transaction.execute(sa.text("DELETE FROM jobs"))
        name, error = await watched.next()
        assert (name, error["error"]["code"]) == ("error", "not_found")
        assert await watched.ended()


async def test_streams_are_bounded_and_end_with_their_reader(server: Server, jobs: JobStore) -> None:
    job_id = await insert(jobs)
    for _ in range(2):  # the second round has room because the first one's readers have gone
        opened = []
        for _ in range(3):

            async def open_stream() -> aiohttp.ClientResponse | None:
                url = f"{server.url}/v1/jobs/{job_id}/events"
                response = await server.session.get(url, headers=server.headers)
                if response.status == 200:
                    return response
                assert response.status == 429
                response.close()
                return None

            opened.append(await eventually(open_stream, what="room for a stream"))
        async with watching(server, job_id) as refused:
            assert refused.response.status == 429
            assert (await refused.response.json())["error"]["code"] == "too_many_watchers"
            assert 1 <= int(refused.response.headers["retry-after"]) <= 120
        for response in opened:
            response.close()


async def test_a_stop_of_the_server_ends_the_streams() -> None:
    async with serving(CONFIG) as server:
        database = await Database.open(Settings(data_dir=server.folder / "data"))
        store = JobStore(database, SystemClock())
        async with watching(server, await insert(store)) as watched:
            await watched.next()
            stopping = asyncio.create_task(server.stop(within_seconds=10))
            assert await watched.ended()
            assert await stopping == 0
        await database.close()


async def guesses(server: Server, lines: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Of a batch: how long it was said to go on, at moments in the middle of it, and how long it did."""
    batch = await submit(server, lines)
    said: list[tuple[float, float]] = []
    clock = SystemClock()
    async with watching(server, batch["id"]) as watched:
        name, job = await watched.next()
        while name != "done":
            if job["eta_seconds"] is not None and 10 <= job["progress"]["completed"] <= 30:
                said.append((job["eta_seconds"], clock.monotonic()))
            name, job = await watched.next()
    ended = clock.monotonic()
    assert job["status"] == "completed"
    assert len(said) >= 2
    return [(eta, ended - at) for eta, at in said]


def came_true(guessed: list[tuple[float, float]]) -> bool:
    return all(0.4 < (eta + 0.5) / (seconds + 0.5) < 2.5 for eta, seconds in guessed)


async def test_the_time_left_comes_true() -> None:
    quick = "[batches]\nsegment_seconds = 0.1\nsegment_lines = 4\n[jobs]\nwatch_seconds = 0.05\n"
    async with serving(FAKE + "slots = 4\n" + quick) as server:
        lines = [line(f"id-{number}", "[[fake tokens=5 token_ms=100]]") for number in range(40)]  # 0.5 s each: 5 s
        guessed = await guesses(server, lines)
        if not came_true(guessed):  # no guess foresees a pause; two in a row are none
            guessed = await guesses(server, lines)
        assert came_true(guessed), guessed
        # The next one is told in advance, by what was learnt from this one.
        batch = await submit(server, lines)
        async with watching(server, batch["id"]) as watched:
            _, job = await watched.next()
            while job["eta_seconds"] is None:
                _, job = await watched.next()
            assert job["progress"]["completed"] <= 4
            assert 2 < job["eta_seconds"] < 15
        assert (await server.post(f"/v1/batches/{batch['id']}/cancel"))[0] == 200
