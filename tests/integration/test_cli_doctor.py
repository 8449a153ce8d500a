"""`forebay doctor` as a program, on machines that are well and on machines that are not."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import MODELS_FOLDER, SMOLLM2, smollm2_path
from tests.support.server import FAKE


def doctor(folder: Path, config: str = FAKE, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    (folder / "forebay.toml").write_text(config, encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FOREBAY_")}
    return subprocess.run(
        [sys.executable, "-m", "forebay.cli", "doctor", *arguments],
        cwd=folder, env=kept | environment, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip


def test_a_machine_that_is_well(tmp_path: Path) -> None:
    smollm2_path()
    found = doctor(tmp_path, "", FOREBAY_MODELS_DIR=str(MODELS_FOLDER), FOREBAY_PORT="0")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "BAD" not in found.stdout
    assert "llama.cpp (xllamacpp" in found.stdout
    assert f"{SMOLLM2} is here" in found.stdout
    assert not (tmp_path / "data").exists()  # it looks and makes nothing
    assert "\x1b" not in found.stdout  # plain when piped


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("prot = 1", "Did you mean `port`?"),
        ('database_url = "postgresql+asyncpg://nobody@127.0.0.1:1/none"', "database"),
        ('models_dir = "forebay.toml/models"', "FOREBAY_MODELS_DIR"),
        ("[pull]\nauto = false", "forebay models pull smollm2"),
        ("[pull]\nfree_bytes_min = 100_000_000_000_000_000", "Make room"),
    ],
)
def test_what_would_stop_the_server_is_said_with_a_remedy(tmp_path: Path, config: str, sentence: str) -> None:
    found = doctor(tmp_path, config, FOREBAY_PORT="0")
    assert found.returncode == 1
    assert sentence in found.stdout.partition("BAD")[2], found.stdout
    assert "Traceback" not in found.stderr


def test_a_taken_port_is_said_with_who_has_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = doctor(tmp_path, FAKE, FOREBAY_PORT=str(taken.getsockname()[1]))
    assert found.returncode == 1
    assert "--port" in found.stdout
    if sys.platform == "linux":
        assert f"process {os.getpid()} " in found.stdout


def test_a_damaged_model_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    whole = smollm2_path()
    (folder / whole.name).write_bytes(whole.read_bytes()[:1_000_000])
    found = doctor(tmp_path, "", FOREBAY_MODELS_DIR=str(folder), FOREBAY_PORT="0")
    assert found.returncode == 1
    assert f"forebay models remove {SMOLLM2}" in found.stdout


def test_a_missing_vllm_matters_only_to_those_who_use_it(tmp_path: Path) -> None:
    model = 'default_models = false\n[models.big]\nengine = "vllm"\nsource = "hf:a/b@main"\npreload = true\n'
    found = doctor(tmp_path, model, FOREBAY_PORT="0", PATH="/nowhere")
    assert found.returncode == 1
    assert "pip install 'forebay[vllm]'" in found.stdout
