"""Measures memory: what each engine's family of processes holds, and what the machine has, holds and can give.

It refuses to decide anything, and to be asked on the event loop: every reading looks at files of the kernel and blocks,
so it is made in a thread. What this machine does not tell is left out of a reading, never guessed.

Memory that several processes share, such as the file of a model, is counted for each by its part (PSS).
"""

import asyncio
import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from forebay.clock import Clock
from forebay.errors import SetupError
from forebay.replicas.memory import HOST
from forebay.replicas.nvml import Gpu, Nvml
from forebay.server_config import MemorySettings

_PROCESSES_MAX = 4096  # of one engine
_READ_SECONDS_MAX = 30.0  # a driver or a kernel in trouble may not answer at all
_TOLD_MAX = 64  # bytes of a small file of the kernel
_GONE = (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError)  # the latter two slip through psutil
_ONLY_THE_PEAK = "5"  # what the kernel is told that it should start its count of the most resident memory anew
_FILES = ("inactive_file", "active_file", "file_mapped")  # of `memory.stat`, in either version of control groups
_FILES_OLDER = ("total_inactive_file", "total_active_file", "total_mapped_file")
_UNMEASURED = "The memory of this machine cannot be measured: {}."
_UNLIMITED = 2**60  # what a control group says that has no limit is larger


@dataclass(frozen=True, slots=True)
class Reading:
    """The machine at one moment.

    `total_bytes` is what the machine or its container has; `available_bytes` what a program could take without anything
    being swapped out. `held` has bytes by device for each family, by the id of its first process, and `peaks` the most
    that it came to since the last reading, as far as the kernel tells; a family that is gone is in neither. `shared` is
    how much more is resident of each family than is counted for it: the parts of those who share it. `unseen` has what is
    held of each GPU by processes that the driver tells of and that are not to be seen from here: in a container these may be
    ours.
    """

    total_bytes: int
    available_bytes: int
    cpu_share: float
    celsius: float | None
    gpus: tuple[Gpu, ...]
    held: Mapping[int, Mapping[str, int]]
    peaks: Mapping[int, Mapping[str, int]]
    shared: Mapping[int, int] = field(default_factory=dict)
    unseen: Mapping[str, int] = field(default_factory=dict)


class Gauge:
    """What measures. Without `gpus` the machine has none that we know of."""

    def __init__(self, settings: MemorySettings, gpus: Nvml | None, root: Path = Path("/")) -> None:
        self._settings = settings
        self._gpus = gpus
        self._root = root
        psutil.cpu_percent()  # the first answer is for no time at all; later ones are for the time since the last

    def read(self, families: Iterable[int] = ()) -> Reading:
        """Measure the machine, and what is held by each of `families`: a process and all that it started. Blocks.

        Raises SetupError where this machine cannot be measured.
        """
        try:
            return self._read(families)
        except (OSError, ValueError, psutil.Error) as error:
            raise SetupError(_UNMEASURED.format(error)) from None

    def _read(self, families: Iterable[int]) -> Reading:
        total, available = self._host()
        gpus = self._gpus.read() if self._gpus is not None else ()
        found = {first: _family(self._root, first) for first in families}
        resident = {first: [_resident(pid) for pid in members] for first, members in found.items() if members}
        weighed = {first: _weighed(self._root, found[first], counted, gpus) for first, counted in resident.items()}
        return Reading(
            total,
            available,
            psutil.cpu_percent() / 100,
            _hottest(),
            gpus,
            {first: held for first, (held, _) in weighed.items()},
            {first: peak for first, (_, peak) in weighed.items()},
            {first: max(0, sum(whole - part for part, whole in counted)) for first, counted in resident.items()},
            {gpu.name: _unseen(self._root, gpu) for gpu in gpus},
        )

    def totals(self, reading: Reading, untold: Mapping[str, int]) -> dict[str, int]:
        """What engines may take in all, by device. What others hold of a GPU is taken off its part.

        Of what is unseen, and of what the driver counts and nobody is known to hold, so much is ours as engines are charged
        with that were not found there (`untold`). It is never more than what is free now and what is ours: not every
        driver tells of every process.
        """
        settings = self._settings
        totals = {HOST: settings.host_bytes or int(reading.total_bytes * settings.host_share)}
        for gpu in reading.gpus:
            listed, missed = sum(gpu.processes.values()), untold.get(gpu.name, 0)
            unseen = min(reading.unseen.get(gpu.name, 0), missed)
            ours = sum(held.get(gpu.name, 0) for held in reading.held.values()) + unseen
            others = max(0, listed - ours)
            nobodys = min(max(0, gpu.used_bytes - listed), missed - unseen)
            free_or_ours = gpu.total_bytes - gpu.used_bytes + ours + nobodys
            totals[gpu.name] = max(0, min(int(gpu.total_bytes * settings.gpu_share) - others, free_or_ours))
        return totals

    def _host(self) -> tuple[int, int]:
        """Total and available bytes of the machine, or of the narrowest control group that this process is in."""
        memory = psutil.virtual_memory()
        total, available = int(memory.total), int(memory.available)
        for limit, used in _groups(self._root):
            total = min(total, limit)
            available = min(available, max(0, limit - used))
        return total, available


