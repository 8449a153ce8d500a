"""Says why an engine ended, and remembers the inputs that were in flight when engines died.

It refuses to guess silently: what it cannot tell apart it calls a crash, with the engine's last lines attached.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from forebay.clock import Clock
from forebay.errors import EngineCrashed, EngineTimeout, ServerError
from forebay.inference import Request
from forebay.replicas.launcher import EXIT_OUT_OF_MEMORY, EXIT_WRONG_SETUP

_VMSTAT = Path("/proc/vmstat")
_SIGKILL = 9
_DEATHS_TO_QUARANTINE = 2
_OOM_WORDS = (
    "out of memory",
    "outofmemory",
    "memoryerror",
    "std::bad_alloc",
    "failed to allocate",
    "unable to allocate",
    "cudamalloc failed",
)


class Cause(StrEnum):
    """Why an engine ended without being asked to."""

    CRASH = "crash"
    OUT_OF_MEMORY = "out_of_memory"
    STALL = "stall"
    WRONG_SETUP = "wrong_setup"
    FAILED_START = "failed_start"
    REFUSED_TO_STOP = "refused_to_stop"


@dataclass(frozen=True, slots=True)
class Death:
    """The end of an engine process. `last_lines` are for the log, never for a caller."""

    cause: Cause
    exit_code: int
    last_lines: tuple[str, ...] = ()

    def as_error(self) -> ServerError:
        """What the caller of a request in flight is told."""
        match self.cause:
            case Cause.OUT_OF_MEMORY:
                return EngineCrashed(
                    "The engine ran out of memory while it was working on this request. It starts again with fewer "
                    "slots; try again.",
                    code="out_of_memory",
                )
            case Cause.STALL:
                return EngineTimeout("The engine hung while it was working on this request. It is being replaced.")
            case _:
                return EngineCrashed()


def classify(exit_code: int, last_lines: Iterable[str], oom_kills: int, *, log_is_clean: bool = True) -> Cause:
    """The cause that an exit status and the last words point to.

    `oom_kills` is how many processes the kernel killed for memory while the engine lived. `log_is_clean` says that the
    engine prints no text of callers, so that nobody can put words into its mouth.
    """
    lines = " ".join(last_lines).lower()
    if exit_code == EXIT_WRONG_SETUP:
        return Cause.WRONG_SETUP
    if exit_code == EXIT_OUT_OF_MEMORY or (log_is_clean and any(word in lines for word in _OOM_WORDS)):
        return Cause.OUT_OF_MEMORY
    if exit_code == -_SIGKILL and oom_kills > 0:
        return Cause.OUT_OF_MEMORY
    return Cause.CRASH


def kernel_oom_kills() -> int:
    """Processes that the kernel has killed for memory since boot; 0 where the system does not say."""
    try:
        lines = _VMSTAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


class Quarantine:
    """Inputs that were in flight at engine deaths, by project, model and content. Written by the supervisor alone."""

    def __init__(self, seconds: float, entries_max: int, clock: Clock) -> None:
        self._seconds = seconds
        self._entries_max = entries_max
        self._clock = clock
        self._deaths: OrderedDict[bytes, tuple[int, float]] = OrderedDict()

    def record(self, request: Request) -> bool:
        """Note that `request` was in flight at a death; whether its input is refused from now on."""
        key = _fingerprint(request)
        count, since = self._deaths.pop(key, (0, 0.0))
        now = self._clock.monotonic()
        count = count + 1 if now - since < self._seconds else 1
        self._deaths[key] = (count, now)
        while len(self._deaths) > self._entries_max:
            self._deaths.popitem(last=False)
        return count >= _DEATHS_TO_QUARANTINE

    def holds(self, request: Request) -> bool:
        """Whether the input of `request` is refused."""
        if not self._deaths:
            return False
        count, since = self._deaths.get(_fingerprint(request), (0, 0.0))
        return count >= _DEATHS_TO_QUARANTINE and self._clock.monotonic() - since < self._seconds


def _fingerprint(request: Request) -> bytes:
    head = f"{request.project}\0{request.model}\0{request.path}\0".encode()
    return hashlib.sha256(head + request.body).digest()
