"""The one way out to an address that a user supplied: parsed once, resolved once, checked, and connected to as checked.

It refuses every address that is not public, unless the settings open its network, and it follows no redirect, keeps no
cookie, asks no proxy and unpacks nothing.
"""

import asyncio
import re
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import aiohttp
import idna
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from forebay.clock import Clock
from forebay.config import OutboundSettings
from forebay.errors import InvalidRequest, SetupError, Unreachable

URL_CHARS_MAX = 2048
_ADDRESSES_MAX = 4  # how many of a name's addresses are tried
_LOOKUPS_AT_ONCE = 16  # a name server that does not answer holds a thread for as long as the system waits for it
_PIECE_BYTES = 16_384
_KEPT_HEADERS = ("content-type", "retry-after")
_DEFAULT_PORTS = {"http": 80, "https": 443}

# What a URL may look like. Nothing that two parsers could read in two ways is let through: no user, no fragment, no
# backslash, no space, no control character, no bracket but that of an IPv6 address.
_URL = re.compile(
    r"(?P<scheme>[hH][tT][tT][pP][sS]?)://(?P<host>\[[0-9a-fA-F:.]+\]|[^\x00-\x20\x7f/?#@:\[\]\\%]+)(?::(?P<port>[1-9][0-9]{0,4}))?"
    r"(?P<path>/(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9a-fA-F]{2})*)?"
    r"(?:\?(?P<query>(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9a-fA-F]{2})*))?"
)
_NAME = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # a last label that makes some parsers read an IPv4 address
_NAME_CHARS_MAX = 253

