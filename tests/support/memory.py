"""The most memory that a process takes while something goes on."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

_LOOK_SECONDS = 0.01


@dataclass(slots=True)
class Growth:
    """By how many bytes it has grown at most since the block began."""

    bytes: int = 0


@asynccontextmanager
async def growth(measure: Callable[[], int]) -> AsyncIterator[Growth]:
    """Look at `measure` a hundred times a second for as long as the block lasts."""
    before, found = measure(), Growth()

    async def look() -> None:
        while True:
            found.bytes = max(found.bytes, measure() - before)
            await asyncio.sleep(_LOOK_SECONDS)

    looking = asyncio.create_task(look())
    try:
        yield found
    finally:
        looking.cancel()
