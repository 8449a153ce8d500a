"""A conversation with a server over its own API: what was said, and the answers as they come.

It refuses to print: the terminal belongs to `forebay.cli.chat`.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp

from forebay.clock import SystemClock
from forebay.errors import SetupError

_EVENT_BYTES_MAX = 4 * 2**20
_CONNECT_SECONDS = 10.0
_QUIET_SECONDS = 300.0
_ERROR_BYTES_MAX = 65_536


@dataclass(slots=True)
class Figures:
    """How fast the last answer came."""

    asked_at: float = 0.0
    first_at: float = 0.0
    ended_at: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        if not self.first_at:
            return "no answer"
        wait = 1000 * (self.first_at - self.asked_at)
        spent = self.ended_at - self.first_at
        rate = f"{(self.tokens - 1) / spent:.1f} tokens/s, " if self.tokens > 1 and spent > 0 else ""
        return f"{self.tokens} tokens, {rate}first after {wait:.0f} ms"


@dataclass(slots=True)
class Conversation:
    """One dialogue with one model. `messages` grows by a question and an answer at a time."""

    url: str
    key: str
    model: str
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    figures: Figures = field(default_factory=Figures)
    _session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True),  # a kept one goes stale while a person thinks
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_QUIET_SECONDS),
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def models(self) -> list[dict[str, Any]]:
        """The server's models. Raises SetupError with what to do."""
        async with self._request("GET", "/v1/models") as response:
            listing = await response.json()
        return [model for model in listing.get("data", []) if isinstance(model, dict)]

    async def ask(self, question: str) -> AsyncGenerator[str, None]:
        """The answer, piece by piece; it is kept when the iteration ends, also when that is before its end."""
        clock = SystemClock().monotonic
        self.figures = figures = Figures(clock())
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = {"role": "user", "content": question}
        body = {
            "model": self.model,
            "messages": [*system, *self.messages, asked],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        answer: list[str] = []
        try:
            async with self._request("POST", "/v1/chat/completions", body) as response:
                async for event in _events(response):
                    usage = event.get("usage")
                    if isinstance(usage, dict):
                        figures.prompt_tokens = int(usage.get("prompt_tokens") or 0)
                        figures.tokens = int(usage.get("completion_tokens") or 0)
                    text = _text(event)
                    if text:
                        figures.first_at = figures.first_at or clock()
                        figures.tokens += 0 if isinstance(usage, dict) else 1
                        answer.append(text)
                        yield text
        finally:
            figures.ended_at = clock()
            if answer:
                self.messages += [asked, {"role": "assistant", "content": "".join(answer)}]

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> "_Request":
        assert self._session is not None
        return _Request(self._session, method, self.url + path, body)


class _Request:
    """A request whose troubles are sentences. Leaving the block early closes the connection, which cancels the work."""

    def __init__(self, session: aiohttp.ClientSession, method: str, url: str, body: dict[str, Any] | None) -> None:
        self._session, self._method, self._url, self._body = session, method, url, body
        self._response: aiohttp.ClientResponse | None = None

    async def __aenter__(self) -> aiohttp.ClientResponse:
        try:
            self._response = await self._session.request(self._method, self._url, json=self._body)
            if self._response.status != 200:
                raise SetupError(await _refusal(self._response))
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
            return SetupError(f"{where} is no address of a server. Write it as http://127.0.0.1:8000.")
        if isinstance(error, aiohttp.ClientConnectorError):
            return SetupError(
                f"No server answers at {where}. Start one with `forebay serve`, or name another with --url."
            )
        if isinstance(error, TimeoutError):
            return SetupError(f"The server at {where} has been silent for too long.")
        return SetupError(f"The connection to {where} broke off ({type(error).__name__}). Ask again.")


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The parsed events of a stream. Raises SetupError for an error event."""
    rest = b""
    async for data in response.content.iter_any():
        *blocks, rest = (rest + data).split(b"\n\n")
        if len(rest) > _EVENT_BYTES_MAX:
            raise SetupError("The server sent something that is not an answer.")
        for block in blocks:
            payload = block.removeprefix(b"data:").strip()
            if payload and payload != b"[DONE]":
                yield _parsed(payload)


def _parsed(payload: bytes) -> dict[str, Any]:
    try:
        event = json.loads(payload)
    except ValueError:
        raise SetupError("The server sent something that is not an answer.") from None
    error = event.get("error") if isinstance(event, dict) else None
    if error or not isinstance(event, dict):
        raise SetupError(str(error.get("message")) if isinstance(error, dict) else "The server ended the answer.")
    return event


def _text(event: dict[str, Any]) -> str:
    choices = event.get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    return str(delta.get("reasoning_content") or "") + str(delta.get("content") or "")


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
    return f"{said} Try again in {wait} s." if wait else said