_NOT_PUBLIC_V4 = tuple(
    IPv4Network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # looks public, and is the inside of one cloud
    )
)
_PUBLIC_V6 = IPv6Network("2000::/3")  # the only part of the space that is given out; mapped forms lie outside
_NOT_PUBLIC_V6 = tuple(
    IPv6Network(text)
    for text in (
        "2001::/23",  # protocol assignments, among them Teredo, which hides an IPv4 address
        "2001:db8::/32",
        "2002::/16",  # 6to4 hides one too
        "3fff::/20",
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")  # how an IPv6-only network shows IPv4 addresses: judged by the one inside

_Address = IPv4Address | IPv6Address
_Network = IPv4Network | IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `whole` is false where the body was cut by the limit of time or size."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    whole: bool


@dataclass(frozen=True, slots=True)
class _Target:
    """A URL taken apart; `address` where its host is a literal one."""

    url: URL
    host: str
    port: int
    address: _Address | None


class Outbound:
    """Sends requests to addresses that users supplied. `resolve` turns a name and a port into addresses."""

    def __init__(self, settings: OutboundSettings, clock: Clock, resolve: Resolve | None = None) -> None:
        self._allowed = _networks(settings.allowed_networks)
        self._connect_seconds = settings.connect_timeout_seconds
        self._clock = clock
        self._lookups = _Lookups()
        self._resolve = resolve or self._lookups.ask

    async def close(self) -> None:
        """Begin no further look-up, and wait for none."""
        self._lookups.close()

    def check(self, url: str, *, hosts: Sequence[str] = ("*",), param: str = "url") -> None:
        """Raise InvalidRequest (`url_not_allowed`) for what can be refused without asking a name server.

        `hosts` are as those of `get`, and `param` is the field that the URL came in.
        """
        try:
            self._check(_from_one_of(hosts, url))
        except InvalidRequest as error:
            error.param = param
            raise

    def _check(self, target: _Target) -> None:
        if target.address is not None:
            self._admit([target.address])
        elif target.host == "localhost" or target.host.endswith(".localhost"):
            self._admit([IPv4Address("127.0.0.1")])

    async def post(
        self, url: str, body: bytes, headers: Mapping[str, str], *, timeout_seconds: float, bytes_max: int
    ) -> Answer:
        """Send `body` and read at most `bytes_max` bytes of the answer, within `timeout_seconds` in all.

        Raises InvalidRequest (`url_not_allowed`) before anything is sent, and Unreachable if no answer began in time.
        """
        return await self._send("POST", _parse(url), body, headers, timeout_seconds, bytes_max)

    async def get(self, url: str, *, hosts: Sequence[str], timeout_seconds: float, bytes_max: int) -> Answer:
        """The same without a body, from one of `hosts`: a name, `*.` and a name for what is below it, or `*`."""
        return await self._send("GET", _from_one_of(hosts, url), None, {}, timeout_seconds, bytes_max)

    async def download(
        self, url: str, write: Callable[[bytes], Awaitable[None]], *, hosts: Sequence[str], timeout_seconds: float
    ) -> Answer:
        """The same, with each piece of a body of status 200 handed to `write`, and none in the answer.

        Raises what `write` raises, which then is the end of it.
        """
        target = _from_one_of(hosts, url)
        async with self._response("GET", target, None, {}, timeout_seconds) as (response, seconds):
            whole = response.status != 200 or await self._pass_on(response, write, seconds)
            return Answer(response.status, _kept(response), b"", whole)

    async def _send(
        self,
        method: str,
        target: _Target,
        body: bytes | None,
        headers: Mapping[str, str],
        timeout_seconds: float,
        bytes_max: int,
    ) -> Answer:
        async with self._response(method, target, body, headers, timeout_seconds) as (response, seconds):
            content, whole = await self._read(response, bytes_max, seconds)
        return Answer(response.status, _kept(response), content, whole)

    @asynccontextmanager
    async def _response(
        self, method: str, target: _Target, body: bytes | None, headers: Mapping[str, str], timeout_seconds: float
    ) -> AsyncIterator[tuple[aiohttp.ClientResponse, float]]:
        """An answer whose body has not been read, and how many seconds are left for that."""
        fields = {"accept-encoding": "identity", "user-agent": "forebay", **headers}
        ends_at = self._clock.monotonic() + timeout_seconds
        with _told():
            async with self._clock.timeout(timeout_seconds):
                addresses = await self._addresses(target)
        async with self._session(target, addresses) as session:
            with _told():
                async with self._clock.timeout(ends_at - self._clock.monotonic()):
                    response = await session.request(
                        method, target.url, data=body, headers=fields, allow_redirects=False
                    )
            async with response:
                yield response, ends_at - self._clock.monotonic()

    async def _read(self, response: aiohttp.ClientResponse, bytes_max: int, seconds: float) -> tuple[bytes, bool]:
        """As much of the body as the limits let through, and whether that is all of it."""
        content = bytearray()
        try:
            async with self._clock.timeout(seconds):
                async for piece in response.content.iter_chunked(_PIECE_BYTES):
                    content += piece
                    if len(content) > bytes_max:
                        break
                else:
                    return bytes(content), True
        except (aiohttp.ClientError, OSError, TimeoutError):
            pass  # the status came; who needs the whole body asks `whole`
        response.close()
        return bytes(content[:bytes_max]), False

    async def _pass_on(
        self, response: aiohttp.ClientResponse, write: Callable[[bytes], Awaitable[None]], seconds: float
    ) -> bool:
        """Hand on the body; whether that was all of it. Whoever asked takes care of a limit of size."""
        whole = False
        try:
            async with self._clock.timeout(seconds):
                async for piece in response.content.iter_chunked(_PIECE_BYTES):
                    await write(piece)
            whole = True
        except (aiohttp.ClientError, OSError, TimeoutError):
            pass  # the status came; who needs the whole body asks `whole`
        finally:
            if not whole:
                response.close()
        return whole

    def _session(self, target: _Target, addresses: Sequence[_Address]) -> aiohttp.ClientSession:
        """A session that can reach these addresses and nothing else, whatever a name says by then."""
        connector = aiohttp.TCPConnector(
            resolver=_Fixed(target, addresses),
            use_dns_cache=False,
            force_close=True,
            socket_factory=_gate({str(address) for address in addresses}),
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_seconds),
        )

    async def _addresses(self, target: _Target) -> list[_Address]:
        """Where the host is, resolved here and nowhere else. Raises InvalidRequest if any of it is not allowed."""
        if target.address is not None:
            found = [target.address]
        else:
            async with self._clock.timeout(self._connect_seconds):
                found = [_address(text) for text in await self._resolve(target.host, target.port)]
        if not found:
            raise Unreachable("The host of that address has no address.")
        self._admit(found)
        return found[:_ADDRESSES_MAX]

    def _admit(self, addresses: Iterable[_Address]) -> None:
        if not all(is_public(each) or self._is_open(each) for each in addresses):
            raise _refused("That address is not a public one, and this server may not reach it.")

    def _is_open(self, address: _Address) -> bool:
        inner = _inside(address)
        return any(each in network for network in self._allowed for each in (address, inner) if each is not None)


class _Lookups:
    """Asks the system where names are, on threads of its own: the loop's must not wait for a stranger's name server.

    Nor must the end of the process, which waits for the threads of every executor: a look-up cannot be interrupted.
    """

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(_LOOKUPS_AT_ONCE)
        self._closed = False

    def close(self) -> None:
        """Begin nothing more."""
        self._closed = True

    async def ask(self, host: str, port: int) -> Sequence[str]:
        """The addresses of a name. Whoever gives up leaves the thread behind, in its place, until the system answers."""
        if self._closed:
            raise Unreachable("This server is stopping.")
        await self._places.acquire()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Sequence[str]] = loop.create_future()

        def ended(found: Sequence[str] | Exception) -> None:
            self._places.release()
            if answer.done():
                return  # whoever asked has given up
            if isinstance(found, Exception):
                answer.set_exception(found)
            else:
                answer.set_result(found)

        def look() -> None:
            found = _look_up(host, port)
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(ended, found)

        threading.Thread(target=look, name="resolve", daemon=True).start()
        return await answer


