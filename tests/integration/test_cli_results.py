"""Results on their way to a file, a pipe or the screen."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forebay.cli.results import write_whole
from forebay.errors import SetupError

PRINTING = """
import typer
from forebay.cli.options import run, sentences
from forebay.cli.results import print_out

async def pieces(size):
    yield b"x" * size

def main(size: int) -> None:
    with sentences():
        run(print_out(pieces(size)))

typer.run(main)
"""


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def broken() -> AsyncIterator[bytes]:
    yield b"half"
    raise SetupError("The connection broke off.")


async def in_turns(letter: bytes, begun: asyncio.Event, other: asyncio.Event) -> AsyncIterator[bytes]:
    yield letter * 50_000
    begun.set()
    await other.wait()
    yield letter * 50_000


async def test_a_long_name_is_no_trouble(tmp_path: Path) -> None:
    out = tmp_path / ("n" * 250)
    await write_whole(pieces(b"one ", b"two"), out)
    assert out.read_bytes() == b"one two"
    assert list(tmp_path.iterdir()) == [out]


async def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "round").symlink_to("round")
    for out, why in (
        (tmp_path / "file" / "out", "Not a directory"),
        (tmp_path / "none" / "out", "No such file or directory"),
        (tmp_path / ("n" * 300), "File name too long"),
        (tmp_path / "round", "Too many levels of symbolic links"),
        (tmp_path, "Is a directory"),
        (Path(), "Is a directory"),
    ):
        with pytest.raises(SetupError, match=f"cannot be written: {why}"):
            await write_whole(pieces(b"lost"), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "round"]


async def test_a_file_is_as_it_was_when_the_rest_does_not_come(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"before")
    with pytest.raises(SetupError, match="broke off"):
        await write_whole(broken(), out)
    assert out.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [out]


async def test_two_that_write_the_same_file_do_not_mix(tmp_path: Path) -> None:
    out, first, second = tmp_path / "out", asyncio.Event(), asyncio.Event()
    await asyncio.gather(
        write_whole(in_turns(b"a", first, second), out), write_whole(in_turns(b"b", second, first), out)
    )
    assert out.read_bytes() in {b"a" * 100_000, b"b" * 100_000}
    assert list(tmp_path.iterdir()) == [out]


async def test_a_file_has_the_rights_of_the_one_before_or_those_of_any_new_one(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    (tmp_path / "secret").touch(0o600)
    (tmp_path / "program").touch()
    (tmp_path / "program").chmod(0o751)
    for name, mode in (("new", (tmp_path / "any").stat().st_mode & 0o777), ("secret", 0o600), ("program", 0o751)):
        await write_whole(pieces(b"text"), tmp_path / name)
        assert (tmp_path / name).stat().st_mode & 0o777 == mode, name


async def test_a_link_goes_on_leading_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    for target in ("there", "new"):
        link = tmp_path / f"link-{target}"
        link.symlink_to(target)
        await write_whole(pieces(b"text"), link)
        assert (link.is_symlink(), (tmp_path / target).read_bytes()) == (True, b"text")


async def test_a_pipe_stays_a_pipe_and_its_reader_gets_everything(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        await write_whole(pieces(b"a" * 10_000, b"b" * 10_000), pipe)
        assert pipe.is_fifo()
        assert os.read(reader, 30_000) == b"a" * 10_000 + b"b" * 10_000
    finally:
        os.close(reader)
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is full")
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_full_disk_behind_standard_output_is_said(size: int) -> None:
    with open("/dev/full", "wb") as full:
        ran = subprocess.run(
            [sys.executable, "-c", PRINTING, str(size)],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    sentence = "forebay: Standard output cannot be written: No space left on device.\n"
    assert (ran.returncode, ran.stderr) == (1, sentence)
