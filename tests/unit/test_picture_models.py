"""Models that paint in the catalogue: what they serve, what their requests may ask for, and the command of each engine."""

import importlib
import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.dialects.imaging import ImageRules
from forebay.engine_options import DiffusionOptions
from forebay.errors import InvalidRequest
from forebay.inference import Capability
from forebay.media.images import Images
from forebay.model_config import Model
from forebay.outbound import Outbound
from forebay.replicas.calls import Calls
from forebay.replicas.catalog import DEFAULT_MODELS, Catalog
from forebay.replicas.commands import capabilities_of, command_for, picture_rules, traits_of
from forebay.replicas.repository import MANIFEST
from tests.unit.test_calls import NoFiles

_MODEL: TypeAdapter[Any] = TypeAdapter(Model)
EDITS, GENERATIONS = "/v1/images/edits", "/v1/images/generations"
EDIT, GENERATE = Capability.IMAGE_EDIT, Capability.IMAGE_GENERATION
HUB = "hf:owner/painter@main"


def _model(**said: Any) -> Any:
    return _MODEL.validate_python(said)


def _spec(model: Any, path: Path | None = None, **more: Any) -> tuple[str, dict[str, Any]]:
    command = command_for("m", model, 3, path, "key", 0, **more)
    return command.argv[-1].removeprefix("forebay.engines."), json.loads(command.environment["FOREBAY_ENGINE_SPEC"])


@pytest.mark.parametrize(
    ("task", "served", "needs_mask"),
    [
        ("auto", {EDIT, GENERATE}, False),
        ("edit", {EDIT}, True),
        ("image_to_image", {EDIT}, False),
        ("generate", {GENERATE}, False),
    ],
)
def test_a_diffusion_model_serves_its_task(task: str, served: set[Capability], *, needs_mask: bool) -> None:
    model = _model(engine="diffusion", source=HUB, options={"task": task})
    assert capabilities_of(model) == served
    assert picture_rules(model, "f").needs_mask is needs_mask
    assert (model.slots, model.queue_timeout_seconds) == (1, 600), "whoever waits does so where batch work makes way"


def test_rules_are_what_the_options_say() -> None:
    said = {
        "edge_max": 512, "edge_factor": 8, "steps": 4, "steps_max": 9, "guidance": 7.5,
        "guidance_max": 20.0, "strength": 0.5, "mask_dilation": 3, "mask_feather": 4,
    }  # fmt: skip
    rules = picture_rules(_model(engine="diffusion", source=HUB, options=said), "f")
    assert rules == ImageRules(**said, takes_strength=True, needs_mask=False, takes_prompt=True, fingerprint="f")
    filler = picture_rules(_model(engine="opencv", options={"mask_dilation": 2}), "f")
    assert filler == ImageRules(3840, 1, takes_prompt=False, mask_dilation=2, fingerprint="f")
    assert picture_rules(_model(engine="onnx", source="file:a"), "f") == ImageRules()


def test_the_engine_knows_the_schedulers_of_the_settings() -> None:
    known = importlib.import_module("forebay.engines.diffusion_folder").SCHEDULERS
    assert get_args(DiffusionOptions.model_fields["scheduler"].annotation) == ("model", *known)


