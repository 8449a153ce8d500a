"""Callers who send and read as slowly as they can: they are closed in time, and nobody else notices."""

import asyncio
import json
import math
import random
import socket
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import psutil
import pytest

from tests.support.server import ADMIN_KEY, FAKE, Server, eventually, serving
from tests.support.wire import get, post

CLOSED_WITHIN_SECONDS = 30.0
RATIO_MAX = 1.5
ROUNDS_MAX = 12
# The stall limit of engines is out of the way, so that only the front door can be what closes.
CONFIG = FAKE + "slots = 400\nqueue_places = 200\n"
STALL_SECONDS = 3
QUICK = (
    CONFIG
    + f"""
[http]
header_timeout_seconds = 2
body_timeout_seconds = 3
keep_alive_seconds = 3
write_stall_seconds = {STALL_SECONDS}
"""
)
KEY = f"Authorization: Bearer {ADMIN_KEY}\r\n"
Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def chat(tokens: int, *, stream: bool) -> bytes:
    message = {"role": "user", "content": f"[[fake tokens={tokens}]]"}
    body = {"model": "fake", "messages": [message], "stream": stream, "max_tokens": tokens}
    return post(json.dumps(body).encode(), "Connection: close")


async def nothing_at_all(server: Server, line: Line) -> None:
    await line[0].read()


