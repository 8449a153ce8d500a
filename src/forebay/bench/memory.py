"""How much memory a process and all that it has started take, and the most that they took together.

It refuses to know what they do. It needs /proc.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

_LOOK_SECONDS = 0.1


@dataclass(slots=True)
class Memory:
    """The most bytes that were seen; whoever measures may set it back."""

    peak_bytes: int = 0


@asynccontextmanager
async def watched(pid: int) -> AsyncIterator[Memory]:
    """Look at it ten times in a second for as long as this lasts."""
    memory = Memory()

    async def look() -> None:
        while True:
            memory.peak_bytes = max(memory.peak_bytes, resident_bytes(pid))
            await asyncio.sleep(_LOOK_SECONDS)

    looking = asyncio.create_task(look())
    try:
        yield memory
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


def resident_bytes(pid: int) -> int:
    """What it has resident, with all its descendants; those that have just ended count nothing."""
    folder = Path(f"/proc/{pid}")
    try:
        pages = int((folder / "statm").read_text(encoding="ascii").split()[1])
        children = [
            int(child)
            for thread in (folder / "task").iterdir()
            for child in (thread / "children").read_text(encoding="ascii").split()
        ]
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(resident_bytes, children))
