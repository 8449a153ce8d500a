"""Keep one child process group alive only as long as the server that asked for it.

A plain script on the standard library alone: `python -I -S guard.py -- program arguments…`. It never restarts the child
and decides nothing about the child's health.

The server holds the other end of standard input. When that closes, also by `kill -9` of the server, the child's group gets
SIGTERM and, half a second later, everything the child ever started gets SIGKILL. SIGTERM to the guard is passed on.
A `P` on standard input stops the child and everything it ever started, in whatever group or session; an `R` lets all of
that go on, and so does whatever asks it to end. The guard ends as the child ended: with its exit code, or by the same signal.
"""

import contextlib
import os
import resource
import select
import signal
import sys
import time

_GRACE_SECONDS = 0.5
_SWEEP_SECONDS = 1.0
_LOOK_SECONDS_MAX = 0.05  # what takes longer is time in which this process itself was held up
_CANNOT_START = 78
_PAUSE, _RESUME = b"P", b"R"
_LOOKS_MAX = 8
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_WATCHED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main() -> None:
    """Start the child, watch it and the server, and end as the child ends."""
    command = sys.argv[2:] if sys.argv[1:2] == ["--"] else []
    if not command:
        sys.stderr.write("guard: nothing to start; give the command after `--`.\n")
        sys.exit(_CANNOT_START)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an engine's memory holds prompts
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    wakeup = _watch_signals()
    child = _start(command)
    status = _wait(child, wakeup)
    _sweep(child)
    _end_like(status)


def _prctl(option: int, value: int) -> None:
    """Ask the Linux kernel; elsewhere the process group alone has to do."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _watch_signals() -> int:
    """The descriptor on which each watched signal arrives as one byte.

    Handlers, not SIG_IGN: a child would inherit that. SIGINT and SIGHUP reach the server too, and it decides.
    """
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _WATCHED:
        signal.signal(number, lambda *_: None)
    return reader


def _start(command: list[str]) -> int:
    guard = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)  # none may be lost between fork and exec
    child = os.fork()
    if child == 0:
        try:
            _become(command, guard)
        finally:
            os._exit(_CANNOT_START)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
    return child


def _become(command: list[str], guard: int) -> None:
    """Turn the forked child into the program. Returns only when it cannot."""
    os.setsid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:  # it died before the line above
        return
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (*_WATCHED, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        name = os.path.basename(command[0])
        os.write(2, f"The program {name!r} cannot be started: {error.strerror}.\n".encode())


def _wait(child: int, wakeup: int) -> int:
    """Block until the child has ended; its wait status."""
    poll = select.poll()
    poll.register(wakeup, select.POLLIN)
    poll.register(0, select.POLLIN)
    deadline: float | None = None
    paused: set[int] | None = None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        ready = {descriptor for descriptor, _ in poll.poll(left)}
        to_end = wakeup in ready and signal.SIGTERM in os.read(wakeup, 4096)
        if 0 in ready:
            said = _hear()
            if said.endswith(_PAUSE):  # of several words that come together the last one counts
                paused = _pause(child) | (paused or set())
            elif said.endswith(_RESUME):
                _resume(child, paused)
                paused = None
            elif not said:
                poll.unregister(0)
                to_end, deadline = True, time.monotonic() + _GRACE_SECONDS
        if to_end:
            _kill_group(child, signal.SIGTERM)
            _resume(child, paused)  # or it would not hear of it
            paused = None
        if (status := _reap(child)) is not None:
            return status
        if deadline is not None and time.monotonic() >= deadline:
            _kill_group(child, signal.SIGKILL)
            deadline = time.monotonic() + _GRACE_SECONDS


def _hear() -> bytes:
    """What the server says; nothing once it is gone."""
    try:
        return os.read(0, 4096)
    except OSError:
        return b""


def _reap(child: int) -> int | None:
    """Bury what has died, strays included; the child's wait status once it is among them."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid == child:
            return status
        if pid == 0:
            return None


def _kill_group(child: int, number: int) -> None:
    """Signal the group, or the child alone while it has not made its group yet."""
    for kill in (os.killpg, os.kill):
        try:
            kill(child, number)
        except (ProcessLookupError, PermissionError):  # macOS says EPERM for a group of zombies
            continue
        return


def _pause(child: int) -> set[int]:
    """Stop the group at once, then whoever is elsewhere, until a look finds nobody new; these. Who is stopped starts nobody."""
    _kill_group(child, signal.SIGSTOP)
    stopped: set[int] = set()
    for _ in range(_LOOKS_MAX):
        found = _elsewhere(child) - stopped
        if not found:
            break
        _signal(found, signal.SIGSTOP)
        stopped |= found
    return stopped


def _resume(child: int, paused: set[int] | None) -> None:
    """Let the group go on, and those whom `_pause` has stopped elsewhere; nobody without one."""
    if paused is not None:
        _kill_group(child, signal.SIGCONT)
        _signal(paused, signal.SIGCONT)


def _signal(processes: set[int], number: int) -> None:
    for each in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(each, number)


def _sweep(child: int) -> None:
    """Kill what the child left behind: its group, then everything below us, until nothing is left or a second has passed."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    spent, looked_at = 0.0, time.monotonic()
    while spent < _SWEEP_SECONDS:
        if _nothing_left():
            return
        _signal(_elsewhere(child), signal.SIGKILL)
        time.sleep(0.001)
        now = time.monotonic()
        spent += min(now - looked_at, _LOOK_SECONDS_MAX)
        looked_at = now


def _nothing_left() -> bool:
    """Bury what has died; whether that was all."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return True
    return False


def _elsewhere(child: int) -> set[int]:
    """Everything that the child has started, directly or not, and that has left its group."""
    processes = _processes()
    children: dict[int, list[int]] = {}
    for each, (parent, _) in processes.items():
        children.setdefault(parent, []).append(each)
    found: set[int] = set()
    generation = children.get(os.getpid(), [])
    while generation:
        found.update(each for each in generation if processes[each][1] != child)
        generation = [grandchild for each in generation for grandchild in children.get(each, ())]
    return found


def _processes() -> dict[int, tuple[int, int]]:
    """Parent and group of every process; none where the kernel does not tell, and the child's own group has to do."""
    found = {}
    for name in os.listdir("/proc") if sys.platform == "linux" else ():
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as stat:
                _, parent, group, *_ = stat.read().rpartition(b")")[2].split()
                found[int(name)] = int(parent), int(group)
    return found


def _end_like(status: int) -> None:
    """Exit with the child's code, or die by the signal it died by."""
    if os.WIFEXITED(status):
        os._exit(os.WEXITSTATUS(status))
    number = os.WTERMSIG(status)
    _prctl(_PR_SET_DUMPABLE, 0)
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


if __name__ == "__main__":
    main()
