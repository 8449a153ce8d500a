"""A disk that fills up under a real server, at every point where it writes: what it acknowledged is kept and finished.

Database and blobs share a small disk of their own, which the tests fill to its last byte and empty again.
"""

import asyncio
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from forebay.clock import SystemClock, seeded
from forebay.config import JobSettings
from forebay.errors import InsufficientStorage
from forebay.jobs.kinds import Kind, Run
from forebay.jobs.outcome import Done, Outcome
from forebay.store.database import Database
from forebay.store.job_records import Lease, NewJob
from forebay.store.job_state import JobState
from tests.support.batches import create, finished, jsonl, line, results, submit, upload
from tests.support.office import RETRY, back_office, settings_for
from tests.support.server import Server, eventually, serving

CONFIG = """
default_models = false
[files]
free_bytes_min = 0
[jobs]
lease_seconds = 3
[batches]
chunk_lines = 64
segment_lines = 8
segment_seconds = 0.1
[outbound]
allowed_networks = ["127.0.0.1/32"]
[models.fake]
engine = "fake"
preload = true
slots = 8
"""
JSON_LOG = {"FOREBAY_LOG_FORMAT": "json"}
DISK_BYTES = 24 * 2**20
REFUSALS = {503, 507}
TRIES_MAX = 200
CHECKS_MAX = 3
SEED = 20_261_121
FORM = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\nContent-Disposition: form-data; '
FORM += b'name="file"; filename="a.jsonl"\r\n\r\n'


