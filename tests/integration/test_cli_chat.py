"""`forebay chat` on a real terminal and through a pipe, against a real server."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.server import ADMIN_KEY, Server, eventually, serving
from tests.support.terminal import CTRL_C, CTRL_D, Terminal, on_terminal

KEY = {"OPENAI_API_KEY": ADMIN_KEY}

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    """For the tests that leave its engine alive."""
    async with serving() as running:
        yield running


@asynccontextmanager
async def chatting(server: Server, folder: Path) -> AsyncIterator[Terminal]:
    async with on_terminal("chat", "--url", server.url, environment=KEY, folder=folder) as opened:
        await opened.wait_for("fake at http")
        await opened.wait_for("> ")
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def terminal(server: Server, tmp_path: Path) -> AsyncIterator[Terminal]:
    async with chatting(server, tmp_path) as opened:
        yield opened


async def piped(
    question: str | bytes, *arguments: str, folder: Path, key: dict[str, str] | None = None
) -> tuple[int, str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FOREBAY_", "OPENAI_"))}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "forebay.cli", "chat", *arguments),
        stdin=pipe, stdout=pipe, stderr=pipe, cwd=folder, env={**kept, **(KEY if key is None else key)},
    )  # fmt: skip
    async with asyncio.timeout(30):
        out, err = await process.communicate(question if isinstance(question, bytes) else question.encode())
    return process.returncode or 0, out.decode(), err.decode()


async def test_a_conversation(terminal: Terminal, tmp_path: Path) -> None:
    await terminal.say("[[fake tokens=3]]")
    await terminal.wait_for("tok0 tok1 tok2 ")
    await terminal.wait_for(r"\[3 tokens, .*first after \d+ ms\]")
    await terminal.say("/system Be brief.")
    await terminal.wait_for("system prompt is: Be brief")
    await terminal.say("one \\")
    await terminal.wait_for(r"\.\.\. ")
    await terminal.say("two [[fake echo=1]]")
    await terminal.wait_for("one two ")
    await terminal.say('"""')
    await terminal.say("three")
    await terminal.say("four [[fake echo=1]]")
    await terminal.say('"""')
    await terminal.wait_for(r"three four \r\n")
    await terminal.say("/save talk.json")
    await terminal.wait_for("is in talk.json")
    said = json.loads((tmp_path / "talk.json").read_text("utf-8"))
    assert [message["role"] for message in said["messages"]] == ["system", *["user", "assistant"] * 3]
    assert said["messages"][0]["content"] == "Be brief."
    await terminal.say("/reset")
    await terminal.wait_for("forgotten")
    await terminal.say("/models")
    await terminal.wait_for("fake  ready")
    await terminal.say("/model nothing")
    await terminal.wait_for("The server has no model `nothing`")
    await terminal.say("/nonsense")
    await terminal.wait_for("no command /nonsense")
    await terminal.say("/help")
    await terminal.wait_for("/save FILE")
    await terminal.say("/exit")
    assert await terminal.ended() == 0


async def test_an_interrupt_ends_the_answer_and_not_the_program(server: Server, terminal: Terminal) -> None:
    await terminal.say("[[fake tokens=10000 token_ms=20]]")
    await terminal.wait_for("tok5 ")
    terminal.press(CTRL_C)
    await terminal.wait_for(r"\[stopped; \d+ tokens")
    # The engine has stopped too: the connection was closed, and the server passed that on.
    await eventually(lambda: idle(server), within_seconds=5, what="an idle engine")
    await terminal.say("[[fake tokens=2]]")
    await terminal.wait_for(r"tok0 tok1 \r\n")
    await terminal.wait_for("> ")
    terminal.press(CTRL_C)
    assert await terminal.ended() == 0


async def idle(server: Server) -> bool:
    return bool((await server.model())["running"] == 0)


