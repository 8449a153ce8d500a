"""A conversation with a server over its own API: what was said, and the answers as they come.

It refuses to print: the terminal belongs to `forebay.cli.chat`.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp

from forebay.cli.api_client import ApiClient, blocks_of
from forebay.clock import SystemClock
from forebay.errors import SetupError


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
    _client: ApiClient = field(init=False)

    def __post_init__(self) -> None:
        self._client = ApiClient(self.url, self.key)
        self.url = self._client.url

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *reason: object) -> None:
        await self._client.__aexit__(*reason)

    async def models(self) -> list[dict[str, Any]]:
        """The server's models. Raises SetupError with what to do."""
        listing = await self._client.call("GET", "/v1/models")
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
            async with self._client.request("POST", "/v1/chat/completions", json=body) as response:
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


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The parsed events of a stream. Raises SetupError for an error event."""
    async for block in blocks_of(response):
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