class Disk:
    """A small disk, and the ballast that takes its room away."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    @property
    def free(self) -> int:
        """Bytes that are left."""
        return shutil.disk_usage(self.folder).free

    def fill(self, leave: int = 0) -> None:
        """Take all that is left but `leave` bytes."""
        with self._ballast.open("ab", buffering=0) as file, suppress(OSError):
            while self.free > leave:
                file.write(bytes(min(2**16, self.free - leave)))

    def empty(self) -> None:
        """Give it back."""
        self._ballast.unlink()

    @asynccontextmanager
    async def full(self) -> AsyncIterator[None]:
        """Full for as long as the block lasts: whatever is removed meanwhile, somebody else takes the room."""

        async def hold() -> None:
            while True:
                self.fill()
                await SystemClock().sleep(0.005)

        self.fill()
        holding = asyncio.create_task(hold())
        try:
            yield
        finally:
            holding.cancel()
            await asyncio.wait([holding])
            self.empty()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "data"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        pytest.skip("this user may not mount a small disk")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@asynccontextmanager
async def running(disk: Disk) -> AsyncIterator[Server]:
    """A server on the disk, which has not stumbled when it is stopped and whose database is well."""
    async with serving(CONFIG, folder=disk.folder.parent, environment=JSON_LOG) as server:
        yield server
        await server.stop()
        assert "Traceback" not in server.log, server.log[-5000:]
    command = [sys.executable, "-m", "forebay.cli", "db", "check", "--data-dir", str(disk.folder)]
    checked = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "is well" in checked.stdout


def lines(count: int, ask: str = "") -> list[dict[str, Any]]:
    return [line(f"id-{number}", f"Line {number}. [[fake {ask}]]") for number in range(count)]


async def post(server: Server, path: str, body: Any) -> int:
    async with server.session.post(server.url + path, json=body, headers=server.headers) as response:
        await response.read()
        return response.status


async def refused(server: Server, file_id: str) -> list[str]:
    """Create batches until one is refused, which it is for want of room; those that were not are promises."""
    made: list[str] = []
    for _ in range(TRIES_MAX):
        status, batch = await create(server, file_id)
        if status != 200:
            assert status in REFUSALS, batch
            assert batch["error"]["code"] in {"insufficient_storage", "store_unavailable"}
            return made
        made.append(batch["id"])
    raise AssertionError("nothing was refused")


async def reads_go_on(server: Server, file_id: str) -> None:
    """Everything that writes nothing works as ever, with a key that is looked up."""
    for path in ("/v1/files", f"/v1/files/{file_id}", "/v1/batches", "/v1/jobs", "/v1/models"):
        async with server.session.get(server.url + path, headers=server.headers) as response:
            assert response.status == 200, (path, await response.text())
    async with server.session.get(f"{server.url}/v1/files/{file_id}/content", headers=server.headers) as response:
        assert response.status == 200
        assert (await response.read()).startswith(b'{"custom_id"')
    async with await server.chat("Hello.") as response:
        assert response.status == 200, await response.text()


async def all_finished(server: Server, batch_ids: list[str], within_seconds: float = 60) -> None:
    for batch_id in batch_ids:
        ended = await finished(server, batch_id, within_seconds)
        assert ended["status"] == "completed", ended
        output, errors = await results(server, ended)
        assert (len(output), errors) == (ended["request_counts"]["total"], [])


async def has_noticed(server: Server, already: int) -> None:
    """Wait until the worker has said once more that it cannot write."""
    await eventually(lambda: len(server.named("worker.store_away")) > already, what="a worker that noticed")


async def waiting_lines(server: Server, batch_id: str) -> int:
    """Lines that are finished and not yet committed."""
    done = await server.metric("forebay_batch_lines_total", model="fake", outcome="completed")
    return int(done) - int((await server.get(f"/v1/batches/{batch_id}"))["request_counts"]["completed"])


async def test_while_a_file_arrives(disk: Disk) -> None:
    async with running(disk) as server:
        kept = await upload(server, jsonl(lines(2)))
        sent = asyncio.Event()
        more = asyncio.Event()

        async def body() -> AsyncIterator[bytes]:
            yield FORM
            for _ in range(32):
                yield b"x" * 2**16
            sent.set()
            await more.wait()
            for _ in range(32):
                yield b"x" * 2**16
            yield b"\r\n--b--\r\n"

        async def send() -> int:
            headers = {**server.headers, "Content-Type": "multipart/form-data; boundary=b"}
            async with server.session.post(f"{server.url}/v1/files", data=body(), headers=headers) as response:
                return response.status

        sending = asyncio.create_task(send())
        await sent.wait()
        await eventually(lambda: list((disk.folder / "blobs" / ".partial").glob("*")), what="half a file")
        async with disk.full():
            more.set()
            assert await sending in REFUSALS
            await reads_go_on(server, kept["id"])
            await eventually(lambda: not list((disk.folder / "blobs" / ".partial").glob("*")), what="no rest of it")
        again = await upload(server, jsonl(lines(3)))
        status, batch = await create(server, again["id"])
        assert status == 200
        await all_finished(server, [batch["id"]])
        assert len((await server.get("/v1/files?purpose=batch"))["data"]) == 2


async def test_while_something_is_made(disk: Disk) -> None:
    async with running(disk) as server:
        server.key = await server.create_key("default")
        file = await upload(server, jsonl(lines(3)))
        made: list[str] = []
        for _ in range(3):
            async with disk.full():
                made += await refused(server, file["id"])
                bodies = {
                    "/v1/uploads": {"purpose": "batch", "filename": "a.jsonl", "bytes": 9, "mime_type": "text/plain"},
                    "/v1/webhooks": {"url": "http://127.0.0.1:1/"},
                }
                for path, body in bodies.items():
                    assert await post(server, path, body) in REFUSALS, path
                form = aiohttp.FormData({"purpose": "batch"})
                form.add_field("file", b"{}", filename="a.jsonl")
                url = f"{server.url}/v1/files"
                async with server.session.post(url, data=form, headers=server.headers) as response:
                    assert response.status in REFUSALS
                await reads_go_on(server, file["id"])
            status, batch = await create(server, file["id"])
            assert status == 200, batch
            made.append(batch["id"])
        await all_finished(server, made)
        assert {each["id"] for each in (await server.get("/v1/batches?limit=100"))["data"]} == set(made)


async def test_while_a_file_is_checked(disk: Disk) -> None:
    async with running(disk) as server:
        file = await upload(server, jsonl(line(f"id-{i}", f"Line {i}. " + "x" * 3000) for i in range(2000)))
        batch_id = await checked_when_full(server, disk, file["id"])
        async with disk.full():
            await has_noticed(server, 0)
            await reads_go_on(server, file["id"])
            assert (await server.get(f"/v1/batches/{batch_id}"))["status"] == "validating"
        await all_finished(server, [batch_id])


async def checked_when_full(server: Server, disk: Disk, file_id: str) -> str:
    """A batch whose file is still checked now that the disk is full."""
    for _ in range(CHECKS_MAX):
        status, batch = await create(server, file_id)
        server.process.send_signal(signal.SIGSTOP)
        assert status == 200
        disk.fill()
        server.process.send_signal(signal.SIGCONT)
        if (await server.get(f"/v1/batches/{batch['id']}"))["status"] == "validating":
            return str(batch["id"])
        disk.empty()  # the check was over before the stop
        await all_finished(server, [batch["id"]])
    raise AssertionError("every check was over before the disk was full")


async def test_while_results_are_written(disk: Disk) -> None:
    async with running(disk) as server:
        batch = await submit(server, lines(400, "tokens=8 token_ms=10"))

        async def begun() -> bool:
            return int((await server.get(f"/v1/batches/{batch['id']}"))["request_counts"]["completed"]) > 0

        await eventually(begun, what="a first segment")
        for _ in range(2):
            async with disk.full():

                async def stuck() -> bool:
                    return await waiting_lines(server, batch["id"]) >= 2 * 8

                await eventually(stuck, what="results that cannot be written")
                await reads_go_on(server, batch["input_file_id"])
            await eventually(lambda: writes(server, batch["id"]), what="results that are written again")
        await all_finished(server, [batch["id"]])


async def writes(server: Server, batch_id: str) -> bool:
    return await waiting_lines(server, batch_id) < 2 * 8


async def test_while_results_are_joined(disk: Disk) -> None:
    async with running(disk) as server:
        # Results take so much that the database's log, which grows beside them, cannot take the room that is left for them.
        asked = [line(f"id-{number}", "[[fake echo=1]] " + "x" * 40_000) for number in range(150)]
        file = await upload(server, jsonl(asked))
        _, batch = await create(server, file["id"])
        first = await finished(server, batch["id"])
        size = int((await server.get(f"/v1/files/{first['output_file_id']}"))["bytes"])
        async with server.session.delete(
            f"{server.url}/v1/files/{first['output_file_id']}", headers=server.headers
        ) as response:
            assert response.status == 200
        assert size > 2**21
        disk.fill(leave=int(1.6 * size))
        status, batch = await create(server, file["id"])
        assert status == 200, batch

        async def put_off() -> bool:
            job = await server.get(f"/v1/jobs/{batch['id']}")
            shown = await server.get(f"/v1/batches/{batch['id']}")
            return bool(shown["status"] == "finalizing" and job["status"] == "available")

        await eventually(put_off, within_seconds=20, what="a join that found no room")
        await reads_go_on(server, batch["input_file_id"])
        disk.empty()
        await all_finished(server, [batch["id"]])


async def test_while_a_delivery_is_noted(disk: Disk) -> None:
    received: list[str] = []

    async def take(request: web.Request) -> web.Response:
        received.append(request.headers["webhook-id"])
        disk.fill()
        return web.Response()

    app = web.Application()
    app.router.add_post("/", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with running(disk) as server:
            file = await upload(server, jsonl(lines(2)))
            url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
            hook = await call(server, "/v1/webhooks", {"url": url})
            await call(server, f"/v1/webhooks/{hook['id']}/test", {})
            await eventually(lambda: received, what="a delivery")
            await has_noticed(server, 0)
            await reads_go_on(server, file["id"])
            disk.empty()

            async def noted() -> Any:
                [delivery] = (await server.get(f"/v1/webhooks/{hook['id']}/deliveries"))["data"]
                return delivery["attempts"] if delivery["status"] == "completed" else None

            attempts = await eventually(noted, within_seconds=20, what="the end of the delivery")
            assert [(attempt["number"], attempt["status_code"]) for attempt in attempts] == [(1, 200)]
            assert len(received) == 1  # the answer was kept in mind, not asked for again
    finally:
        await runner.cleanup()


async def call(server: Server, path: str, body: Any) -> dict[str, Any]:
    async with server.session.post(server.url + path, json=body, headers=server.headers) as response:
        answer: dict[str, Any] = await response.json()
        assert response.status == 200, answer
        return answer


async def test_while_a_job_is_settled(disk: Disk) -> None:
    """An outcome is kept until there is room for it: the attempt is neither lost nor made again."""
    performed: list[str] = []

    async def perform(lease: Lease, _run: Run) -> Outcome:
        performed.append(lease.job.kind)
        disk.fill()
        return Done()

    kinds = [Kind("plain", perform, 4, RETRY), Kind("heard", perform, 4, RETRY, event="heard")]
    database = await Database.open(settings_for(disk.folder.parent))
    patient = JobSettings(lease_seconds=30, poll_seconds=0.05)
    async with back_office(database, kinds, settings=patient) as back:
        for kind in kinds:
            [job_id] = await back.submit(NewJob(kind.name, "default"))
            await eventually(partial(performed.__contains__, kind.name), what="the attempt")
            for _ in range(3):  # behind its settlement, which has been refused as well by then
                with pytest.raises(InsufficientStorage):
                    await back.submit(NewJob("plain", "default"))
            disk.empty()
            job = await back.until_finished(job_id)
            assert (job.state, job.attempt, job.rescues) == (JobState.COMPLETED, 1, 0)
    assert performed == ["plain", "heard"]
    await database.close()


@pytest.mark.timeout(600)
async def test_again_and_again_while_a_batch_runs(disk: Disk, prove: bool) -> None:
    chance, clock = seeded(SEED), SystemClock()
    fills, count = (25, 4000) if prove else (5, 800)
    async with running(disk) as server:
        batch = await submit(server, lines(count, "tokens=6 token_ms=8"))
        small = await upload(server, jsonl(lines(2)))
        made: list[str] = []
        for _ in range(fills):
            await clock.sleep(chance.uniform(0.05, 1.5))
            async with disk.full():
                made += await refused(server, small["id"])
                await reads_go_on(server, small["id"])
                await clock.sleep(chance.uniform(0.1, 4.5))  # some longer than a lease
        await all_finished(server, [batch["id"], *made], 120)
        assert not list((disk.folder / "blobs" / ".partial").iterdir())
