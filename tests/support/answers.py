"""What came back for a generation request, read to its end."""

import json
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import aiohttp

from tests.support.server import Server, chat_body


@dataclass(slots=True)
class Answer:
    """One answer: its tokens, whether it said [DONE], the error it ended with, and when things came."""

    status: int
    headers: dict[str, str]
    tokens: int = 0
    done: bool = False
    error: dict[str, Any] | None = None
    longest_gap_seconds: float = 0.0
    ended_at: float = 0.0
    body: dict[str, Any] = field(default_factory=dict)

    @property
    def code(self) -> str | None:
        """The code of the error, if there is one."""
        return self.error["code"] if self.error else None

    @property
    def whole(self) -> bool:
        """Whether the answer is complete."""
        return self.status == 200 and self.error is None and (self.done or "choices" in self.body)


async def read(response: aiohttp.ClientResponse) -> Answer:
    """Read an answer to its end, streamed or not."""
    answer = Answer(response.status, {key.lower(): value for key, value in response.headers.items()})
    if "text/event-stream" not in answer.headers.get("content-type", ""):
        answer.body = await response.json()
        answer.error = answer.body.get("error")
        answer.ended_at = monotonic()
        return answer
    before = monotonic()
    async for line in response.content:
        now = monotonic()
        answer.longest_gap_seconds = max(answer.longest_gap_seconds, now - before)
        before = now
        _take(answer, line.strip())
    answer.ended_at = monotonic()
    return answer


def _take(answer: Answer, line: bytes) -> None:
    if line == b"data: [DONE]":
        answer.done = True
    elif line:
        assert line.startswith(b"data: "), line
        event = json.loads(line[6:])
        answer.error = answer.error or event.get("error")
        answer.tokens += sum(1 for choice in event.get("choices", ()) if choice["delta"].get("content"))


async def ask(server: Server, text: str, *, key: str | None = None, **fields: Any) -> Answer:
    """Send a chat request, a stream unless told otherwise, and read the whole answer."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with await server.send(chat_body(text, **{"stream": True, **fields}), **headers) as response:
        return await read(response)


async def first_bytes(response: aiohttp.ClientResponse) -> bytes:
    """Wait for the first event of a stream."""
    return await response.content.readuntil(b"\n\n")
