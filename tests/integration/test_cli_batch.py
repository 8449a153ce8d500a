"""`forebay batch`, `jobs` and `dead-letters` as a person and as a script run them, against a real server."""

import asyncio
import json
import os
import re
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.batches import finished, jsonl, line, submit
from tests.support.server import ADMIN_KEY, Server, eventually, serving
from tests.support.terminal import CTRL_C, on_terminal

CONFIG = """
default_models = false
[batches]
line_backoff_seconds = 0.01
[jobs]
watch_seconds = 0.05
[models.fake]
engine = "fake"
preload = true
"""
KEY = {"OPENAI_API_KEY": ADMIN_KEY}
ON_TERMINAL = {**KEY, "TERM": "xterm"}
SLOW = "[[fake tokens=40 token_ms=100]]"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(CONFIG) as running:
        yield running
        assert "request.bug" not in running.log


@dataclass
class Ended:
    """A command that has ended."""

    status: int
    out: str
    err: str


async def forebay(server: Server, *arguments: str, folder: Path, key: dict[str, str] | None = None) -> Ended:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FOREBAY_", "OPENAI_"))}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "forebay.cli", *arguments, "--url", server.url),
        stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, cwd=folder,
        env={**kept, **(KEY if key is None else key)},
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert b"Traceback" not in err, err.decode()
    return Ended(process.returncode or 0, out.decode(), err.decode())


async def together(server: Server, folder: Path, *commands: tuple[str, ...]) -> list[Ended]:
    """Commands that do not disturb each other, at once."""
    return await asyncio.gather(*(forebay(server, *arguments, folder=folder) for arguments in commands))


def write(folder: Path, *lines: Any) -> str:
    (folder / "requests.jsonl").write_bytes(jsonl(lines))
    return "requests.jsonl"


