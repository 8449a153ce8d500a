"""Looking at processes that may end at any moment of the look."""

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