class Readings:
    """Readings of a gauge, each in a thread that nobody waits for for long: one that hangs does not hold up a stop."""

    def __init__(self, gauge: Gauge, clock: Clock) -> None:
        self._gauge = gauge
        self._clock = clock
        self._running = False

    async def read(self, families: tuple[int, ...]) -> Reading:
        """As the gauge does. Raises SetupError also if it takes too long, and until that one has come to its end."""
        if self._running:
            raise SetupError(_UNMEASURED.format("the last measurement goes on still"))
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Reading | Exception] = loop.create_future()

        def ended(found: Reading | Exception) -> None:
            self._running = False
            if not answer.done():
                answer.set_result(found)

        def look() -> None:
            found: Reading | Exception = SetupError(_UNMEASURED.format("the measurement met a bug of its own"))
            try:
                found = self._gauge.read(families)
            except (SetupError, RuntimeError, MemoryError) as error:
                found = error
            finally:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(ended, found)

        try:
            threading.Thread(target=look, name="gauge", daemon=True).start()
            self._running = True
            async with self._clock.timeout(_READ_SECONDS_MAX):
                found = await answer
        except TimeoutError:
            raise SetupError(_UNMEASURED.format("it takes too long")) from None
        except (RuntimeError, MemoryError) as error:  # there is not even memory for a thread
            found = error
        if isinstance(found, Exception):
            raise (
                found
                if isinstance(found, SetupError)
                else SetupError(_UNMEASURED.format(str(found) or "there is too little of it"))
            )
        return found


def _weighed(
    root: Path, family: Iterable[int], resident: Iterable[tuple[int, int]], gpus: Iterable[Gpu]
) -> tuple[dict[str, int], dict[str, int]]:
    """What a family holds, and came to. A GPU is left out on which the driver does not tell of it."""
    family = tuple(family)
    held = {HOST: sum(part for part, _ in resident)}
    for gpu in gpus:
        told = [gpu.processes[pid] for pid in family if pid in gpu.processes]
        if told:
            held[gpu.name] = sum(told)
    more = sum(_fallen(root, pid) for pid in family)
    return held, {**held, HOST: held[HOST] + more}


def _unseen(root: Path, gpu: Gpu) -> int:
    """What is held of a GPU by processes that are not to be seen from here."""
    return sum(count for pid, count in gpu.processes.items() if not (root / "proc" / str(pid)).exists())


def _resident(pid: int) -> tuple[int, int]:
    """PSS of one process, and all that is resident; that twice where the kernel does not tell; nothing if it has just ended."""
    with contextlib.suppress(*_GONE):
        process = psutil.Process(pid)
        with contextlib.suppress(psutil.AccessDenied):
            full = process.memory_full_info()
            return int(getattr(full, "pss", full.uss)), int(full.rss)
        with contextlib.suppress(psutil.AccessDenied):
            whole = int(process.memory_info().rss)
            return whole, whole
    return 0, 0


def _fallen(root: Path, pid: int) -> int:
    """How much less is resident than at most since the last call. Nothing where the kernel does not start that anew."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        folder = root / "proc" / str(pid)
        rows = (line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        told = {name: text.split() for name, text in rows}
        (folder / "clear_refs").write_text(_ONLY_THE_PEAK)
        return max(0, int(told["VmHWM"][0]) - int(told["VmRSS"][0])) * 1024
    return 0


def _family(root: Path, first: int) -> tuple[int, ...]:
    """A process and all that it started, as far as they live. Where the kernel lists children, nobody else is looked at."""
    if not (root / "proc" / str(first) / "task" / str(first) / "children").exists():
        return _searched(first)
    found = [first]
    for pid in found:  # it grows meanwhile
        found += [child for child in _children(root, pid) if child not in found][: _PROCESSES_MAX - len(found)]
    return tuple(found)


def _children(root: Path, pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for thread in (root / "proc" / str(pid) / "task").iterdir():
            with contextlib.suppress(OSError):
                yield from map(int, (thread / "children").read_text().split())


def _searched(first: int) -> tuple[int, ...]:
    with contextlib.suppress(*_GONE):
        process = psutil.Process(first)
        return first, *(child.pid for child in process.children(recursive=True)[:_PROCESSES_MAX])
    return ()


def _hottest() -> float | None:
    """The hottest sensor of the machine, where psutil finds one."""
    look = getattr(psutil, "sensors_temperatures", None)  # not there on every system
    rows = [row for rows in look().values() for row in rows] if look is not None else []
    return max((float(row.current) for row in rows), default=None)


# Control groups: a container's limits. Each group from our own up to the mount counts, in both versions.


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of every control group above this process that has a limit."""
    for folder, newer in _group_folders(root):
        limit = _number(folder / ("memory.max" if newer else "memory.limit_in_bytes"))
        used = _number(folder / ("memory.current" if newer else "memory.usage_in_bytes"))
        if limit is not None and used is not None and limit < _UNLIMITED:
            yield limit, max(0, used - _reclaimable(folder, _FILES if newer else _FILES_OLDER))


def _group_folders(root: Path) -> Iterator[tuple[Path, bool]]:
    """The folders of our groups, and whether they are of version 2. In a container the path may begin at the mount."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if names in ("", "memory"):
                mount = root / "sys/fs/cgroup" / names
                inner = Path(path.lstrip("/"))
                for part in dict.fromkeys((inner, *inner.parents, Path())):
                    if ".." not in part.parts:
                        yield mount / part, not names


def _number(file: Path) -> int | None:
    """The number in `file`; None if it holds a word, as for no limit, or is not there."""
    with contextlib.suppress(OSError, ValueError), file.open() as opened:
        return int(opened.read(_TOLD_MAX))
    return None


def _reclaimable(folder: Path, names: tuple[str, str, str]) -> int:
    """Bytes of files that the kernel can drop: they count as used by the group, and are available.

    Those that were not read lately, and of those that were all but what somebody has mapped.
    """
    told = {}
    with contextlib.suppress(OSError, ValueError):
        told = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    inactive, active, mapped = (int(told.get(name, 0)) for name in names)
    return inactive + max(0, active - mapped)
