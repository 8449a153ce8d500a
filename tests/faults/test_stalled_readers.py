"""Readers who stop in the middle of any kind of answer: they are cut off while they still hold their socket open.

What tells is that the server's end is gone and that what the answer held is free, not what the reader is told.
"""

import asyncio
import json
import os
import random
import signal
import socket
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic
from urllib.parse import urlsplit

import aiohttp
import pytest
import pytest_asyncio
from PIL import Image

from tests.support.images import encoded
from tests.support.jobs import result, until_ended
from tests.support.picture_jobs import handed_in
from tests.support.server import FAKE, Server, chat_body, eventually, serving_well
from tests.support.wire import get, post

STALL_SECONDS = 3
CUT_SECONDS = STALL_SECONDS + 8.0  # the online door goes first, and the machine may be busy
TOKENS = 20_000  # several hundred KiB of events
PIECE_BYTES = 65_536
CONFIG = f"""{FAKE}
slots = 8
[http]
write_stall_seconds = {STALL_SECONDS}
[jobs]
watchers_max = 1
[images]
held_bytes_max = 8388608
"""

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving_well(CONFIG) as running:
        yield running


@contextmanager
def asking(server: Server, request: bytes) -> Iterator[socket.socket]:
    """A connection that has sent `request`, with hardly any room for what comes back."""
    address = urlsplit(server.url)
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect((address.hostname, address.port))
        line.sendall(request)
        line.setblocking(False)
        yield line


def keyed(server: Server, path: str, *headers: str) -> bytes:
    return get(path, f"Authorization: Bearer {server.key}", *headers)


def unsent_bytes(server: Server, line: socket.socket) -> int | None:
    """What the kernel still holds for this reader; None if the server has let the connection go."""
    ends = (urlsplit(server.url).port, line.getsockname()[1])
    for row in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        _, here, there, state, queues, *_, inode = row.split()[:10]
        if (int(here[9:], 16), int(there[9:], 16)) == ends and inode != "0" and state in {"01", "08"}:
            return int(queues[:8], 16)
    return None


async def begun(line: socket.socket) -> None:
    """Wait for the head of an answer that is fine."""
    expected = b"HTTP/1.1 20"  # 200, or 206 for a range
    async with asyncio.timeout(30):
        assert await asyncio.get_running_loop().sock_recv(line, len(expected)) == expected


async def until_stuck(server: Server, line: socket.socket) -> None:
    """Wait until nothing moves any more on this connection."""
    looks = deque[int | None](maxlen=20)

    def stuck() -> bool:
        looks.append(unsent_bytes(server, line))
        return len(looks) == looks.maxlen and len(set(looks)) == 1 and bool(looks[0])

    await eventually(stuck, what="a connection on which nothing moves")


async def until_cut(server: Server, *lines: socket.socket) -> None:
    """Wait until the server has let all of these connections go."""
    await eventually(
        lambda: all(unsent_bytes(server, line) is None for line in lines), within_seconds=CUT_SECONDS, what="the cut"
    )


async def cut_off(server: Server) -> float:
    return await server.metric("forebay_connections_closed_total", reason="write_stall")


async def response_of(server: Server) -> str:
    """The path of a response in the background that is done, to be streamed again."""
    asked = {"model": "fake", "input": f"[[fake tokens={TOKENS}]]", "max_output_tokens": 2 * TOKENS}
    body = {**asked, "background": True, "stream": True}
    url = f"{server.url}/v1/responses"
    async with server.session.post(url, json=body, headers=server.headers) as response:
        assert response.status == 200, await response.text()
        events = (await response.text()).split("\n\n")
    last = json.loads(events[-2].partition("data: ")[2])
    assert last["type"] == "response.completed"
    return f"/v1/responses/{last['response']['id']}"


async def streamed(server: Server, path: str) -> str | None:
    """All events of a response; None where no more may read events."""
    async with server.session.get(f"{server.url}{path}?stream=true", headers=server.headers) as response:
        assert response.status in {200, 429}
        return await response.text() if response.status == 200 else None


async def test_memory_of_a_picture_that_is_not_read_is_given_back(server: Server) -> None:
    size = (1500, 1500)
    noise = encoded(Image.frombytes("RGB", size, random.Random(1).randbytes(3 * size[0] * size[1])))
    hole = Image.new("RGBA", size, (0, 0, 0, 255))
    hole.paste((0, 0, 0, 0), (16, 16, 400, 400))
    job_id = await handed_in(server, noise, hole=encoded(hole), model="fake")
    assert (await until_ended(server, job_id))["status"] == "completed"

    async def free() -> bool:
        return (await result(server, job_id, "b64_json"))[0] == 200

    with asking(server, keyed(server, f"/v1/jobs/{job_id}/result?format=b64_json")) as line:
        await begun(line)
        assert not await free()
        await eventually(free, within_seconds=CUT_SECONDS, what="memory that is given back")
        assert unsent_bytes(server, line) is None