async def test_a_refused_batch_leaves_no_file_behind(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(jsonl([line("one", "Hello.")]))
    before = await server.get("/v1/files")
    ended = await forebay(server, "batch", "submit", str(path), "--window", "1s", folder=tmp_path)
    assert (ended.status, ended.out) == (1, "")
    assert "completion_window" in ended.err
    assert await server.get("/v1/files") == before


async def test_submit_watch_and_fetch(server: Server, tmp_path: Path) -> None:
    lines = [line(f"id-{number}", f"Line {number}. [[fake echo=1]]") for number in range(20)]
    name = write(tmp_path, *lines, line("bad", "Fail. [[fake status=500]]"))
    ran = await forebay(server, "batch", "submit", name, "--watch", "--metadata", "who=me", folder=tmp_path)
    assert ran.status == 0, ran
    batch = ran.out.strip()
    assert re.fullmatch(r"batch_[0-9a-f]{32}", batch)
    assert "The batch is completed: 20 of 21 lines done, 1 failed." in ran.err
    assert f"forebay batch results {batch}" in ran.err
    status, printed, wrote, failed, listed, jobs, job, watched = await together(
        server, tmp_path,
        ("batch", "status", batch),
        ("batch", "results", batch),
        ("batch", "results", batch, "-o", "answers.jsonl"),
        ("batch", "errors", batch),
        ("batch", "list"),
        ("jobs", "list", "--kind", "batch", "--state", "completed"),
        ("jobs", "show", batch),
        ("batch", "status", batch, "--watch"),
    )  # fmt: skip
    shown = json.loads(status.out)
    assert (shown["status"], shown["metadata"]) == ("completed", {"who": "me"})
    answers = [json.loads(each) for each in printed.out.splitlines()]
    assert {each["custom_id"] for each in answers} == {f"id-{number}" for number in range(20)}
    assert (wrote.status, wrote.out) == (0, "")
    assert (tmp_path / "answers.jsonl").read_text("utf-8") == printed.out
    assert [json.loads(each)["custom_id"] for each in failed.out.splitlines()] == ["bad"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "requests.jsonl"]
    assert re.search(rf"{batch} +completed +/v1/chat/completions +fake +20 +1 +21 ", listed.out)
    assert batch in jobs.out
    shown = json.loads(job.out)
    assert (shown["kind"], shown["progress"]["percent"]) == ("batch", 100.0)
    assert isinstance(shown["log"], list)
    assert watched.status == 0


async def test_a_file_that_is_wrong_is_said_with_its_line(server: Server, tmp_path: Path) -> None:
    name = write(tmp_path, line("a", "Good."), line("a", "The same name."))
    ran = await forebay(server, "batch", "submit", name, "--watch", folder=tmp_path)
    assert ran.status == 1
    assert "The batch is failed" in ran.err
    assert "line 2: " in ran.err
    ran = await forebay(server, "batch", "results", ran.out.strip(), folder=tmp_path)
    assert (ran.status, ran.out) == (1, "")
    assert "The batch is failed and has no results." in ran.err


async def test_cancel_from_another_terminal(server: Server, tmp_path: Path) -> None:
    name = write(tmp_path, *(line(f"id-{number}", SLOW) for number in range(30)))
    submitted = await forebay(server, "batch", "submit", name, "--window", "1h", folder=tmp_path)
    batch = submitted.out.strip()
    assert f"forebay batch status {batch} --watch" in submitted.err
    early = await forebay(server, "batch", "results", batch, folder=tmp_path)
    assert (early.status, "there are no results yet" in early.err) == (1, True)
    ran = await forebay(server, "batch", "cancel", batch, folder=tmp_path)
    assert (ran.status, ran.out) == (0, "")
    assert re.fullmatch(r"The batch is (cancelling|cancelled)\.\n", ran.err)
    watched = await forebay(server, "batch", "status", batch, "--watch", folder=tmp_path)
    assert watched.status == 1
    assert "The batch is cancelled" in watched.err
    again = await forebay(server, "jobs", "cancel", batch, folder=tmp_path)
    assert (again.status, again.err) == (0, "The job is cancelled.\n")
    retried = await forebay(server, "jobs", "retry", batch, folder=tmp_path)
    assert retried.status == 1
    assert "is not tried again as a whole" in retried.err


async def test_ctrl_c_leaves_the_batch_running(server: Server, tmp_path: Path) -> None:
    name = write(tmp_path, *(line(f"id-{number}", SLOW) for number in range(30)))
    arguments = ("batch", "submit", name, "--watch", "--url", server.url)
    async with on_terminal(*arguments, environment=ON_TERMINAL, folder=tmp_path) as terminal:
        match = await terminal.wait_for(r"(batch_[0-9a-f]{32})")
        await terminal.wait_for(r"\d+/30")
        terminal.press(CTRL_C)
        await terminal.wait_for(f"goes on. Look again with `forebay batch status {match[1]} --watch`")
        assert await terminal.ended() == 130
    batch = await server.get(f"/v1/batches/{match[1]}")
    assert batch["status"] in {"validating", "in_progress"}
    status, _ = await server.post(f"/v1/batches/{match[1]}/cancel")
    assert status == 200
    await finished(server, match[1])


async def test_the_progress_bar_follows_a_batch_to_its_end(server: Server, tmp_path: Path) -> None:
    batch = await submit(server, [line(f"id-{number}", "[[fake tokens=5 token_ms=50]]") for number in range(20)])
    arguments = ("batch", "status", batch["id"], "--watch", "--url", server.url)
    async with on_terminal(*arguments, environment=ON_TERMINAL, folder=tmp_path) as terminal:
        await terminal.wait_for("The batch is completed: 20 of 20 lines done, 0 failed.")
        assert "20/20" in terminal.text
        assert await terminal.ended() == 0


async def test_dead_letters_are_listed_shown_and_requeued(server: Server, tmp_path: Path) -> None:
    batch = await submit(server, [line("lost", "Fail. [[fake status=500]]"), line("gone", "Fail. [[fake status=500]]")])
    await finished(server, batch["id"])
    mine = ("--job", batch["id"])
    listed = await forebay(server, "dead-letters", "list", "--waiting", *mine, folder=tmp_path)
    rows = re.findall(r"(dead_[0-9a-f]{32}) +batch +batch_\w+ +[12] +(lost|gone) +engine_error", listed.out)
    assert {name for _, name in rows} == {"lost", "gone"}
    letter = rows[0][0]
    shown = json.loads((await forebay(server, "dead-letters", "show", letter, folder=tmp_path)).out)
    assert shown["input"]["custom_id"] == rows[0][1]
    assert len(shown["attempts"]) == 3
    taken = await forebay(server, "dead-letters", "requeue", letter, folder=tmp_path)
    assert re.fullmatch(r"batch_[0-9a-f]{32}\n", taken.out)
    twice = await forebay(server, "dead-letters", "requeue", letter, folder=tmp_path)
    assert (twice.status, "was requeued before" in twice.err) == (1, True)
    rest = await forebay(server, "dead-letters", "requeue", "--all", *mine, folder=tmp_path)
    assert re.fullmatch(r"batch_[0-9a-f]{32}\n", rest.out)
    none = await forebay(server, "dead-letters", "requeue", "--all", *mine, folder=tmp_path)
    assert (none.status, none.out) == (0, "")
    assert "nothing to requeue" in none.err
    for name in (taken.out.strip(), rest.out.strip()):
        await finished(server, name)


async def test_what_goes_wrong_is_a_sentence(server: Server, tmp_path: Path) -> None:
    (tmp_path / "words.jsonl").write_text("no request\n", encoding="utf-8")
    (tmp_path / "good.jsonl").write_bytes(jsonl([line("a", "Good.")]))
    refusals = {
        ("batch", "submit", "missing.jsonl"): "missing.jsonl cannot be read",
        ("batch", "submit", "words.jsonl"): "is no request",
        ("batch", "submit", "good.jsonl", "--metadata", "nothing"): "Write it as NAME=VALUE",
        ("batch", "submit", "good.jsonl", "--window", "later"): "`completion_window` is",
        ("batch", "status", "../models"): "No such path",
        ("jobs", "list", "--kind", "nothing"): "`kind` is one of",
        ("dead-letters", "requeue"): "Name one dead letter, or say --all",
    }
    for (arguments, said), ran in zip(refusals.items(), await together(server, tmp_path, *refusals), strict=True):
        assert (ran.status, ran.out) == (1, ""), (arguments, ran)
        assert said in ran.err, (arguments, ran)
    stranger = {"OPENAI_API_KEY": "fb_nothing"}
    ran = await forebay(server, "batch", "list", folder=tmp_path, key=stranger)
    assert (ran.status, "--key-file" in ran.err) == (1, True)
    ran = await forebay(server, "batch", "list", folder=tmp_path, key={})
    assert "An API key is needed" in ran.err


async def test_a_result_file_is_written_whole_or_not_at_all(server: Server, tmp_path: Path) -> None:
    batch = await submit(server, [line("a", "Good.")])
    await finished(server, batch["id"])
    (tmp_path / "out.jsonl").write_text("kept", encoding="utf-8")
    ran = await forebay(server, "batch", "results", batch["id"], "-o", "no/such/folder.jsonl", folder=tmp_path)
    assert (ran.status, "cannot be written" in ran.err) == (1, True)
    (tmp_path / "out.jsonl").chmod(0o600)
    ran = await forebay(server, "batch", "results", batch["id"], "-o", "out.jsonl", folder=tmp_path)
    assert ran.status == 0
    assert json.loads((tmp_path / "out.jsonl").read_text("utf-8"))["custom_id"] == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


async def test_a_watch_outlives_a_restart_of_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    folder.mkdir()
    lines = [line(f"id-{number}", "[[fake tokens=10 token_ms=50]]") for number in range(60)]
    with socket.socket() as held:  # bound, so that nobody else takes the port between the two servers
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = {"FOREBAY_PORT": str(held.getsockname()[1])}
        async with serving(CONFIG, folder=folder, environment=port) as server:
            batch = await submit(server, lines)
            watching = asyncio.create_task(forebay(server, "batch", "status", batch["id"], "--watch", folder=tmp_path))

            async def begun() -> bool:
                found = await server.get(f"/v1/batches/{batch['id']}")
                return bool(found["request_counts"]["completed"])

            await eventually(begun, within_seconds=30, what="the first lines")
            await server.stop()
        async with serving(CONFIG, folder=folder, environment=port):
            ran = await watching
    assert ran.status == 0, ran
    assert "The batch is completed: 60 of 60 lines done, 0 failed." in ran.err
