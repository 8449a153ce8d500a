"""The way out against hostile URLs, resolvers and receivers: a canary on loopback is never reached."""

import asyncio
import ssl
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from forebay.clock import SystemClock
from forebay.config import OutboundSettings
from forebay.errors import InvalidRequest, Unreachable
from forebay.outbound import Answer as Got
from forebay.outbound import Outbound, Resolve
from tests.support.hostile_urls import hostile_urls
from tests.support.receiver import Answer, Canary, Receiver, canary, receiving

TLS = Path(__file__).parents[1] / "support" / "tls"


class Resolver:
    """Answers as it is told, in turn, and counts; the last answer is for ever."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def outbound(*allowed: str, resolve: Resolve | None = None, connect_seconds: float = 5) -> Outbound:
    settings = OutboundSettings(allowed_networks=allowed, connect_timeout_seconds=connect_seconds)
    return Outbound(settings, SystemClock(), resolve)


async def post(way: Outbound, url: str, *, seconds: float = 10, bytes_max: int = 1000, body: bytes = b"{}") -> Got:
    return await way.post(url, body, {"content-type": "application/json"}, timeout_seconds=seconds, bytes_max=bytes_max)


@pytest.fixture
async def bird() -> AsyncIterator[Canary]:
    async with canary() as one:
        yield one
        assert one.connections == 0


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving("127.0.0.2") as one:
        yield one


@pytest.mark.parametrize("answer", [["127.0.0.1"], ["::1"], ["::1", "127.0.0.1"], ["::ffff:127.0.0.1"]])
async def test_no_hostile_url_reaches_the_canary(bird: Canary, answer: list[str]) -> None:
    resolver = Resolver(answer)
    way = outbound(resolve=resolver)
    for url in hostile_urls(bird.port):
        with pytest.raises(InvalidRequest) as caught:
            await post(way, url)
        assert caught.value.code == "url_not_allowed", url
    assert len(resolver.asked) > 5  # names got as far as the resolver, and no further


async def test_the_canary_is_reached_where_that_is_allowed() -> None:
    """So that the test above can fail."""
    async with canary() as bird:
        with pytest.raises(Unreachable):
            await post(outbound("127.0.0.0/8"), f"http://127.0.0.1:{bird.port}/")
        assert bird.connections == 1


async def test_the_systems_own_resolver_is_checked_too(bird: Canary) -> None:
    with pytest.raises(InvalidRequest):
        await post(outbound(), f"http://localhost:{bird.port}/")


async def test_rebinding_is_of_no_use(bird: Canary, receiver: Receiver) -> None:
    """A name that was resolved and checked is not resolved again; 127.0.0.2 stands for a public address."""
    port = receiver.url.rpartition(":")[2]
    resolver = Resolver(["127.0.0.2"], ["127.0.0.1"])
    way = outbound("127.0.0.2/32", resolve=resolver)
    url = f"http://rebind.example:{port}/"
    assert (await post(way, url)).status == 200
    assert resolver.asked == ["rebind.example"]
    assert receiver.received[0].headers["host"] == f"rebind.example:{port}"
    with pytest.raises(InvalidRequest):
        await post(way, f"http://rebind.example:{bird.port}/")
    assert len(resolver.asked) == 2  # no memory of the first answer, no kept connection


async def test_one_bad_address_among_good_ones_is_enough(bird: Canary, receiver: Receiver) -> None:
    port = receiver.url.rpartition(":")[2]
    for answer in (["127.0.0.2", "127.0.0.1"], ["127.0.0.1", "127.0.0.2"], ["127.0.0.2", "::1"]):
        with pytest.raises(InvalidRequest):
            await post(outbound("127.0.0.2/32", resolve=Resolver(answer)), f"http://mixed.example:{port}/")
    assert receiver.received == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_an_answer_and_is_not_followed(bird: Canary, receiver: Receiver, status: int) -> None:
    receiver.then = Answer(status, {"location": f"http://127.0.0.1:{bird.port}/", "refresh": "0; url=http://[::1]/"})
    assert (await post(outbound("127.0.0.2/32"), f"{receiver.url}/hook")).status == status
    assert [request.path for request in receiver.received] == ["/hook"]


async def test_no_proxy_of_the_environment_is_asked(
    bird: Canary, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{bird.port}")
    assert (await post(outbound("127.0.0.2/32"), receiver.url)).status == 200


async def test_what_is_sent_and_what_comes_back(receiver: Receiver) -> None:
    receiver.then = Answer(
        202, {"retry-after": "7", "set-cookie": "a=b", "content-type": "text/x", "location": "/y"}, b"hello"
    )
    way = outbound("127.0.0.0/8")
    for _ in range(2):
        got = await post(way, f"{receiver.url}/a%2Fb?x=%20y", body=b'{"a":1}')
    assert got == Got(202, {"content-type": "text/x", "retry-after": "7"}, b"hello", whole=True)
    request = receiver.received[1]
    assert (request.path, request.body) == ("/a%2Fb?x=%20y", b'{"a":1}')
    assert request.headers["user-agent"] == "forebay"
    assert request.headers["accept-encoding"] == "identity"
    assert "cookie" not in request.headers
    await way.close()


async def test_a_body_is_cut_at_the_limit_and_not_unpacked(receiver: Receiver) -> None:
    way = outbound("127.0.0.0/8")
    receiver.then = Answer(200, {"content-encoding": "gzip"}, b"not gzip at all" * 10)
    assert (await post(way, receiver.url)).body == b"not gzip at all" * 10
    receiver.then = Answer(200, {}, b"x" * 1000)
    assert await post(way, receiver.url) == Got(200, {"content-type": "application/octet-stream"}, b"x" * 1000, True)
    receiver.then = Answer(200, {}, b"x" * 1001)
    got = await post(way, receiver.url)
    assert (got.status, got.body, got.whole) == (200, b"x" * 1000, False)


async def test_a_body_without_end_is_cut(receiver: Receiver) -> None:
    receiver.then = Answer(200, endless=True)
    got = await post(outbound("127.0.0.0/8"), receiver.url)
    assert (got.status, len(got.body), got.whole) == (200, 1000, False)
    await asyncio.wait_for(receiver.left.wait(), 5)
    assert receiver.sent_bytes < 64 * 2**20  # what the system's own buffers take, and no more


async def test_a_body_that_stalls_is_cut_in_time(receiver: Receiver) -> None:
    receiver.then = Answer(200, stalls=True)
    async with asyncio.timeout(5):
        got = await post(outbound("127.0.0.0/8"), receiver.url, seconds=0.3)
    assert (got.status, got.body, got.whole) == (200, b"x", False)
    await asyncio.wait_for(receiver.left.wait(), 5)


async def test_silence_ends_in_time(receiver: Receiver) -> None:
    receiver.then = Answer(never=True)
    async with asyncio.timeout(5):
        with pytest.raises(Unreachable, match="in time"):
            await post(outbound("127.0.0.0/8"), receiver.url, seconds=0.3)
    await asyncio.wait_for(receiver.left.wait(), 5)


HUNG_NAME_SERVER = """
import asyncio, socket, threading
from forebay.clock import SystemClock
from forebay.config import OutboundSettings
from forebay.errors import Unreachable
from forebay.outbound import Outbound

