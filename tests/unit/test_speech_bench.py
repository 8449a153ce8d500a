"""How the benchmark of recordings counts wrong words, and how it sees the memory and the CPU time of processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from forebay.bench.processes import resident_bytes, spent_seconds
from forebay.bench.recordings import words_of
from forebay.bench.speech import wrong_words


@pytest.mark.parametrize(
    ("reference", "heard", "wrong"),
    [
        ("", "", 0),
        ("a b c", "a b c", 0),
        ("a b c", "a x c", 1),
        ("a b c", "a c", 1),
        ("a c", "a b c", 1),
        ("a b c", "", 3),
        ("", "a b", 2),
        ("a b c d", "b c d e", 2),
    ],
)
def test_words_are_changed_added_or_left_out(reference: str, heard: str, wrong: int) -> None:
    assert wrong_words(reference.split(), heard.split()) == wrong


def test_case_and_punctuation_do_not_count() -> None:
    assert words_of(" Hello?  I'm, er, HERE. ") == ["hello", "im", "er", "here"]


def test_the_memory_of_a_process_is_that_of_its_children_too() -> None:
    hold = "data = bytearray(b'x') * 64_000_000; input()"
    starts = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {hold!r}]); child.wait()"
    with subprocess.Popen([sys.executable, "-c", starts], stdin=subprocess.PIPE) as parent:
        try:
            while resident_bytes(parent.pid) < 64_000_000:
                assert parent.poll() is None
        finally:
            assert parent.stdin
            parent.stdin.close()
    assert resident_bytes(parent.pid) == 0
    assert resident_bytes(os.getpid()) > 0


def test_the_cpu_time_of_a_process_is_that_of_its_children_too_whether_they_live_or_not() -> None:
    burn = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}]); input()"
    with subprocess.Popen([sys.executable, "-c", starts], stdin=subprocess.PIPE) as parent:
        try:
            while spent_seconds(parent.pid) < 0.3:
                assert parent.poll() is None
            while Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text():
                assert parent.poll() is None
            assert spent_seconds(parent.pid) >= 0.3
        finally:
            assert parent.stdin
            parent.stdin.close()
    assert spent_seconds(parent.pid) == 0
