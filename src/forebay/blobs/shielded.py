"""Work that goes on to its end although whoever asked for it has left.

It refuses to have asyncio complain of what goes wrong then: nobody is left to be told.
"""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def shielded(work: Awaitable[T]) -> T:
    """What `work` comes to. A cancel ends the waiting, not the work."""
    working = asyncio.ensure_future(work)
    working.add_done_callback(_take_notice)  # `shield` itself looks away once its caller has been cancelled
    return await asyncio.shield(working)


def _take_notice(working: "asyncio.Future[T]") -> None:
    if not working.cancelled():
        working.exception()