asked = threading.Semaphore(0)

def hang(*_: object, **__: object) -> list[object]:
    asked.release()
    threading.Event().wait()

socket.getaddrinfo = hang

async def main() -> None:
    way = Outbound(OutboundSettings(connect_timeout_seconds=0.1), SystemClock())
    asking = [way.post("http://hung.example/", b"", {}, timeout_seconds=5, bytes_max=1) for _ in range(20)]
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(each) for each in answers] == [Unreachable] * 20, answers
    assert [asked.acquire(blocking=False) for _ in range(17)] == [True] * 16 + [False], "as many as there are threads"
    await way.close()

asyncio.run(main())
"""


async def test_a_name_server_that_hangs_does_not_hold_up_the_end_of_the_process() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", HUNG_NAME_SERVER)
    try:
        async with asyncio.timeout(20):
            assert await process.wait() == 0
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_a_resolver_that_never_answers_is_given_up() -> None:
    async def never(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    async with asyncio.timeout(5):
        with pytest.raises(Unreachable, match="in time"):
            await post(outbound(resolve=never, connect_seconds=0.2), "http://example.com/")


async def test_a_name_without_an_address_is_unreachable() -> None:
    with pytest.raises(Unreachable, match="no address"):
        await post(outbound(resolve=Resolver([])), "http://example.com/")


async def test_a_receiver_that_cuts_the_line(receiver: Receiver) -> None:
    receiver.then = Answer(drop=True)
    with pytest.raises(Unreachable, match="cut"):
        await post(outbound("127.0.0.0/8"), receiver.url)


async def test_nobody_is_there(receiver: Receiver, unused_tcp_port: int) -> None:
    with pytest.raises(Unreachable, match="nobody") as caught:
        await post(outbound("127.0.0.0/8"), f"http://127.0.0.2:{unused_tcp_port}/")
    assert "127.0.0" not in str(caught.value)


async def test_what_is_not_http_is_no_answer() -> None:
    async def babble(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 smtp ready\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(babble, "127.0.0.2", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Unreachable):
            await post(outbound("127.0.0.0/8"), f"http://127.0.0.2:{port}/")


async def test_a_certificate_that_nobody_vouches_for_is_refused() -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(TLS / "certificate.pem", TLS / "key.pem")
    async with receiving("127.0.0.2", tls=context) as receiver:
        with pytest.raises(Unreachable, match="certificate"):
            await post(outbound("127.0.0.0/8"), receiver.url)
        assert receiver.received == []


async def test_a_certificate_is_checked_against_the_name_and_not_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(TLS / "certificate.pem", TLS / "key.pem")
    trusting = ssl.create_default_context(cafile=str(TLS / "certificate.pem"))  # it is for `localhost`
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", trusting)
    way = outbound("127.0.0.2/32", resolve=Resolver(["127.0.0.2"]))
    async with receiving("127.0.0.2", tls=context) as receiver:
        port = receiver.url.rpartition(":")[2]
        assert (await post(way, f"https://localhost:{port}/")).status == 200
        for host in ("other.example", "127.0.0.2"):
            with pytest.raises(Unreachable, match="certificate"):
                await post(way, f"https://{host}:{port}/")
        assert len(receiver.received) == 1
