"""The HTTP/1.1 connection under what no client library sends: rubbish, excess, trickles and smuggling."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.measuring import within
from tests.support.server import ADMIN_KEY, FAKE, Server, eventually, serving, serving_well
from tests.support.wire import Reply, get, post, wire

SMALL = (
    FAKE
    + """
[http]
body_bytes_max = 100000
header_timeout_seconds = 1
body_timeout_seconds = 2
keep_alive_seconds = 2
write_stall_seconds = 2
"""
)
BODY = json.dumps({"model": "fake", "messages": [{"role": "user", "content": "[[fake tokens=2]]"}]}).encode()
TEXT = "tok0 tok1 "


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving_well(SMALL) as running:
        yield running


pytestmark = pytest.mark.asyncio(loop_scope="module")


def is_error(reply: Reply, status: int, code: str) -> None:
    """The answer is an error in OpenAI's shape."""
    assert reply.status == status, reply
    assert reply.headers["content-type"] == "application/json"
    error = reply.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["message"]


def text_of(reply: Reply) -> str:
    assert reply.status == 200, reply
    return str(reply.json["choices"][0]["message"]["content"])


async def exchange(server: Server, data: bytes) -> tuple[Reply, bytes]:
    """Send `data`; the answer, and what came after it until the server closed."""
    async with wire(server.url) as line:
        await line.send(data)
        reply = await line.reply()
        return reply, await line.rest()


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHo st: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: a\x00b\r\n\r\n",
        b"GET http:// HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=lambda data: repr(data[:24]),
)
async def test_rubbish_gets_400_and_the_connection_closes(server: Server, data: bytes) -> None:
    reply, rest = await exchange(server, data)
    is_error(reply, 400, "invalid_http")
    assert rest == b""


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Length: 4", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", "Content-Length: 4"),
        ("Transfer-Encoding: xchunked", "Content-Length: 4"),
        ("Transfer-Encoding : chunked",),
        ("Transfer-Encoding: chunked, identity",),
        ("Transfer-Encoding: identity, chunked", "Content-Length: 4"),
        ("Transfer-Encoding:\x0bchunked",),
        ("Content-Length: 4", "Content-Length: 0"),
        ("Content-Length: 4, 4",),
        ("Content-Length: +4",),
        ("Content-Length: 0x4",),
        ("X: y\n Transfer-Encoding: chunked", "Content-Length: 4"),
    ],
)
async def test_a_second_request_cannot_be_smuggled_in(server: Server, headers: tuple[str, ...]) -> None:
    hidden = get("/health")
    data = "\r\n".join(["POST /v1/chat/completions HTTP/1.1", "Host: x", *headers, "", ""]).encode("latin-1")
    async with wire(server.url) as line:
        await line.send(data + b"0\r\n\r\n" + hidden)
        everything = await line.rest()
    assert everything.count(b"HTTP/1.1 ") == 1, everything
    assert everything.startswith(b"HTTP/1.1 400 ")
    assert b'{"status":"ok"}' not in everything


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("ended", [True, False])
async def test_an_oversized_head_gets_431(server: Server, at_once: bool, ended: bool) -> None:
    async with wire(server.url) as line:
        head = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 40_000 + (b"\r\n\r\n" if ended else b"")
        for start in range(0, len(head), 50_000 if at_once else 7_000):
            await line.send(head[start : start + (50_000 if at_once else 7_000)])
            await asyncio.sleep(0)
        is_error(await line.reply(), 431, "header_too_large")
        assert await line.rest() == b""


async def test_a_head_just_below_the_bound_passes(server: Server) -> None:
    async with wire(server.url) as line:
        await line.send(get("/health", "X-Long: " + "a" * 32_000))
        assert (await line.reply()).status == 200


