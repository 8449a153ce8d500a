"""What of a folder of a diffusion model is refused before any library looks at it, and with which remedy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forebay.engines.diffusion_folder import Folder, Unusable, check, check_file
from forebay.pipelines import EDIT, GENERATE

PARTS = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "image_encoder": [None, None],
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write(tmp_path / "model_index.json", {"_class_name": "FluxFillPipeline", "_diffusers_version": "0", **PARTS})
    for name in ("scheduler", "tokenizer"):
        (tmp_path / name).mkdir()
    for name in ("text_encoder", "transformer", "vae"):
        write(tmp_path / name / "config.json", {})
        (tmp_path / name / "model.safetensors").touch()
    return tmp_path


def write(path: Path, said: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(said), encoding="utf-8")


def change(model: Path, **more: Any) -> None:
    index = model / "model_index.json"
    write(index, {**json.loads(index.read_text()), **more})


def test_a_whole_folder_is_taken(model: Path) -> None:
    found = check(model)
    assert found == Folder(model, "FluxFillPipeline", "transformer")
    assert found.kinds("auto") == found.kinds(EDIT) == {EDIT: "FluxFillPipeline"}
    with pytest.raises(Unusable, match=r"cannot do the task generate\. Take one of edit"):
        found.kinds(GENERATE)


def shard(model: Path) -> None:
    write(
        model / "vae" / "m.safetensors.index.json", {"weight_map": {"a": "model.safetensors", "b": "m-2.safetensors"}}
    )


def pickled(model: Path) -> None:
    (model / "vae" / "model.safetensors").rename(model / "vae" / "model.bin")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda model: (model / "model_index.json").unlink(), "layout of diffusers"),
        (lambda model: (model / "model_index.json").write_text("{"), "cannot be read"),
        (lambda model: (model / "model_index.json").write_text("[]"), "no JSON object"),
        (lambda model: (model / "model_index.json").write_text(" " * (16 * 2**20 + 1)), "too large"),
        (lambda model: change(model, _class_name="AudioLDMPipeline"), "not served. Take one of FluxFillPipeline"),
        (lambda model: change(model, _class_name=["pipeline", "Mine"]), "not served"),
        (lambda model: change(model, custom_pipelines={}), "never run"),
        (lambda model: change(model, vae=["vae.mine", "Mine"]), "a vae.mine.Mine, which is not served"),
        (lambda model: change(model, vae=["os", "system"]), "not served"),
        (lambda model: change(model, vae=["diffusers", 3]), "none of diffusers"),
        (lambda model: change(model, vae=["diffusers", "AutoencoderKL", "Mine"]), "not served"),
        (lambda model: change(model, **{"../vae": ["diffusers", "AutoencoderKL"]}), "none of diffusers"),
        (lambda model: change(model, transformer=[None, None]), "neither a transformer nor a unet"),
        (lambda model: (model / "scheduler").rmdir(), "folder of the part `scheduler` is missing"),
        (lambda model: (model / "vae" / "config.json").unlink(), "config.json of the part `vae` is missing"),
        (lambda model: write(model / "vae" / "config.json", {"auto_map": {}}), "brings code along"),
        (lambda model: (model / "vae" / "model.safetensors").unlink(), "no weights in safetensors. Get it again"),
        (pickled, "Convert them to safetensors"),
        (shard, "lacks 1 of its files"),
        (lambda model: write(model / "vae" / "a.safetensors.index.json", {"weight_map": []}), "list of weights"),
    ],
)
def test_a_folder_that_is_not_served_says_why(model: Path, spoil: Callable[[Path], object], reason: str) -> None:
    spoil(model)
    with pytest.raises(Unusable, match=reason):
        check(model)


def test_what_a_file_replaces_needs_no_weights(model: Path) -> None:
    (model / "transformer" / "model.safetensors").unlink()
    with pytest.raises(Unusable):
        check(model)
    assert check(model, replaced=True).denoiser == "transformer"


def test_a_variant_needs_its_own_files_alone(model: Path) -> None:
    write(model / "vae" / "m.safetensors.index.fp16.json", {"weight_map": {"a": "m.fp16-00001-of-00001.safetensors"}})
    assert check(model).variant is None
    with pytest.raises(Unusable, match="lacks 1 of its files"):
        check(model, variant="fp16")
    (model / "vae" / "m.fp16-00001-of-00001.safetensors").touch()
    assert check(model, variant="fp16").variant == "fp16"


def test_files_are_safetensors_or_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    check_file(tmp_path / "a.gguf")
    with pytest.raises(Unusable, match="neither safetensors nor GGUF"):
        check_file(tmp_path / "a.ckpt")
    with pytest.raises(Unusable, match="is missing"):
        check_file(tmp_path / "b.safetensors")
