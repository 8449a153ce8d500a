"""What a process and all that it has started take: memory, the most of it together, and CPU time; and how one ends.
How much of that time the machine did not have, because whatever is below it gave it to others.

It refuses to know what they do. It needs /proc.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

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
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(resident_bytes, _children(pid)))


def spent_seconds(pid: int) -> float:
    """CPU time of it and of all its descendants, also of those that have ended and that somebody has waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    own = sum(int(field) for field in fields[11:15])
    return own / os.sysconf("SC_CLK_TCK") + sum(map(spent_seconds, _children(pid)))


def stolen_seconds() -> float:
    """CPU time that a virtual machine was kept waiting for since it began, of all cores together; 0 where nobody tells."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


def below(pid: int, word: str) -> int | None:
    """The first of its descendants whose command has this word; its own descendants may have it as well."""
    for child in _children(pid):
        try:
            command = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        found = child if word.encode() in command else below(child, word)
        if found is not None:
            return found
    return None


def _children(pid: int) -> list[int]:
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for each in threads for child in (each / "children").read_text(encoding="ascii").split()]
    except OSError:
        return []


async def ended(process: asyncio.subprocess.Process, seconds: float) -> None:
    """Wait so long for one that was told to end; then kill it."""
    try:
        async with asyncio.timeout(seconds):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