@pytest.mark.parametrize("declared", [True, False])
async def test_an_oversized_body_gets_413(server: Server, declared: bool) -> None:
    body = b'"' + b"a" * 150_000 + b'"'
    async with wire(server.url) as line:
        if declared:
            await line.send(post(body))
        else:
            key = f"Authorization: Bearer {ADMIN_KEY}"
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{key}\r\nTransfer-Encoding: chunked\r\n\r\n"
            await line.send(head.encode() + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        is_error(await line.reply(), 413, "payload_too_large")


async def test_a_connection_serves_one_request_after_another(server: Server) -> None:
    async with wire(server.url) as line:
        for _ in range(20):
            await line.send(post(BODY))
            assert text_of(await line.reply()) == TEXT


async def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    async with wire(server.url) as line:
        await line.send(b"".join([post(BODY), get("/health"), get("/nowhere"), post(BODY)]))
        assert text_of(await line.reply()) == TEXT
        assert (await line.reply()).json == {"status": "ok"}
        assert (await line.reply()).status == 404
        assert text_of(await line.reply()) == TEXT


@pytest.mark.parametrize("cut", [20, len(post(BODY)) - len(BODY) + 5])
async def test_a_request_that_begins_in_the_packet_of_another_is_whole_later(server: Server, cut: int) -> None:
    second = post(BODY)
    async with wire(server.url) as line:
        await line.send(get("/health") + second[:cut])
        assert (await line.reply()).status == 200
        await line.send(second[cut:])
        assert text_of(await line.reply()) == TEXT


@pytest.mark.parametrize("cut", [20, len(post(BODY)) - len(BODY) + 5])
async def test_a_half_request_behind_another_has_a_deadline(server: Server, cut: int) -> None:
    long = json.dumps({"model": "fake", "messages": [{"role": "user", "content": "[[fake tokens=60 rate=10]]"}]})

    async def closed(_number: int) -> float:
        async with wire(server.url) as line:
            began = asyncio.get_running_loop().time()
            await line.send(post(long.encode()) + post(BODY)[:cut])
            everything = await line.rest()
            assert everything.count(b"HTTP/1.1") <= 1
            return asyncio.get_running_loop().time() - began

    await within(5, closed)


async def test_rubbish_behind_a_stream_does_not_write_into_it(server: Server) -> None:
    long = json.dumps(
        {"model": "fake", "messages": [{"role": "user", "content": "[[fake tokens=60 rate=20]]"}], "stream": True}
    )
    async with wire(server.url) as line:
        await line.send(post(long.encode()))
        await line.reader.readuntil(b"tok0")
        await line.send(b"GARBAGE\r\n\r\n")
        assert b"HTTP/1.1" not in await line.rest()


async def test_expect_100_continue(server: Server) -> None:
    whole = post(BODY, "Expect: 100-continue")
    async with wire(server.url) as line:
        await line.send(whole[: -len(BODY)])
        assert (await line.reply()).status == 100
        await line.send(BODY)
        assert text_of(await line.reply()) == TEXT


async def test_expect_100_continue_without_a_key_is_refused_before_the_body(server: Server) -> None:
    whole = post(BODY, "Expect: 100-continue", key="wrong")
    async with wire(server.url) as line:
        await line.send(whole[: -len(BODY)])
        is_error(await line.reply(), 401, "invalid_api_key")


async def test_a_chunked_body(server: Server) -> None:
    head = post(b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
    async with wire(server.url) as line:
        await line.send(head)
        for byte in BODY:
            await line.send(b"1;extension=1\r\n%c\r\n" % byte)
        await line.send(b"0\r\nTrailer: x\r\n\r\n")
        assert text_of(await line.reply()) == TEXT


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "PATCH", "PROPFIND"])
@pytest.mark.parametrize("path", ["/health", "/v1/chat/completions", "/nowhere", "/admin/models"])
async def test_other_methods_are_refused(server: Server, method: str, path: str) -> None:
    async with wire(server.url) as line:
        await line.send(get(path, f"Authorization: Bearer {ADMIN_KEY}", "X-Secret: echo", method=method))
        reply = await line.reply(head_only=method == "HEAD")
        assert reply.status == (404 if path == "/nowhere" else 405)
        assert b"echo" not in reply.body
        if method != "HEAD":
            assert set(reply.json["error"]) == {"message", "type", "param", "code"}


async def test_http_1_0_is_answered_and_closed(server: Server) -> None:
    reply, rest = await exchange(server, b"GET /health HTTP/1.0\r\n\r\n")
    assert (reply.status, rest) == (200, b"")


async def test_an_upgrade_is_not_followed(server: Server) -> None:
    async with wire(server.url) as line:
        await line.send(get("/health", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x"))
        assert (await line.reply()).status == 200


async def test_odd_headers_do_no_harm(server: Server) -> None:
    odd = [
        "\xff\xfe: x",
        "X: \x80\xff\x7f",
        "X-Request-ID: ../../x y\xe9",
        "Authorization: \xe9\xe8",
        "traceparent: \xff",
    ]
    for header in [*odd, "X-Api-Key: " + "k" * 5000, "Content-Encoding: gzip", "Host: a", "Cookie: " + ";" * 9000]:
        async with wire(server.url) as line:
            await line.send(post(BODY, header))
            reply = await line.reply()
            assert reply.status in {200, 400, 401}, (header, reply)
            if reply.status != 200:
                assert set(reply.json["error"]) == {"message", "type", "param", "code"}
            else:
                assert reply.headers["x-request-id"].startswith("req_")


async def test_connections_from_one_address_are_limited() -> None:
    async with serving_well(FAKE + "\n[http]\nconnections_per_address_max = 20\n") as server:
        host, port = server.url.removeprefix("http://").split(":")
        lines = [await asyncio.open_connection(host, int(port)) for _ in range(40)]
        ends = [asyncio.create_task(_ended(reader)) for reader, _ in lines]
        await eventually(lambda: sum(end.done() for end in ends) >= 20, what="20 connections to be turned away")
        assert sum(end.done() for end in ends) <= 22  # the session of the test itself has one or two
        for _, writer in lines:
            writer.transport.abort()
        await asyncio.gather(*ends)
        await eventually(server.ready, what="room for new connections")
        assert await server.metric("forebay_connections_closed_total", reason="connections_per_address_max") >= 18


async def _ended(reader: asyncio.StreamReader) -> None:
    try:
        assert await reader.read(1) == b""
    except ConnectionError:
        return


async def test_connections_in_all_are_limited() -> None:
    async with serving(FAKE + "\n[http]\nconnections_max = 10\n") as server:
        host, port = server.url.removeprefix("http://").split(":")
        lines = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
        ends = [asyncio.create_task(_ended(reader)) for reader, _ in lines]
        await eventually(lambda: sum(end.done() for end in ends) >= 10, what="10 connections to be turned away")
        for _, writer in lines:
            writer.transport.abort()
        await asyncio.gather(*ends)
        await eventually(server.ready, what="room for new connections")
        assert await server.metric("forebay_connections_closed_total", reason="connections_max") >= 9
