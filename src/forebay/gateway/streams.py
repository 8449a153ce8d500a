"""Answers in pieces, and streams of server-sent events that nobody but their reader waits for.

It refuses to go on with events once the reader is gone.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator

from starlette.types import Message, Receive, Send

EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_PIECE_BYTES = 2**18  # of a body, so that a reader who takes it slowly is seen to go on


def in_pieces(body: bytes, *, ends: bool) -> Iterable[Message]:
    """The messages of a body, the last of which is that of the answer if it `ends` there."""
    if len(body) <= _PIECE_BYTES:  # an empty one is a message too: without it the next request would have no answer
        return ({"type": "http.response.body", "body": body, "more_body": not ends},)
    return _cut(body, ends=ends)


def _cut(body: bytes, *, ends: bool) -> Iterator[Message]:
    for start in range(0, len(body), _PIECE_BYTES):
        end = start + _PIECE_BYTES
        yield {"type": "http.response.body", "body": body[start:end], "more_body": not ends or end < len(body)}


async def send_while_there(events: AsyncIterator[bytes], receive: Receive, send: Send) -> None:
    """Send the head, `events` and the end; break off when the reader goes."""
    leaving = asyncio.create_task(_gone(receive))
    telling = asyncio.create_task(_tell(events, send))
    try:
        await asyncio.wait({leaving, telling}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        telling.cancel()
        await asyncio.gather(leaving, telling, return_exceptions=True)
    if not telling.cancelled():
        telling.result()


async def _tell(events: AsyncIterator[bytes], send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
    async for event in events:
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
