"""Cancelling what waits for something that cannot be stopped."""

import asyncio
from typing import Any


async def cancel_twice(task: "asyncio.Task[Any]") -> None:
    """Cancel one that waits for a running step, and again; it has to wait for the end of that nevertheless."""
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done(), "the running step has not ended"