async def test_a_watcher_who_does_not_read_leaves_his_place(server: Server) -> None:
    path = await response_of(server)
    before = await cut_off(server)
    with asking(server, keyed(server, f"{path}?stream=true")) as line:
        await begun(line)
        assert await streamed(server, path) is None
        await until_cut(server, line)
        whole = await eventually(lambda: streamed(server, path), what="a place for another")
        assert len(whole) > 4 * PIECE_BYTES
    assert await cut_off(server) == before + 1


async def test_the_end_of_a_download_waits_for_nobody(server: Server) -> None:
    """As many pieces as fit into what a connection holds, one fewer, one more, and so on: one of them ends in its buffer."""
    form = aiohttp.FormData({"purpose": "user_data"})
    form.add_field("file", os.urandom(8 * PIECE_BYTES), filename="a.bin")
    async with server.session.post(f"{server.url}/v1/files", data=form, headers=server.headers) as response:
        assert response.status == 200, await response.text()
        path = f"/v1/files/{(await response.json())['id']}/content"
    with ExitStack() as held:
        lines = [
            held.enter_context(asking(server, keyed(server, path, f"Range: bytes=0-{count * PIECE_BYTES - 1}")))
            for count in range(3, 9)
        ]
        for line in lines:
            await begun(line)
        await until_cut(server, *lines)


async def test_further_requests_do_not_excuse_a_reader(server: Server) -> None:
    path = await response_of(server)
    with asking(server, keyed(server, path) * 60) as line:
        await begun(line)
        await until_cut(server, line)


async def test_further_requests_do_not_hide_that_a_caller_has_gone(server: Server) -> None:
    before = await server.metric("forebay_cancellations_total", reason="client_gone")
    body = json.dumps(chat_body("[[fake tokens=2000 rate=50]]")).encode()
    with asking(server, post(body, key=server.key) + keyed(server, "/health")):
        await server.until_load(1, 0)
    await server.until_load(0, 0)
    assert await server.metric("forebay_cancellations_total", reason="client_gone") == before + 1


async def test_an_error_that_ends_a_stream_waits_for_nobody(server: Server) -> None:
    name = "not-read"
    before = await cut_off(server)
    body = json.dumps(chat_body("[[fake tokens=60000]]", stream=True, max_tokens=60_000)).encode()
    with asking(server, post(body, f"X-Request-ID: {name}", key=server.key)) as line:
        await begun(line)
        await until_stuck(server, line)
        assert (await server.post(f"/v1/requests/{name}/cancel"))[0] == 200
        await server.until_load(0, 0)
        await until_cut(server, line)
    assert await cut_off(server) == before + 1
    assert await server.metric("forebay_cancellations_total", reason="cancel_call") == 1


async def test_online_it_is_the_door_that_cuts(server: Server) -> None:
    body = json.dumps(chat_body("[[fake tokens=60000]]", stream=True, max_tokens=60_000)).encode()
    stalled = await server.metric("forebay_cancellations_total", reason="client_stalled")
    gone = await server.metric("forebay_cancellations_total", reason="client_gone")
    with asking(server, post(body, key=server.key)) as line:
        await begun(line)
        await until_cut(server, line)
    assert await server.metric("forebay_cancellations_total", reason="client_stalled") == stalled + 1
    assert await server.metric("forebay_cancellations_total", reason="client_gone") == gone


@pytest.mark.parametrize(("query", "end"), [("?stream=true", b"0\r\n\r\n"), ("", b"}")])
async def test_a_server_that_stands_still_does_not_blame_its_readers(server: Server, query: str, end: bytes) -> None:
    """Neither where an answer waits to go on nor where all of it is written."""
    path = await response_of(server)
    with asking(server, keyed(server, path + query, "Connection: close")) as line:
        await until_stuck(server, line)
        os.kill(server.pid, signal.SIGSTOP)
        going_on_at = monotonic() + 2 * STALL_SECONDS
        await eventually(lambda: monotonic() > going_on_at, what="a server that has stood still for long")
        os.kill(server.pid, signal.SIGCONT)
        received = bytearray()
        while part := await asyncio.get_running_loop().sock_recv(line, PIECE_BYTES):
            received += part
    assert received.endswith(end)
