"""Folders that belong to somebody else: the commands that look into them say so, and none leaves a trace.

Root may look everywhere; in these programs it gives up the two capabilities by which it may.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CONFIG = """
default_models = false
[models.pulled]
engine = "llama.cpp"
source = "hf:o/n@main/m.gguf"
preload = true
[models.painter]
engine = "diffusion"
source = "hf:o/n@main"
[models.mine]
engine = "llama.cpp"
source = "file:theirs/m.gguf"
[models.vectors]
engine = "onnx"
source = "file:theirs/m.onnx"
"""
PRESENT = """
import pathlib
from forebay import config
from forebay.replicas.catalog import Catalog
catalog = Catalog(config.load(pathlib.Path("forebay.toml"), {}))
print([name for name in catalog.names() if catalog.present(name)])
"""
REMEDY = "cannot be looked at: permission denied. Run this as the user that runs the server.\n"
DROP_BOUND, OVERRIDE, SEARCH = 24, 1, 2  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
LIBC = ctypes.CDLL(None)


def unprivileged() -> None:
    if os.geteuid() == 0:
        for capability in (OVERRIDE, SEARCH):
            assert LIBC.prctl(DROP_BOUND, capability, 0, 0, 0) == 0, "root cannot give up what it may"


def program(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FOREBAY_")}
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env={**kept, "FOREBAY_PORT": "0"}, capture_output=True, text=True, timeout=90, check=False,
        stdin=subprocess.DEVNULL, preexec_fn=unprivileged,
    )  # fmt: skip
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran


def forebay(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return program(folder, "-m", "forebay.cli", *arguments)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    folder.chmod(0)
    try:
        yield
    finally:
        folder.chmod(0o700)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "forebay.toml").write_text(CONFIG)
    for name in ("data", "theirs", "theirs/data"):
        (tmp_path / name).mkdir()
    for name in ("data/forebay.db", "theirs/data/forebay.db", "theirs/m.gguf", "theirs/m.onnx"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("db", "check"), "data/forebay.db"),
        (("db", "backup", "copy.db"), "data/forebay.db"),
        (("models", "list"), "data/models"),
        (("models", "pull", "pulled"), "data/models"),
        (("models", "verify"), "data/models"),
        (("models", "remove", "pulled"), "data/models"),
    ],
)
def test_what_lies_in_a_locked_data_folder_is_not_taken_for_absent(
    folder: Path, arguments: tuple[str, ...], what: str
) -> None:
    with locked(folder / "data"):
        ran = forebay(folder, *arguments)
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", f"forebay: {what} {REMEDY}")


@pytest.mark.parametrize(("arguments", "lock"), [((), "data"), (("--data-dir", "theirs/data"), "theirs")])
def test_the_doctor_says_it_and_goes_on(folder: Path, arguments: tuple[str, ...], lock: str) -> None:
    with locked(folder / lock):
        ran = forebay(folder, "doctor", *arguments)
    assert (ran.returncode, ran.stderr) == (1, ""), ran
    data = arguments[-1] if arguments else "data"
    assert f"BAD  The data folder {data} cannot be written." in ran.stdout
    for what in (data, f"{data}/models"):
        assert f"BAD  {what} {REMEDY}" in ran.stdout
    assert "127.0.0.1:0 is free." in ran.stdout
    assert "open files" in ran.stdout.splitlines()[-1], "the last thing that it looks at"


def test_a_model_that_cannot_be_seen_is_not_present(folder: Path) -> None:
    with locked(folder / "data"), locked(folder / "theirs"):
        assert program(folder, "-c", PRESENT).stdout == "[]\n"


def test_files_to_read_and_to_write_in_a_locked_folder(folder: Path) -> None:
    (folder / "image.png").touch()
    refusals = {
        ("models", "verify", "mine"): f"theirs {REMEDY}",
        ("db", "backup", "theirs/copy.db"): "The backup theirs/copy.db cannot be written: Permission denied. Choose",
        ("transcribe", "theirs/talk.wav"): "theirs/talk.wav cannot be looked at: Permission denied.\n",
        ("edit", "image.png", "-o", "theirs/out.png"): "theirs/out.png cannot be looked at: Permission denied.\n",
    }
    with locked(folder / "theirs"):
        for arguments, said in refusals.items():
            ran = forebay(folder, *arguments)
            assert (ran.returncode, ran.stdout) == (1, ""), (arguments, ran)
            assert ran.stderr.startswith(f"forebay: {said}"), (arguments, ran)


def test_a_configuration_that_leads_into_a_locked_folder_is_not_taken_for_none(folder: Path) -> None:
    (folder / "forebay.toml").rename(folder / "theirs/forebay.toml")
    (folder / "forebay.toml").symlink_to("theirs/forebay.toml")
    with locked(folder / "theirs"):
        ran = forebay(folder, "models", "list")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "The configuration file forebay.toml cannot be read:" in ran.stderr
