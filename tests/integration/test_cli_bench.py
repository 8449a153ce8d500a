"""`forebay bench`, shortened: it runs without errors and writes what it promises. Figures are not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import MINILM, MODELS_FOLDER, minilm_path, smollm2_path, whisper_tiny


def bench(folder: Path, kind: str, *options: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FOREBAY_")}
    return subprocess.run(
        [sys.executable, "-m", "forebay.cli", "bench", kind, "--quick", "--out", "results", *options],
        cwd=folder, env={**kept, "FOREBAY_MODELS_DIR": str(MODELS_FOLDER)},
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "ids"),
    [("overhead", {"P1", "P2", "P3", "P4"}), ("chat", {"P5"}), ("batch", {"P6", "P9"}), ("jobs", {"P8", "P10"})],
)
def test_a_short_run(tmp_path: Path, kind: str, ids: set[str]) -> None:
    smollm2_path()
    ran = bench(tmp_path, kind)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    name = kind if kind in {"overhead", "chat"} else f"{kind}-sqlite"
    report: dict[str, Any] = json.loads((tmp_path / "results" / f"{name}.json").read_text("utf-8"))
    assert report["errors"] == 0
    assert report["requests"] > 0
    assert {measure["id"] for measure in report["measures"].values()} == ids
    assert all(len(measure["by_seed"]) == 1 for measure in report["measures"].values())
    table = (tmp_path / "results" / f"{name}.md").read_text("utf-8")
    assert all(name in table for name in report["measures"])
    assert "0 errors" in table


def test_a_short_run_of_embeddings(tmp_path: Path) -> None:
    minilm_path()
    ran = bench(tmp_path, "embed")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report: dict[str, Any] = json.loads((tmp_path / "results" / "embed-sqlite.json").read_text("utf-8"))
    assert report["errors"] == 0
    measured = {name: len(each["by_seed"]) for name, each in report["measures"].items()}
    compared = {"tokens per second, through / sentence-transformers", "tokens per second by sentence-transformers"}
    assert {name for name, seeds in measured.items() if not seeds} == compared, "there is no reference Python here"
    assert all(seeds == 1 for name, seeds in measured.items() if name not in compared)
    table = (tmp_path / "results" / "embed-sqlite.md").read_text("utf-8")
    assert table.count("not measured") == len(compared)
    assert "no `--reference-python` has it" in table


def test_a_short_run_of_recordings(tmp_path: Path) -> None:
    whisper_tiny()
    ran = bench(tmp_path, "speech")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report: dict[str, Any] = json.loads((tmp_path / "results" / "speech-whisper-tiny.en.json").read_text("utf-8"))
    assert report["errors"] == 0
    assert report["requests"] == 6, "one file and two, on both sides"
    assert {measure["id"] for measure in report["measures"].values()} == {"P12"}
    found = {name: measure["by_seed"] for name, measure in report["measures"].items()}
    assert all(len(seeds) == 1 for seeds in found.values())
    assert all(found[f"wrong words {side}"][0] < 50 for side in ("through", "by faster-whisper"))
    assert found["peak memory of faster-whisper"][0] > 100


def test_only_a_whisper_model_that_is_here_is_measured(tmp_path: Path) -> None:
    minilm_path()
    for name, said in ((MINILM, "another engine than whisper"), ("whisper-small", "There is no model")):
        ran = bench(tmp_path, "speech", "--model", name)
        assert (ran.returncode, said in ran.stderr) == (1, True), ran.stderr


def test_a_reference_python_without_the_library_is_said_so(tmp_path: Path) -> None:
    minilm_path()
    ran = bench(tmp_path, "embed", "--reference-python", sys.executable)
    assert ran.returncode == 1
    assert "Install `sentence-transformers` and `torch` there." in ran.stderr
    assert "Traceback" not in ran.stderr.partition("It said last")[0]