async def trickled_head(server: Server, line: Line) -> None:
    await trickle(line, b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X-A: b\r\n" * 1000)


async def trickled_line_ends(server: Server, line: Line) -> None:
    await trickle(line, b"\r\n" * 4000)


async def trickled_body(server: Server, line: Line) -> None:
    await trickle(line, post(b"[" + b" " * 100_000))


async def trickled_chunks(server: Server, line: Line) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{KEY}Transfer-Encoding: chunked\r\n\r\n".encode()
    await trickle(line, head + b"1\r\n \r\n" * 10_000)


async def half_behind_whole(server: Server, line: Line) -> None:
    line[1].write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HT")
    await line[0].read()


async def idle_after_an_answer(server: Server, line: Line) -> None:
    line[1].write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    await line[0].read()


async def trickle(line: Line, data: bytes) -> None:
    """The first 200 bytes at once, then one byte every half second until the server has enough of it."""
    reader, writer = line
    writer.write(data[:200])
    ended = asyncio.create_task(reader.read())
    for position in range(200, len(data)):
        if ended.done() or writer.transport.is_closing():
            break
        writer.write(data[position : position + 1])
        await asyncio.wait([ended], timeout=0.5)
    await ended


SENDERS: tuple[Callable[[Server, Line], Awaitable[None]], ...] = (
    nothing_at_all,
    trickled_head,
    trickled_line_ends,
    trickled_body,
    trickled_chunks,
    half_behind_whole,
    idle_after_an_answer,
)


async def slow_sender(server: Server, kind: Callable[[Server, Line], Awaitable[None]]) -> float:
    """Open a connection and be slow on it; seconds until the server closed it."""
    host, port = server.url.removeprefix("http://").split(":")
    line = await asyncio.open_connection(host, int(port))
    began = asyncio.get_running_loop().time()
    with suppress(ConnectionError):
        await kind(server, line)
    line[1].transport.abort()
    return asyncio.get_running_loop().time() - began


async def slow_reader(server: Server, *, stream: bool, bytes_per_second: int) -> float:
    """Ask for a long answer and hardly read it; seconds from its first byte until the server has let the connection go."""
    loop = asyncio.get_running_loop()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.setblocking(False)
        await loop.sock_connect(line, (host, int(port)))
        port_here = line.getsockname()[1]
        await loop.sock_sendall(line, chat(60_000 if stream else 300_000, stream=stream))
        await loop.sock_recv(line, 1)  # how long the engine takes for so long an answer is another matter
        began = loop.time()
        while port_here in server_side_ports(server):
            await asyncio.sleep(0.25)
            with suppress(BlockingIOError, ConnectionError):
                line.recv(max(1, bytes_per_second // 4)) if bytes_per_second else None
        return loop.time() - began


def server_side_ports(server: Server) -> set[int]:
    """The client ports of the connections that the server process holds."""
    connections = psutil.Process(server.pid).net_connections(kind="tcp")
    return {one.raddr.port for one in connections if one.status != "LISTEN" and one.raddr}


async def good_traffic(server: Server, count: int) -> list[float]:
    """`count` requests, two at a time; the seconds that each took."""
    loop, taken = asyncio.get_running_loop(), []

    async def one_after_another() -> None:
        for _ in range(count // 2):
            began = loop.time()
            async with await server.chat("Good. [[fake tokens=4 token_ms=5]]") as response:
                assert response.status == 200, await response.text()
                await response.read()
            taken.append(loop.time() - began)

    await asyncio.gather(one_after_another(), one_after_another())
    return taken


def p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]


@asynccontextmanager
async def attack(server: Server, count: int) -> AsyncIterator[list[asyncio.Task[float]]]:
    """`count` slow senders, replaced as they are closed, for as long as the block lasts."""
    chance, running, over = random.Random(count), [], asyncio.Event()

    async def attacker(kind: Callable[[Server, Line], Awaitable[None]]) -> float:
        longest = 0.0
        while not over.is_set():
            longest = max(longest, await slow_sender(server, kind))
        return longest

    for _ in range(count):
        running.append(asyncio.create_task(attacker(chance.choice(SENDERS))))
    yield running
    over.set()
    await asyncio.gather(*running)


@pytest.mark.timeout(600)
async def test_good_traffic_does_not_notice_500_slow_senders(prove: bool) -> None:
    """A B A B in one run; the p99 of the B is at most 1.5 times that of the A. Limits lowered: see QUICK.

    Where that is not so at once it is to be so in later rounds: somebody else may have kept the machine busy.
    """
    rounds, requests = (8, 600) if prove else (2, 400)
    async with serving(QUICK) as server:
        await good_traffic(server, 50)
        alone, beset, longest, ratio = list[float](), list[float](), 0.0, math.inf
        for number in range(ROUNDS_MAX):
            if number >= rounds and ratio <= RATIO_MAX:
                break
            del alone[: -(rounds - 1) * requests], beset[: -(rounds - 1) * requests]
            alone += await good_traffic(server, requests)
            async with attack(server, 500) as attackers:
                await eventually(lambda: _connections(server, 480), what="the attackers to be there")
                beset += await good_traffic(server, requests)
            longest = max(longest, *(one.result() for one in attackers))
            await eventually(lambda: _connections_at_most(server, 10), what="the attackers to be gone")
            ratio = p99(beset) / p99(alone)
        print(f"p99 alone {p99(alone) * 1000:.1f} ms, beset {p99(beset) * 1000:.1f} ms, x{ratio:.2f}; {longest=:.1f} s")
        assert longest < 6
        assert ratio <= RATIO_MAX
        assert "request.bug" not in server.log


async def _connections(server: Server, least: int) -> bool:
    return await server.metric("forebay_connections") >= least


async def _connections_at_most(server: Server, most: int) -> bool:
    return await server.metric("forebay_connections") <= most


@pytest.mark.timeout(120)
async def test_with_the_default_settings_every_slow_client_is_closed_within_30_seconds(prove: bool) -> None:
    async with serving(CONFIG) as server:
        count = 72 if prove else 10
        senders = [slow_sender(server, kind) for kind in SENDERS for _ in range(count)]
        readers = [
            slow_reader(server, stream=stream, bytes_per_second=rate)
            for stream in (True, False)
            for rate in (0, 40)
            for _ in range(2)  # eight in all: making more such long answers takes two cores too long
        ]
        taken = await asyncio.gather(*senders, *readers)
        print(f"{len(taken)} slow clients; the last was closed after {max(taken):.1f} s")
        assert max(taken) <= CLOSED_WITHIN_SECONDS
        await eventually(lambda: _idle(server), what="the work of the slow readers to stop")
        assert "request.bug" not in server.log


async def _idle(server: Server) -> bool:
    model = await server.model()
    return bool(model["running"] == 0 and model["waiting"] == 0)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_reader_who_is_slow_but_reads_gets_everything(stream: bool) -> None:
    """Longer than the stall limit: progress counts, not the time that it takes."""
    loop = asyncio.get_running_loop()
    async with serving(QUICK) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.socket() as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            line.setblocking(False)
            await loop.sock_connect(line, (host, int(port)))
            await loop.sock_sendall(line, chat(20_000 if stream else 200_000, stream=stream))
            received, began = bytearray(), loop.time()
            while part := await loop.sock_recv(line, 65536):
                received += part
                await asyncio.sleep(0.02)
            assert loop.time() - began > STALL_SECONDS
        assert (b"data: [DONE]" if stream else b'"finish_reason":"stop"') in received


async def test_a_slow_reader_of_a_kept_response_gets_every_event() -> None:
    """What he takes counts also while nothing new is put before him, and nobody but he waits for it."""
    loop = asyncio.get_running_loop()
    async with serving(QUICK) as server:
        asked = {"model": "fake", "input": "[[fake tokens=20000]]", "max_output_tokens": 40_000}
        body = {**asked, "background": True, "stream": True}
        async with server.session.post(f"{server.url}/v1/responses", json=body, headers=server.headers) as response:
            last = json.loads((await response.text()).split("\n\n")[-2].partition("data: ")[2])
        assert last["type"] == "response.completed"
        host, port = server.url.removeprefix("http://").split(":")
        with socket.socket() as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.setblocking(False)
            await loop.sock_connect(line, (host, int(port)))
            path = f"/v1/responses/{last['response']['id']}?stream=true"
            await loop.sock_sendall(line, get(path, KEY.strip(), "Connection: close"))
            received, began = bytearray(), loop.time()
            while part := await loop.sock_recv(line, 4096):
                received += part
                await asyncio.sleep(0.05)
            assert loop.time() - began > 2 * STALL_SECONDS
        assert b"response.completed" in received
        assert received.endswith(b"0\r\n\r\n")
