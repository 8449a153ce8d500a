"""The most memory that a process takes while something goes on."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

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


def forget_peak(pid: int) -> None:
    """Let `peak` begin anew, at what the process takes now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


def peak(pid: int) -> int:
    """The most resident bytes that a process has taken, for however short a time."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def of_family() -> int:
    """Resident bytes of this process and of all that it has started, directly or not."""
    return sum(map(_resident, [os.getpid(), *_below(os.getpid())]))


def _below(pid: int) -> list[int]:
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return []
    return [inner for each in found for inner in (int(each), *_below(int(each)))]


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