@pytest.mark.parametrize("engine", ["opencv", "diffusion"])
def test_an_engine_takes_what_it_is_given_and_has_the_same_defaults(engine: str) -> None:
    model = _model(engine=engine, source=HUB if engine == "diffusion" else None)
    program, given = _spec(model, Path("/models/m"), oom_cooldown_seconds=300.0)
    assert program == engine
    spec = importlib.import_module(f"forebay.engines.{engine}").Spec
    place = {"model_path": "/models/m"} if engine == "diffusion" else {}
    plain = spec(name="m", slots=3, **place)
    for name, value in given.items():
        if name != "edge_factor":  # the catalogue takes the one that is right for every pipeline
            assert getattr(plain, name) == (tuple(value) if isinstance(value, list) else value), name
    assert (traits_of(model).probe_path, traits_of(model).metrics_path) == ("/slots", "/metrics")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"engine": "diffusion"}, "needs a `source`"),
        ({"engine": "opencv", "source": "file:a"}, "leave `source` out"),
        ({"engine": "opencv", "options": {"method": "magic"}}, "telea"),
        ({"engine": "diffusion", "source": HUB, "options": {"steps": 200}}, "at most `steps_max`"),
        ({"engine": "diffusion", "source": HUB, "options": {"guidance": 31}}, "`guidance_max`"),
        ({"engine": "diffusion", "source": HUB, "options": {"edge_max": 16, "edge_factor": 32}}, "`edge_factor`"),
        ({"engine": "fake", "options": {"edge_max": 3840}}, "too much at once"),
        ({"engine": "diffusion", "source": HUB, "options": {"scheduler": "os.system"}}, "DDIMScheduler"),
        ({"engine": "diffusion", "source": HUB, "options": {"variant": "../x"}}, "pattern"),
        (
            {"engine": "upstream", "options": {"base_url": "http://a", "capabilities": ["image_edit"]}},
            "the engines `opencv`, `diffusion` and `fake`",
        ),
        (
            {"engine": "vllm", "source": HUB, "options": {"capabilities": ["image_generation"]}},
            "the engines `opencv`, `diffusion` and `fake`",
        ),
    ],
)
def test_a_model_that_makes_no_sense_is_refused(said: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        _model(**said)


def test_the_built_in_ones_need_no_download() -> None:
    catalog = Catalog(Settings())
    for name in ("opencv-telea", "opencv-ns"):
        assert capabilities_of(DEFAULT_MODELS[name]) == {EDIT}
        assert catalog.present(name)
        assert not catalog.needs_file(name)


def test_another_variant_is_another_folder(tmp_path: Path) -> None:
    def place(**options: Any) -> Path:
        model = _model(engine="diffusion", source=HUB, options=options)
        return Catalog(Settings(models_dir=tmp_path, models={"m": model})).path("m")

    places = [place(), place(variant="fp16"), place(transformer_file="/t.gguf")]
    assert len(set(places)) == 3
    assert place(steps=5) == places[0]
    assert all(each.parent == tmp_path for each in places)


def test_a_fingerprint_changes_with_the_weights_wherever_they_lie(tmp_path: Path) -> None:
    folder, lora = tmp_path / "model", tmp_path / "lora.safetensors"
    weights = folder / "unet" / "weights.safetensors"
    weights.parent.mkdir(parents=True)

    def fingerprint(source: str = f"file:{folder}") -> str:
        options = {"loras": [{"file": str(lora)}]}
        model = _model(engine="diffusion", source=source, options=options)
        return Catalog(Settings(models_dir=tmp_path, models={"m": model})).fingerprint("m")

    found: list[str] = []
    for path in (weights, lora, weights, lora):
        path.write_bytes(b"weights" * (len(found) + 1))
        found.append(fingerprint())
        assert fingerprint() == found[-1]
    assert len(set(found)) == 4

    listed = [{"path": "unet/weights.safetensors", "size_bytes": 7, "oid": "1"}]
    (folder / MANIFEST).write_text(json.dumps(listed), encoding="utf-8")
    pulled = fingerprint()
    os.utime(weights, (1, 1))
    assert fingerprint() == pulled, "the hub names contents, so the same model is the same wherever it was pulled"
    (folder / MANIFEST).write_text(json.dumps([{**listed[0], "oid": "2"}]), encoding="utf-8")
    assert fingerprint() != pulled


async def test_a_call_knows_what_came_beside_it_and_what_the_model_can_do() -> None:
    models = {
        "painter": _model(engine="fake", options={"steps": 7, "edge_max": 640}),
        "filler": _model(engine="opencv"),
    }
    settings, clock = Settings(default_models=False, models=models), SystemClock()
    catalog = Catalog(settings)
    images = Images(settings.media, Outbound(settings.outbound, clock), NoFiles(), clock)
    calls = Calls(catalog, images, settings.audio.diarization_model)

    async def prepare(path: str, model: str, **came: Any) -> Any:
        raw = json.dumps({"model": model, "prompt": "a cat"}).encode()
        return await calls.prepare(path, raw, request_id="r", project="web", **came)

    made = await prepare(EDITS, "painter", pictures=1, with_mask=True)
    assert (made.kind, made.picture.task, made.request.capability) == ("picture", "edit", EDIT)
    assert (made.picture.steps, made.picture.rules.edge_max) == (7, 640)
    assert made.picture.rules.fingerprint == catalog.fingerprint("painter")
    assert (await prepare(GENERATIONS, "painter")).picture.task == "generate"
    with pytest.raises(InvalidRequest, match="image"):
        await prepare(EDITS, "painter")
    assert (await prepare(EDITS, "filler", pictures=1)).picture.rules.needs_mask  # it may be in the image
    with pytest.raises(InvalidRequest, match="does not serve image_generation"):
        await prepare(GENERATIONS, "filler")
