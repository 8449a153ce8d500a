"""Commands beside a small server that answers what a test says."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from forebay.cli import app
from forebay.cli.api_client import ApiClient, NotNow
from forebay.cli.progress import show_until_done, view_of
from tests.support.clock import FakeClock

KEY = {"OPENAI_API_KEY": "fb_key"}
ROUND = {"requeued": 2, "left": 5, "gone": 0, "jobs": [{"id": "batch_a"}, {"id": "job_b"}]}
NONE = {"requeued": 0, "left": 0, "gone": 0, "jobs": []}
BUSY = {"error": {"message": "Too many at once."}}


@dataclass
class Small:
    """A server, and the paths that it was asked for."""

    url: str
    asked: list[str]


@contextmanager
def answering(*answers: tuple[int, Any]) -> Iterator[Small]:
    """One answer after the other, the last of them again and again."""
    asked: list[str] = []

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, said = answers[min(len(asked), len(answers) - 1)]
            asked.append(self.path)
            body = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield Small(f"http://127.0.0.1:{server.server_port}", asked)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run(small: Small, *arguments: str, key: dict[str, str] | None = None) -> Result:
    ran = CliRunner().invoke(app, [*arguments, "--url", small.url], env=KEY if key is None else key)
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return ran


def test_what_was_taken_up_is_printed_though_a_later_round_fails() -> None:
    with answering((200, ROUND), (429, BUSY)) as small:
        ran = run(small, "dead-letters", "requeue", "--all")
    assert (ran.exit_code, ran.stdout, ran.stderr) == (1, "batch_a\njob_b\n", "forebay: Too many at once.\n")
    assert len(small.asked) == 2


@pytest.mark.parametrize(
    ("left", "said"),
    [(5, "5 are left that cannot be taken as they are"), (1, "1 is left that cannot be taken as it is")],
)
def test_what_cannot_be_taken_up_is_counted(left: int, said: str) -> None:
    with answering((200, ROUND), (200, {**NONE, "left": left})) as small:
        ran = run(small, "dead-letters", "requeue", "--all")
    assert (ran.exit_code, ran.stdout) == (1, "batch_a\njob_b\n")
    assert ran.stderr == f"forebay: {said}; `forebay dead-letters requeue ID` says why.\n"


def test_nothing_is_said_to_be_left_where_all_of_it_is_gone() -> None:
    with answering((200, {**NONE, "left": 3, "gone": 3})) as small:
        ran = run(small, "dead-letters", "requeue", "--all")
    assert (ran.exit_code, ran.stdout) == (0, "")
    assert ran.stderr == "Passed over 3 whose input or job is gone.\nThere was nothing to requeue.\n"


@pytest.mark.parametrize("name", ["kind", "job", "code"])
def test_a_filter_beside_an_id_is_refused(name: str) -> None:
    with answering((200, {"requeued_as": "batch_a"})) as small:
        ran = run(small, "dead-letters", "requeue", "dead_a", f"--{name}", "x")
        assert (ran.exit_code, ran.stdout, small.asked) == (1, "", [])
        assert ran.stderr == f"forebay: --{name} goes with --all: an ID is one dead letter already.\n"
        ran = run(small, "dead-letters", "requeue", "dead_a")
        assert (ran.exit_code, ran.stdout) == (0, "batch_a\n")


@pytest.mark.parametrize("content", ["fb_one\nfb_two\n", "fb_schlüssel", "fb_a\tb"])
def test_a_key_that_cannot_travel_is_not_sent(content: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(content, encoding="utf-8")
    with answering((200, {"data": []})) as small:
        from_file = run(small, "jobs", "list", "--key-file", str(file))
        from_environment = run(small, "jobs", "list", key={"OPENAI_API_KEY": content})
        assert small.asked == []
    for ran, where in ((from_file, f"The file {file}"), (from_environment, "The environment variable OPENAI_API_KEY")):
        assert ran.exit_code == 1
        assert f"{where} holds no key that could travel in a header. It has to be one line of ASCII" in ran.stderr
        assert "fb_" not in ran.stderr


class Hurried(FakeClock):
    """Whoever sleeps on it has slept at once."""

    async def sleep(self, seconds: float) -> None:
        self.advance(seconds)


async def test_a_watch_gives_up_on_answers_without_news() -> None:
    clock = Hurried()
    began = clock.monotonic()
    with answering((200, b"")) as small:
        async with ApiClient(small.url, "fb_key") as client, asyncio.timeout(60):
            with pytest.raises(NotNow, match=f"The connection to {small.url} broke off. Ask again."):
                await show_until_done(client, "batch_a", view_of(), clock)
    assert (len(small.asked), clock.monotonic() - began) == (121, 120.0)