def _look_up(host: str, port: int) -> Sequence[str] | Exception:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class _Fixed(AbstractResolver):
    """Answers with the addresses that were checked."""

    def __init__(self, target: _Target, addresses: Sequence[_Address]) -> None:
        self._target = target
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            {
                "hostname": host,
                "host": str(address),
                "port": self._target.port,
                "family": socket.AF_INET if address.version == 4 else socket.AF_INET6,
                "proto": 0,
                "flags": socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            }
            for address in self._addresses
        ]

    async def close(self) -> None:
        """There is nothing to close."""


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address belongs to the public internet. Written out, for Python's own opinion changes by version."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_V4)
    inner = _inside(address)
    if inner is not None:
        return is_public(inner)
    if address.scope_id is not None or address not in _PUBLIC_V6:
        return False
    return not any(address in network for network in _NOT_PUBLIC_V6)


def _inside(address: _Address) -> IPv4Address | None:
    """The IPv4 address that a NAT64 gateway would make of it."""
    if isinstance(address, IPv6Address) and address in _NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return None


def _gate(allowed: set[str]) -> Callable[[aiohttp.AddrInfoType], socket.socket]:
    """The last look before a connection: whatever led there, it goes to a checked address or not at all."""

    def make(info: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, _, address = info
        if str(address[0]) not in allowed:
            raise OSError("an address that was not checked")
        return socket.socket(family, kind, protocol)

    return make


def _parse(text: str) -> _Target:
    """Take a URL apart: the only parser there is. What is connected to is built from its parts."""
    match = _URL.fullmatch(text) if len(text) <= URL_CHARS_MAX else None
    if match is None:
        raise _refused(
            "That is no http or https URL that this server can use. Write it with a host and a path alone: no user, "
            "fragment, space or backslash, and everything beyond ASCII in percent-encoding."
        )
    scheme = match["scheme"].lower()
    port = int(match["port"] or _DEFAULT_PORTS[scheme])
    if port > 65_535:
        raise _refused("The port of that URL is not between 1 and 65535.")
    host, address = _host(match["host"])
    written = f"[{host}]" if isinstance(address, IPv6Address) else host
    query = f"?{match['query']}" if match["query"] else ""
    url = URL(f"{scheme}://{written}:{port}{match['path'] or '/'}{query}", encoded=True)
    return _Target(url, host, port, address)


def _host(text: str) -> tuple[str, _Address | None]:
    """The host as it is connected to, and its address if it is one."""
    if text.startswith("["):
        try:
            address = IPv6Address(text[1:-1])
        except ValueError:
            raise _refused("What stands in brackets in that URL is no IPv6 address.") from None
        return str(address), address
    name = _ascii(text)
    last = name.rpartition(".")[2]
    if _NUMBER.fullmatch(last):
        try:
            return name, IPv4Address(name)
        except ValueError:
            raise _refused("The host of that URL ends in a number and is no IPv4 address of four parts.") from None
    if len(name) > _NAME_CHARS_MAX or not _NAME.fullmatch(name):
        raise _refused("The host of that URL is no valid name. Write it without a dot at the end.")
    return name, None


def _ascii(name: str) -> str:
    if name.isascii():
        return name.lower()
    try:
        return idna.encode(name.lower(), strict=True, uts46=False).decode("ascii")
    except UnicodeError:  # also what the library says of a name that is none
        raise _refused("The host of that URL is no valid international name. Write it in its `xn--` form.") from None


def _from_one_of(hosts: Sequence[str], url: str) -> _Target:
    target = _parse(url)
    if not any(_is_host(target.host, pattern) for pattern in hosts):
        raise _refused("This server may not fetch from the host of that URL.")
    return target


def _kept(response: aiohttp.ClientResponse) -> dict[str, str]:
    return {name: response.headers[name] for name in _KEPT_HEADERS if name in response.headers}


def _is_host(host: str, pattern: str) -> bool:
    wanted = pattern.lower()
    if wanted.startswith("*."):
        return host.endswith(wanted[1:])
    return wanted in {"*", host}


def _address(text: str) -> _Address:
    try:
        return ip_address(text)
    except ValueError:
        raise _refused("The host of that URL has an address that cannot be read.") from None


def _networks(texts: Iterable[str]) -> tuple[_Network, ...]:
    found = []
    for text in texts:
        try:
            found.append(ip_network(text))
        except ValueError as error:
            raise SetupError(
                f"`outbound.allowed_networks` has `{text}`, which is no network ({error}). Write it as 10.0.0.0/8."
            ) from None
    return tuple(found)


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="url", code="url_not_allowed")


@contextmanager
def _told() -> Iterator[None]:
    """Turn what a connection can run into into Unreachable."""
    try:
        yield
    except TimeoutError:
        raise Unreachable("The address did not answer in time.") from None
    except aiohttp.ClientConnectorCertificateError:
        raise Unreachable("The certificate of that address is not valid for it.") from None
    except (aiohttp.ClientError, OSError) as error:
        raise Unreachable(f"The address cannot be reached: {_kind(error)}.") from None


def _kind(error: Exception) -> str:
    """What went wrong in words, without an address."""
    if isinstance(error, socket.gaierror):
        return "its host is not known"
    if isinstance(error, aiohttp.ClientSSLError):
        return "there is no TLS there"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "nobody takes the connection"
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError | OSError):
        return "the connection was cut"
    return "what it answers is not HTTP"
