"""Work in threads that ends when it has ended: whoever is cancelled waits until the thread has let go.

It refuses to break a step off: a step looks at its `Wanted` and stops by itself.
"""

import asyncio
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(slots=True)
class Wanted:
    """Whether somebody still waits for the work of a request, and how they are told that it goes on."""

    proceed: Callable[[], object] = lambda: None
    gone: bool = False


class Unwanted(Exception):
    """A step has stopped because nobody waits for it."""


class Threads:
    """A fixed number of threads; what does not fit waits its turn."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, "work")

    async def run(self, step: Callable[[], ResultT], wanted: Wanted) -> ResultT:
        """What `step` gives. Cancelled, it marks `wanted` as gone and returns when the step has ended or never begins."""
        job = self._pool.submit(step)
        ended = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(ended)
        except asyncio.CancelledError:
            wanted.gone = True
            job.cancel()
            await all_ended([ended])
            raise


async def all_ended(work: Collection["asyncio.Future[Any]"]) -> None:
    """Wait for the end of all, however it ends and however often whoever waits is cancelled."""
    cancelled = False
    while left := [each for each in work if not each.done()]:
        try:
            await asyncio.wait(left)
        except asyncio.CancelledError:
            cancelled = True
    for each in work:
        if not each.cancelled():
            each.exception()  # taken note of: nobody waits for it
    if cancelled:
        raise asyncio.CancelledError
