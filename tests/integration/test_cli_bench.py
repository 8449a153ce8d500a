"""`forebay bench`, shortened: it runs without errors and writes what it promises. Figures are not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from forebay.bench.report import Measure, Report
from forebay.cli.bench import _show
from forebay.errors import SetupError
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
    [
        ("overhead", {"P1", "P2", "P3", "P4"}),
        ("chat", {"P5"}),
        ("batch", {"P6", "P9"}),
        ("prefix", {"P6"}),
        ("jobs", {"P8", "P10"}),
    ],
)
def test_a_short_run(tmp_path: Path, kind: str, ids: set[str]) -> None:
    smollm2_path()
    ran = bench(tmp_path, kind)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    name = kind if kind in {"overhead", "chat", "prefix"} else f"{kind}-sqlite"
    report: dict[str, Any] = json.loads((tmp_path / "results" / f"{name}.json").read_text("utf-8"))
    assert report["errors"] == 0
    assert report["requests"] > 0
    assert {measure["id"] for measure in report["measures"].values()} == ids
    assert all(len(measure["by_seed"]) == 1 for measure in report["measures"].values())
    table = (tmp_path / "results" / f"{name}.md").read_text("utf-8")
    assert all(name in table for name in report["measures"])
    assert "0 errors" in table


def test_one_mix_of_prefixes_alone(tmp_path: Path) -> None:
    smollm2_path()
    ran = bench(tmp_path, "prefix", "--mix", "none shared")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report: dict[str, Any] = json.loads((tmp_path / "results/prefix.json").read_text("utf-8"))
    assert all(name.endswith("none shared") for name in report["measures"])
    read = "tokens of prompts that the engine had to read, batch / file order, prompts: none shared"
    assert report["measures"][read]["value"] == 1, "the engines count the same lines"
    refused = bench(tmp_path, "prefix", "--mix", "non shared")
    assert refused.returncode == 1
    assert "'none shared'" in refused.stderr, "it names those that there are"


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


def test_a_short_run_of_all_kinds_at_once(tmp_path: Path) -> None:
    smollm2_path(), minilm_path(), whisper_tiny()
    ran = bench(tmp_path, "coserve")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report: dict[str, Any] = json.loads((tmp_path / "results" / "coserve.json").read_text("utf-8"))
    assert report["errors"] == 0
    assert {measure["id"] for measure in report["measures"].values()} == {"P7"}
    found = {name: measure["by_seed"] for name, measure in report["measures"].items()}
    assert all(len(seeds) == 1 for seeds in found.values())
    kinds = ("chat", "embeddings", "recordings", "images")
    assert all(found[f"{kind}, {where}, p99"][0] > 0 for kind in kinds for where in ("alone", "beside a batch"))
    assert found["work done per second, alone"][0] > 0
    assert "0 errors" in (tmp_path / "results" / "coserve.md").read_text("utf-8")


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


def test_a_short_run_of_pictures(tmp_path: Path) -> None:
    ran = bench(tmp_path, "image", "--tiny", "--steps", "2")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report: dict[str, Any] = json.loads((tmp_path / "results" / "image-tiny.json").read_text("utf-8"))
    assert (report["errors"], report["requests"]) == (0, 1)
    assert {measure["id"] for measure in report["measures"].values()} == {"P13"}
    found = {name: measure["by_seed"][0] for name, measure in report["measures"].items()}
    assert found["time of diffusers / through"] > 0
    assert found["difference of the two pictures inside the mask, of 255"] == 0, "the same seed, the same picture"
    assert found["pixels outside the mask that a picture through has changed"] == 0
    assert found["peak memory of diffusers"] > 100
    assert "StableDiffusionInpaintPipeline" in (tmp_path / "results" / "image-tiny.md").read_text("utf-8")


def test_a_grid_has_a_picture_of_every_combination(tmp_path: Path) -> None:
    (tmp_path / "forebay.toml").write_text('[models.painter]\nengine = "fake"\n')
    grid = ("--grid", "model=painter", "steps=1,3", "guidance=2", "--config", "forebay.toml")
    ran = bench(tmp_path, "image", *grid)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    said: dict[str, Any] = json.loads((tmp_path / "results" / "image-grid.json").read_text("utf-8"))
    assert [cell["settings"] for cell in said["cells"]] == [
        {"model": "painter", "steps": steps, "guidance": 2.0} for steps in (1, 3)
    ]
    assert said["common"] == {
        "image": "image-1.png", "mask": "mask-1.png", "prompt": "a red fox in the snow", "seed": 1,
    }  # fmt: skip
    first, second = (cell["differences"] for cell in said["cells"])
    assert (first["outside"], first["from_first"], second["outside"]) == (0, 0, 0)
    assert min(first["inside"], second["inside"], second["from_first"]) > 0
    assert all(cell["seconds"] > 0 and cell["used"]["seed"] == 1 for cell in said["cells"])
    table = (tmp_path / "results" / "image-grid.md").read_text("utf-8")
    assert "| model painter, steps 3, guidance 2 |" in table
    assert Image.open(tmp_path / "results" / "image-grid.png").width > 2 * 384


def test_what_a_grid_refuses_is_counted_and_its_other_pictures_are_there(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image.png")
    Image.new("L", (20, 15), 255).crop((-10, -7, 30, 23)).save(tmp_path / "mask.png")
    own = ("--image", "image.png", "--mask", "mask.png", "--model", "opencv-telea")
    ran = bench(tmp_path, "image", *own, "--grid", "mask_feather=0,9999")
    assert ran.returncode == 1
    assert "2 pictures, 1 errors." in ran.stdout
    cells = json.loads((tmp_path / "results" / "image-grid.json").read_text("utf-8"))["cells"]
    assert (cells[0]["error"], "mask_feather" in cells[1]["error"]) == (None, True)
    for arguments, words in (
        (("--grid", "steps=2"), "Say which model edits"),
        (("--grid", "steps=2", "--model", "smollm2-135m-instruct"), "does not edit images"),
        (("--grid", "steps=2", "--image", "image.png"), "An image needs its mask."),
        (("steps=2",), "are for a `--grid`"),
        ((), "Say what is to be measured"),
        (("--tiny", "--model", "a"), "Give one of"),
        (("--model", "opencv-telea"), "has another engine than diffusion"),
    ):
        refused = bench(tmp_path, "image", *arguments)
        assert (refused.returncode, words in refused.stderr) == (1, True), refused.stderr


def test_a_folder_that_takes_no_results_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "results").touch()
    ran = bench(tmp_path, "jobs")
    said = "forebay: The folder results cannot be written: File exists. Choose another with --out.\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", said)


def test_what_cannot_be_written_is_printed_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "jobs.json").mkdir()
    report = Report("jobs", 1, {"speed": Measure("P0", "jobs per second", "", [12.5])}, requests=3)
    with pytest.raises(SetupError, match=r"cannot be written: Is a directory\."):
        _show(report, tmp_path)
    printed = capsys.readouterr().out
    assert "jobs per second" in printed
    assert "3 requests, 0 errors." in printed
