"""Models of speech in the catalogue: where their files lie, what comes along, and the command that starts each engine."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from forebay.config import Settings
from forebay.engines import aligner, speakers, whisper
from forebay.inference import Capability
from forebay.model_config import Model
from forebay.replicas import catalog as catalogue
from forebay.replicas.catalog import Catalog
from forebay.replicas.commands import capabilities_of, command_for, traits_of

_MODEL: TypeAdapter[Any] = TypeAdapter(Model)
_HUB = "hf:owner/whisper@0f1e/model.bin"


def _model(**said: Any) -> Any:
    return _MODEL.validate_python(said)


def _catalog(folder: Path, model: Any) -> Catalog:
    return Catalog(Settings(models_dir=folder, models={"m": model}, default_models=False))


def _spec(model: Any, path: Path | None, **more: Any) -> tuple[str, dict[str, Any]]:
    command = command_for("m", model, 3, path, "key", 0, **more)
    return command.argv[-1], json.loads(command.environment["FOREBAY_ENGINE_SPEC"])


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({}, {"config.json", "model.bin", "tokenizer.json", "vocabulary.txt"}),
        (
            {"vocabulary.json": {"source": "hf:owner/whisper@0f1e/vocabulary.json"}},
            {"config.json", "model.bin", "tokenizer.json", "vocabulary.json"},
        ),
        (
            {"config.json": {"source": "https://example.org/other.json"}},
            {"config.json", "model.bin", "tokenizer.json", "vocabulary.txt"},
        ),
    ],
)
def test_the_small_files_of_a_hub_come_along(tmp_path: Path, files: dict[str, Any], names: set[str]) -> None:
    found = _catalog(tmp_path, _model(engine="whisper", source=_HUB, files=files)).files("m")
    assert {each.path.name for each in found} == names
    assert len({each.path.parent for each in found}) == 1
    assert found[0].path.parent.parent == tmp_path


def test_a_whisper_model_is_a_folder_whatever_its_file_is_called(tmp_path: Path) -> None:
    path = _catalog(tmp_path, _model(engine="whisper", source="https://example.org/weights")).path("m")
    assert path.name == "model.bin"


@pytest.mark.parametrize("named", ["folder", "file"])
def test_a_folder_of_ones_own_is_given_to_the_engine(tmp_path: Path, named: str) -> None:
    (tmp_path / "model.bin").write_bytes(b"weights")
    given = tmp_path if named == "folder" else tmp_path / "model.bin"
    model = _model(engine="whisper", source=f"file:{given}", options={"chunks_at_once": 4, "threads": 2})
    catalog = _catalog(tmp_path, model)
    assert catalog.present("m")
    program, spec = _spec(model, catalog.path("m"), oom_cooldown_seconds=7.0)
    assert program == "forebay.engines.whisper"
    assert spec == {
        "name": "m", "model_path": str(tmp_path), "slots": 3, "device": "cpu", "device_index": 0, "compute_type": "auto",
        "threads": 2, "chunks_at_once": 4, "oom_cooldown_seconds": 7.0,
    }  # fmt: skip


def test_an_aligner_may_have_no_file_at_all(tmp_path: Path) -> None:
    model = _model(engine="aligner", options={"backend": "pocketsphinx", "language": "en"})
    assert _catalog(tmp_path, model).present("m")
    assert _spec(model, None) == (
        "forebay.engines.aligner",
        {
            "name": "m", "model_path": "", "slots": 3, "backend": "pocketsphinx", "language": "en", "batch_seconds": 60,
            "threads": 0,
        },
    )  # fmt: skip


def test_an_aligner_with_an_english_model_of_its_own_aligns_english() -> None:
    assert _spec(_model(engine="aligner", options={"backend": "pocketsphinx"}), None)[1]["language"] == "en"
    assert _spec(_model(engine="aligner", source="file:a"), None)[1]["language"] is None


def test_an_aligner_of_a_hub_brings_its_letters(tmp_path: Path) -> None:
    model = _model(engine="aligner", source="hf:owner/wav2vec2@0f1e/onnx/model.onnx")
    catalog = _catalog(tmp_path, model)
    assert [each.path.name for each in catalog.files("m")] == [
        "model.onnx", "vocab.json", "preprocessor_config.json",
    ]  # fmt: skip
    assert _spec(model, catalog.path("m"))[1]["model_path"] == str(catalog.path("m"))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"engine": "whisper"}, "needs a `source`"),
        ({"engine": "speakers"}, "needs a `source`"),
        ({"engine": "aligner"}, "needs a `source`, or"),
        ({"engine": "aligner", "source": "file:a", "options": {"backend": "pocketsphinx"}}, "leave `source` out"),
        ({"engine": "whisper", "source": "file:a", "files": {"b": {"source": "file:b"}}}, "leave `files` out"),
        ({"engine": "whisper", "source": "file:a", "options": {"compute_type": "int4"}}, "int8_float16"),
        (
            {"engine": "speakers", "source": "file:a", "options": {"window_seconds": 1, "step_seconds": 2}},
            "would not be heard",
        ),
        (
            {"engine": "upstream", "options": {"base_url": "http://a", "capabilities": ["transcription"]}},
            "the engines `whisper`",
        ),
    ],
)
def test_a_model_that_makes_no_sense_is_refused(said: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        _model(**said)


def test_each_engine_serves_its_own_and_tells_figures() -> None:
    served = {
        "whisper-tiny.en": {Capability.TRANSCRIPTION, Capability.TRANSLATION},
        "speakers-ge2e": {Capability.DIARIZATION},
        "aligner-en": {Capability.ALIGNMENT},
    }
    for name, capabilities in served.items():
        model = catalogue.DEFAULT_MODELS[name]
        assert capabilities_of(model) == capabilities
        assert (traits_of(model).probe_path, traits_of(model).metrics_path) == ("/slots", "/metrics")


@pytest.mark.parametrize(
    ("said", "spec"),
    [
        ({"engine": "whisper", "source": "file:a"}, whisper.Spec),
        ({"engine": "speakers", "source": "file:a"}, speakers.Spec),
        ({"engine": "aligner", "source": "file:a"}, aligner.Spec),
    ],
)
def test_an_engine_takes_what_it_is_given_and_has_the_same_defaults(said: dict[str, Any], spec: Any) -> None:
    given = _spec(_model(**said), Path("/models/a"))[1]
    assert spec(**given) == spec(name="m", model_path=given["model_path"], slots=3)


def test_an_aligner_whose_program_is_not_installed_is_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "aligner-en" in Catalog(Settings()).names()
    monkeypatch.setattr(catalogue.importlib.util, "find_spec", lambda _name: None)
    assert "aligner-en" not in Catalog(Settings()).names()
