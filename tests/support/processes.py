"""Looking at processes that may end at any moment of the look."""

import os
from collections.abc import Container

import psutil

GONE = (psutil.NoSuchProcess, FileNotFoundError)  # the latter slips through psutil where the end comes in mid-look
_LOOKS_MAX = 5


def lives(process: psutil.Process) -> bool:
    """Whether it runs still; a zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except GONE:
        return False


def command_line(process: psutil.Process) -> str:
    """How it was called; empty where it has ended."""
    try:
        return " ".join(process.cmdline())
    except GONE:
        return ""


def family(pid: int) -> list[psutil.Process]:
    """Every process that `pid` has started, directly or not."""
    for _ in range(_LOOKS_MAX):
        try:
            return list(psutil.Process(pid).children(recursive=True))
        except FileNotFoundError:
            continue
    message = f"the family of {pid} changes too fast to be looked at"
    raise AssertionError(message)


def programs(module: str, of: psutil.Process | None = None) -> list[psutil.Process]:
    """Those that run `module` below a process, this one unless another is given, with the children that they forked."""
    found = family((of or psutil.Process()).pid)
    return [each for each in found if module in command_line(each)]


def at_work(module: str, but: Container[int] = ()) -> psutil.Process | None:
    """A program of ours that runs `module`, once a child works for it."""
    ours = (each for each in psutil.Process().children() if module in command_line(each) and each.pid not in but)
    return next((each for each in ours if lives(each) and each.children()), None)


def open_files() -> int:
    """How many this process has."""
    return len(os.listdir("/proc/self/fd"))
