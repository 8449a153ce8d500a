"""Streams of server-sent events that nobody but their reader waits for.

It refuses to go on once the reader is gone.
"""

import asyncio
from collections.abc import AsyncIterator

from starlette.types import Receive, Send

EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


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
