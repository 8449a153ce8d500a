"""The guard: nothing that it started outlives the server, and it ends as its child ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest

from tests.support.engines import GUARD, alive, eventually, guarded

PYTHON = [sys.executable, "-I", "-S", "-c"]

# Prints its own process id and that of a child of its own, then waits. The child is in a session of its own.
FAMILY = """
import os, signal, sys, time
{before}
pid = os.fork()
if pid == 0:
    {child}
    time.sleep(600)
print(os.getpid(), pid, flush=True)
{after}
"""
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
# Blocked, then waited for: a handler of Python's would not be run if the signal came just before the sleep began.
LISTENING = {
    "before": "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})",
    "child": "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})",
    "after": "signal.sigwait({signal.SIGTERM}); sys.exit(7)",
}
# Prints its own process id, that of a stray in a session of its own and that of the stray's child in another one, and ends.
STRAYS = """
import os, time
reader, writer = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        os.write(writer, b"%d %d" % (os.getppid(), os.getpid()))
    time.sleep(600)
print(os.getpid(), os.read(reader, 100).decode(), flush=True)
"""
# A guard whose grace is longer than any test: a child that ends sooner was asked to.
PATIENT = f"""
import sys
sys.path.append({str(GUARD.parent)!r})
import guard
guard._GRACE_SECONDS = 600
guard.main()
"""


def patiently(*argv: str) -> list[str]:
    return [*PYTHON, PATIENT, "--", *argv]


@contextmanager
def guarding(*argv: str, by: Callable[..., list[str]] = guarded) -> Iterator["subprocess.Popen[bytes]"]:
    pipe = subprocess.PIPE
    with subprocess.Popen(by(*argv), stdin=pipe, stdout=pipe, stderr=pipe) as guard:
        try:
            yield guard
        finally:
            guard.kill()


@contextmanager
def family(
    by: Callable[..., list[str]] = guarded, /, before: str = "", child: str = "", after: str = "time.sleep(600)"
) -> Iterator[tuple["subprocess.Popen[bytes]", list[int]]]:
    with guarding(*PYTHON, FAMILY.format(before=before, child=child, after=after), by=by) as guard:
        assert guard.stdout
        yield guard, [int(pid) for pid in guard.stdout.readline().split()]


def closed(guard: "subprocess.Popen[bytes]") -> None:
    assert guard.stdin
    guard.stdin.close()


def say(guard: "subprocess.Popen[bytes]", words: bytes) -> None:
    assert guard.stdin
    guard.stdin.write(words)
    guard.stdin.flush()


def all_stopped(pids: list[int]) -> bool:
    return all(psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in pids)


def none_stopped(pids: list[int]) -> bool:
    return not any(psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in pids)


def gone(pids: list[int]) -> bool:
    return not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("code", [0, 1, 78, 86, 255])
def test_it_ends_with_the_code_of_its_child(code: int) -> None:
    with guarding(*PYTHON, f"raise SystemExit({code})") as guard:
        assert guard.wait(30) == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM, signal.SIGINT])
def test_it_dies_by_the_signal_of_its_child(number: signal.Signals) -> None:
    with guarding(
        *PYTHON,
        f"import os, signal; signal.signal({int(number)}, 0) if {int(number)} != 9 else 0; os.kill(os.getpid(), {int(number)})",
    ) as guard:
        assert guard.wait(30) == -number


def test_the_death_of_the_child_is_seen_at_once() -> None:
    took = []
    for _ in range(3):
        with family() as (guard, (child, _)):
            killed = time.monotonic()
            os.kill(child, signal.SIGKILL)
            assert guard.wait(30) == -signal.SIGKILL
            took.append(time.monotonic() - killed)
    assert min(took) < 1  # about 5 ms on a machine that is not busy


def test_a_child_that_listens_is_asked_first_when_the_server_goes() -> None:
    with family(patiently, **LISTENING) as (guard, pids):
        closed(guard)
        assert guard.wait(30) == 7
        assert gone(pids)


def test_a_child_that_does_not_listen_is_killed_half_a_second_later() -> None:
    with family(before=STUBBORN) as (guard, pids):
        left = time.monotonic()
        closed(guard)
        assert guard.wait(30) == -signal.SIGKILL
        assert 0.4 < time.monotonic() - left < 3
        assert gone(pids)


def test_a_stopped_child_is_killed_too() -> None:
    with family() as (guard, pids):
        os.kill(pids[0], signal.SIGSTOP)
        eventually(lambda: psutil.Process(pids[0]).status() == psutil.STATUS_STOPPED, 5)
        closed(guard)
        assert guard.wait(30) == -signal.SIGKILL
        assert gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says who has started whom")
def test_a_pause_reaches_the_whole_family_in_whatever_session_and_so_does_its_end() -> None:
    with family(child="os.setsid(); os.fork() or os.setsid()\n    while True: pass") as (guard, pids):
        elsewhere = eventually(lambda: psutil.Process(pids[1]).children(), 5)
        everybody = [*pids, elsewhere[0].pid]
        for _ in range(3):
            say(guard, b"P")
            eventually(lambda: all_stopped(everybody), 5)
            assert psutil.Process(guard.pid).status() != psutil.STATUS_STOPPED
            say(guard, b"R")
            eventually(lambda: none_stopped(everybody), 5)
        say(guard, b"P")
        eventually(lambda: all_stopped(everybody), 5)
        closed(guard)
        guard.wait(30)
        assert gone(everybody)


def test_of_words_that_come_together_the_last_one_counts() -> None:
    with family() as (guard, pids):
        say(guard, b"PRP")
        eventually(lambda: all_stopped(pids), 5)
        say(guard, b"RPR")
        eventually(lambda: none_stopped(pids), 5)


@pytest.mark.parametrize("how", ["sigterm", "the server goes"])
def test_a_paused_child_is_asked_to_end_like_any_other(how: str) -> None:
    with family(patiently, **LISTENING) as (guard, pids):
        say(guard, b"P")
        eventually(lambda: all_stopped(pids), 5)
        if how == "sigterm":
            guard.terminate()
        else:
            closed(guard)
        assert guard.wait(30) == 7
        assert gone(pids)


def test_a_paused_child_that_does_not_listen_is_killed() -> None:
    with family(before=STUBBORN) as (guard, pids):
        say(guard, b"P")
        eventually(lambda: all_stopped(pids), 5)
        closed(guard)
        assert guard.wait(30) == -signal.SIGKILL
        assert gone(pids)


def test_the_death_of_a_paused_child_is_seen() -> None:
    with family() as (guard, pids):
        say(guard, b"P")
        eventually(lambda: all_stopped(pids), 5)
        os.kill(pids[0], signal.SIGKILL)
        assert guard.wait(30) == -signal.SIGKILL
        assert gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands orphans to the guard")
def test_a_grandchild_in_a_session_of_its_own_is_killed_too() -> None:
    with family(child=f"os.setsid(); {STUBBORN}") as (guard, pids):
        closed(guard)
        guard.wait(5)
        assert gone(pids)


def test_what_a_finished_child_leaves_behind_is_killed() -> None:
    with family(child=STUBBORN, after="sys.exit(3)") as (guard, pids):
        assert guard.wait(5) == 3
        assert gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands orphans to the guard")
def test_what_a_finished_child_leaves_behind_is_killed_in_whatever_session() -> None:
    with guarding(*PYTHON, STRAYS) as guard:
        assert guard.stdout
        pids = [int(pid) for pid in guard.stdout.readline().split()]
        assert guard.wait(5) == 0
        assert len(pids) == 3
        assert gone(pids)


def test_sigterm_is_passed_on_and_no_more() -> None:
    says_so = "signal.sigwait({signal.SIGTERM}); os.write(1, b'asked\\n'); time.sleep(600)"
    with family(**{**LISTENING, "child": STUBBORN, "after": says_so}) as (guard, pids):
        assert guard.stdout
        guard.terminate()
        assert guard.stdout.readline() == b"asked\n"
        with pytest.raises(subprocess.TimeoutExpired):
            guard.wait(0.7)  # longer than the grace that the end of the server would give
        assert alive(pids[0])
        closed(guard)
        assert guard.wait(30) == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_a_terminal_sends_is_left_to_the_server(number: signal.Signals) -> None:
    with family(after="print(sys.stdin.read() == '', flush=True); time.sleep(600)") as (guard, pids):
        assert guard.stdout
        guard.send_signal(number)
        assert guard.stdout.readline() == b"True\n", "the child's own input is empty"
        assert alive(pids[0])
        assert guard.poll() is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tie a child to its parent's death")
def test_kill_9_of_the_guard_kills_the_child() -> None:
    with family() as (guard, (child, grandchild)):
        guard.kill()
        eventually(lambda: not alive(child), 10)
        os.kill(grandchild, signal.SIGKILL)  # nobody is left to do it


def test_many_starts_and_stops_leave_nothing() -> None:
    for _ in range(20):
        with family(child=STUBBORN) as (guard, pids):
            guard.terminate()
            assert guard.wait(30) == -signal.SIGTERM
            assert gone(pids)


def test_a_program_that_is_not_there_exits_78_with_a_sentence() -> None:
    with guarding("/nowhere/engine") as guard:
        assert guard.stderr
        assert guard.wait(30) == 78
        assert guard.stderr.read() == b"The program 'engine' cannot be started: No such file or directory.\n"


def test_nothing_to_start_exits_78() -> None:
    assert (
        subprocess.run([sys.executable, GUARD], check=False, stdin=subprocess.DEVNULL, capture_output=True).returncode
        == 78
    )


def test_the_child_inherits_no_open_files_and_default_signals() -> None:
    program = (
        "import os, signal\n"
        "print(sorted(int(n) for n in os.listdir('/dev/fd'))[:4],"
        " [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)] == [signal.SIG_DFL] * 3,"
        " signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    )
    with guarding(*PYTHON, program) as guard:
        assert guard.stdout
        assert guard.wait(30) == 0
        assert guard.stdout.read() == b"[0, 1, 2, 3] True set()\n"  # 3 lists the folder