async def test_an_interrupt_drops_a_line_that_was_begun(terminal: Terminal) -> None:
    terminal.press(b"half a question")
    await terminal.wait_for("half a question")
    terminal.press(CTRL_C)
    await terminal.wait_for("> ")
    await terminal.say("[[fake tokens=1]]")
    await terminal.wait_for(r"tok0 \r\n")
    await terminal.wait_for("> ")  # between two questions the terminal is another's, and takes the key for nothing
    terminal.press(CTRL_D)
    assert await terminal.ended() == 0


async def test_errors_are_sentences_and_the_program_goes_on(tmp_path: Path) -> None:
    async with serving() as server, chatting(server, tmp_path) as terminal:
        await terminal.say("[[fake status=500]]")
        await terminal.wait_for("Asked to answer 500")
        await terminal.say("[[fake tokens=2 crash_at=1]]")
        await terminal.wait_for("engine process died|It is being restarted")
        assert "Traceback" not in terminal.text
        await terminal.wait_for("> ")
        terminal.press(CTRL_D)
        assert await terminal.ended() == 0


async def test_a_key_is_asked_for_without_showing_it(server: Server, tmp_path: Path) -> None:
    async with on_terminal("chat", "--url", server.url, environment={}, folder=tmp_path) as terminal:
        await terminal.wait_for("API key")
        await terminal.say(ADMIN_KEY)
        await terminal.wait_for("fake at http")
        assert ADMIN_KEY not in terminal.text


async def test_a_pipe_gets_the_answer_alone(server: Server, tmp_path: Path) -> None:
    status, out, err = await piped("[[fake tokens=2]]\n", "--url", server.url, folder=tmp_path)
    assert (status, out, err) == (0, "tok0 tok1 \n", "")
    (tmp_path / "key").write_text(ADMIN_KEY, encoding="utf-8")
    status, out, _ = await piped("[[fake tokens=1]]", "--url", server.url, "--key-file", "key", folder=tmp_path, key={})
    assert (status, out) == (0, "tok0 \n")


async def test_what_is_wrong_is_said_in_a_sentence(server: Server, tmp_path: Path) -> None:
    for arguments, key, sentence in (
        (["--url", "http://127.0.0.1:9"], KEY, "Start one with `forebay serve`"),
        (["--url", server.url, "--model", "nothing"], KEY, "no model `nothing`. It has fake"),
        (["--url", server.url], {"OPENAI_API_KEY": "wrong"}, "`forebay keys create` makes one"),
        (["--url", server.url], {}, "--key-file"),
        (["--url", "nonsense"], KEY, "is no address of a server"),
    ):
        status, out, err = await piped("hello", *arguments, folder=tmp_path, key=key)
        assert (status, out) == (1, "")
        assert sentence in err
        assert "Traceback" not in err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
async def test_what_is_no_text_does_not_end_the_talk(server: Server, tmp_path: Path, errors: str) -> None:
    decoding = {**KEY, "PYTHONIOENCODING": f"utf-8:{errors}"}
    async with on_terminal("chat", "--url", server.url, environment=decoding, folder=tmp_path) as terminal:
        await terminal.wait_for("fake at http")
        await terminal.wait_for("> ")
        await terminal.say("[[fake tokens=1]]")
        await terminal.wait_for(r"tok0 \r\n")
        await terminal.wait_for("> ")
        terminal.press(b"caf\xff\r")
        await terminal.wait_for("That line is not UTF-8 and is left out")
        await terminal.say("/save ~no-such-user/talk.json")
        await terminal.wait_for("~no-such-user/talk.json cannot be written: ")
        await terminal.say("/save talk.json")
        await terminal.wait_for("is in talk.json")
        await terminal.say("/exit")
        assert await terminal.ended() == 0
    said = json.loads((tmp_path / "talk.json").read_text("utf-8"))
    assert [message["content"] for message in said["messages"]] == ["[[fake tokens=1]]", "tok0 "]
    status, out, err = await piped(b"caf\xff", "--url", server.url, folder=tmp_path, key=decoding)
    assert (status, out) == (1, "")
    assert err == "forebay: Standard input is not UTF-8. Convert it first, for instance with `iconv`.\n"
