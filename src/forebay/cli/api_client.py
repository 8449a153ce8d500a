"""A running server as the commands see it: requests whose troubles are sentences.

It refuses to take a key on the command line, where every process of the machine could read it.
"""

import contextlib
import functools
import getpass
import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar
from urllib.parse import quote, urlencode

import aiohttp
import typer

from forebay import config
from forebay.cli.options import run, sentences
from forebay.clock import SystemClock
from forebay.errors import SetupError

_EVENT_BYTES_MAX = 4 * 2**20
_ANSWER_BYTES_MAX = 64 * 2**20
_ERROR_BYTES_MAX = 65_536
_DONE = (200, 202)
_CONNECT_SECONDS = 10.0
_QUIET_SECONDS = 300.0
_T = TypeVar("_T")
_NO_ANSWER = "The server sent something that is not an answer."

ServerUrl = Annotated[str, typer.Option("--url", help="Address of the server.")]
KeyFile = Annotated[
    Path | None, typer.Option("--key-file", help="File with the API key; else OPENAI_API_KEY, else it is asked for.")
]
LOCAL_SERVER = "http://127.0.0.1:8000"


class NotNow(SetupError):
    """That did not go well; the same may do so a moment later."""


class Busy(NotNow):
    """The server has no room for it right now, and has done nothing."""


def api_key(key_file: Path | None) -> str:
    """The key to use. Raises SetupError if there is none and nobody to ask, or none that could be sent."""
    given = config.environment().get("OPENAI_API_KEY", "").strip()
    if key_file is not None:
        key, where = config.read_secret(key_file), f"The file {key_file}"
    elif given:
        key, where = given, "The environment variable OPENAI_API_KEY"
    elif sys.stdin.isatty():
        key, where = _typed_key(), "What was typed"
    else:
        raise SetupError("An API key is needed. Give it with --key-file, or set OPENAI_API_KEY.")
    if not (key.isascii() and key.isprintable()):
        raise SetupError(
            f"{where} holds no key that could travel in a header. It has to be one line of ASCII: the key alone, as "
            "`forebay keys create` shows it."
        )
    return key


@functools.cache
def _typed_key() -> str:
    """What the person types, who is asked once."""
    with contextlib.suppress(EOFError, UnicodeDecodeError):
        return getpass.getpass("API key (not shown): ").strip()
    raise SetupError("An API key is needed. `forebay keys create` makes one.")


def path_of(*parts: str, **query: str | int | None) -> str:
    """A path of the API: its parts quoted, and the parameters that are given."""
    path = "/v1/" + "/".join(quote(part, safe="") for part in parts)
    given = {name: str(value) for name, value in query.items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


class ApiClient:
    """Requests to one server; used as a context. Every method raises SetupError with what to do."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key = key
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True),  # a kept one goes stale while a person thinks
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_QUIET_SECONDS),
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    def request(self, method: str, path: str, **content: Any) -> "_Request":
        """A request as a context, which gives the answer once its status is one of success."""
        assert self._session is not None
        return _Request(self._session, method, self.url + path, content)

    async def call(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        """A request and its JSON object."""
        async with self.request(method, path, **content) as response:
            return _parsed(await _read(response, _ANSWER_BYTES_MAX))

    async def events(
        self, path: str, method: str = "GET", bytes_max: int = _EVENT_BYTES_MAX, **content: Any
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The parsed events of a stream, none longer than `bytes_max`, with their names as `event`."""
        async with self.request(method, path, **content) as response:
            async for block in blocks_of(response, bytes_max):
                name, data = b"", b""
                for line in block.splitlines():
                    name = line[6:].strip() if line.startswith(b"event:") else name
                    data = line[5:].strip() if line.startswith(b"data:") else data
                if data:
                    yield {"event": name.decode(errors="replace"), "data": _parsed(data)}


def ask(
    url: str, key_file: Path | None, work: Callable[[ApiClient], Awaitable[_T]], interrupted: str = "Stopped."
) -> _T:
    """Do the work with a client; what goes wrong becomes one sentence and status 1, Ctrl-C `interrupted` and 130."""

    async def connected(key: str) -> _T:
        async with ApiClient(url, key) as client:
            return await work(client)

    with sentences(interrupted):
        return run(connected(api_key(key_file)))


class _Request:
    """Leaving the block early closes the connection, which cancels the work."""

    def __init__(self, session: aiohttp.ClientSession, method: str, url: str, content: dict[str, Any]) -> None:
        self._session, self._method, self._url, self._content = session, method, url, content
        self._response: aiohttp.ClientResponse | None = None

    async def __aenter__(self) -> aiohttp.ClientResponse:
        try:
            self._response = await self._session.request(self._method, self._url, **self._content)
            if (status := self._response.status) not in _DONE:
                kind = Busy if status == 429 else NotNow if status >= 500 else SetupError
                raise kind(await _refusal(self._response))
            return self._response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._explain(error) from None

    async def __aexit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._response is not None:
            self._response.close()
            await SystemClock().sleep(0)  # a prompt blocks the loop that would close the connection later
        if isinstance(error, aiohttp.ClientError | TimeoutError):
            raise self._explain(error) from None

    def _explain(self, error: Exception) -> SetupError:
        where = self._url.partition("/v1/")[0]
        if isinstance(error, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError):
            return SetupError(f"{where} is no address of a server. Write it as {LOCAL_SERVER}.")
        if isinstance(error, aiohttp.ClientConnectorError):
            return NotNow(f"No server answers at {where}. Start one with `forebay serve`, or name another with --url.")
        if isinstance(error, TimeoutError):
            return NotNow(f"The server at {where} has been silent for too long.")
        return NotNow(f"The connection to {where} broke off ({type(error).__name__}). Ask again.")


async def blocks_of(response: aiohttp.ClientResponse, bytes_max: int = _EVENT_BYTES_MAX) -> AsyncIterator[bytes]:
    """The events of a stream as they came. Raises SetupError for one without end."""
    buffer, searched = bytearray(), 0
    async for data in response.content.iter_any():
        buffer += data
        while (end := buffer.find(b"\n\n", searched)) >= 0:
            yield bytes(buffer[:end])
            del buffer[: end + 2]
            searched = 0
        searched = max(0, len(buffer) - 1)
        if len(buffer) > bytes_max:
            raise SetupError(_NO_ANSWER)


async def _read(response: aiohttp.ClientResponse, bytes_max: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > bytes_max:
            raise SetupError(_NO_ANSWER)
        parts.append(part)
    return b"".join(parts)


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        raise SetupError(_NO_ANSWER) from None
    if not isinstance(found, dict):
        raise SetupError(_NO_ANSWER)
    return found


async def _refusal(response: aiohttp.ClientResponse) -> str:
    """The server's own sentence, with what a person at a terminal can do about it."""
    raw = await response.content.read(_ERROR_BYTES_MAX)
    try:
        said = str(json.loads(raw)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = f"The server answered with status {response.status}."
    if response.status == 401:
        said += " Give it with --key-file or OPENAI_API_KEY; `forebay keys create` makes one."
    wait = response.headers.get("Retry-After")
    return f"{said.removesuffix(' Try again later.')} Try again in {wait} s." if wait else said
