"""The fence around children that a program forks to look at what strangers sent: little memory, bounded time, no files.

It refuses to let a child speak for its program, and to take from the way that one ended more than a verdict.
"""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

# Verdicts that are the same in every program; what lies between and above is its own.
OK, BROKEN, TOO_COSTLY = 0, 2, 5
_PIECE_BYTES = 65_536
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_BY_CLOCK = frozenset({signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL})


@dataclass(frozen=True, slots=True)
class Cost:
    """What one child may take. `file_bytes_max` is how long it may make the files that it was given."""

    memory_bytes_max: int
    seconds_max: int
    file_bytes_max: int = 0


class Refused(Exception):
    """There will be nothing of it."""

    def __init__(self, verdict: int) -> None:
        super().__init__(verdict)
        self.verdict = verdict


def begin(server: int) -> Any:
    """Make this a program that leaves nothing behind and that its server alone ends; what `close` needs, loaded early.

    It also ends with the process of that id, its server, by itself: while it waits in `told` it hears of nothing else.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the server, which then ends this program
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != server:  # it died before the line above
        sys.exit()
    return libc


def fork(look: Callable[[int], None], cost: Cost, libc: Any) -> tuple[int, int]:
    """Let a child `look`; its id, and a descriptor to read what it writes into the one that `look` is given."""
    reader, writer = os.pipe()
    program = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _live(look, writer, cost, libc, program)
    os.close(writer)
    return child, reader


def told(look: Callable[[int], None], cost: Cost, libc: Any, *, highest: int, bytes_max: int) -> tuple[int, bytes]:
    """Let a child `look`, and wait for its end: its verdict as `verdict` has it, and what it has written.

    One that writes more than `bytes_max` is ended.
    """
    child, reader = fork(look, cost, libc)
    said = bytearray()
    with os.fdopen(reader, "rb", buffering=0) as source:
        while len(said) <= bytes_max and (piece := source.read(_PIECE_BYTES)):
            said += piece
    if len(said) > bytes_max:
        os.kill(child, signal.SIGKILL)
    return verdict(child, highest), bytes(said)


def write(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of it. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def verdict(child: int, highest: int) -> int:
    """Wait for the end of a child; what it says by it. `highest` is the last verdict that the program knows."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return TOO_COSTLY if os.WTERMSIG(status) in _BY_CLOCK else BROKEN
    code = os.WEXITSTATUS(status)
    return code if OK <= code <= highest else BROKEN


def _live(look: Callable[[int], None], writer: int, cost: Cost, libc: Any, program: int) -> NoReturn:
    """The child's whole life. It ends with the verdict as exit code; what surprises it is broken."""
    found = BROKEN
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)  # no way to speak for this program, and no traceback with what was in memory
        close(cost, libc)
        if os.getppid() == program:  # else it died before the line above
            look(writer)
            found = OK
    except Refused as refused:
        found = refused.verdict
    except (MemoryError, RecursionError):
        found = TOO_COSTLY
    finally:
        os._exit(found)


def close(cost: Cost, libc: Any) -> None:
    """From here on: bounded memory and time, no new files or sockets, and no new processes unless we are root."""
    if libc is not None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    signal.alarm(2 * cost.seconds_max)
    resource.setrlimit(resource.RLIMIT_CPU, (cost.seconds_max, cost.seconds_max + 1))
    resource.setrlimit(resource.RLIMIT_AS, (cost.memory_bytes_max, cost.memory_bytes_max))
    resource.setrlimit(resource.RLIMIT_FSIZE, (cost.file_bytes_max, cost.file_bytes_max))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
