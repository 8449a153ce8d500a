"""What lies in a folder of a diffusion model, checked before any library looks at it.

It refuses pipelines and parts that it does not know by name, code that a folder brings along, and weights in formats that
can run code: only safetensors and GGUF are read. It opens no weights; whether a file is whole is for who reads it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebay.pipelines import AUTO, PIPELINES, SCHEDULERS, denoiser_of, parts_in

_WEIGHTS = {
    ("diffusers", "AutoencoderKL"),
    ("diffusers", "FluxTransformer2DModel"),
    ("diffusers", "UNet2DConditionModel"),
    ("stable_diffusion", "StableDiffusionSafetyChecker"),
    ("transformers", "CLIPTextModel"),
    ("transformers", "CLIPTextModelWithProjection"),
    ("transformers", "CLIPVisionModelWithProjection"),
    ("transformers", "T5EncoderModel"),
}
_OTHER_PARTS = {
    *(("diffusers", name) for name in SCHEDULERS),
    ("transformers", "CLIPFeatureExtractor"),
    ("transformers", "CLIPImageProcessor"),
    ("transformers", "CLIPTokenizer"),
    ("transformers", "CLIPTokenizerFast"),
    ("transformers", "T5Tokenizer"),
    ("transformers", "T5TokenizerFast"),
}
_CODE = ("auto_map", "custom_pipelines", "_custom_pipeline")
_JSON_BYTES_MAX = 16 * 2**20  # the index of the weights of a large model has a line for each tensor
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Unusable(Exception):
    """The folder cannot be loaded; the message says what to do about it."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that may be loaded: the pipeline that it is for, and which part paints."""

    path: Path
    pipeline: str
    denoiser: str
    variant: str | None = None

    def kinds(self, task: str) -> Mapping[str, str]:
        """What it is to do for `task`, and the pipelines for that. Raises Unusable."""
        able = PIPELINES[self.pipeline]
        if task == AUTO:
            return able
        if task not in able:
            raise Unusable(f"A {self.pipeline} cannot do the task {task}. Take one of {', '.join(able)}.")
        return {task: able[task]}


def check(path: Path, *, variant: str | None = None, replaced: bool = False) -> Folder:
    """The folder at `path`, whose denoiser needs no weights where they are `replaced` by a file. Raises Unusable."""
    index = path / "model_index.json"
    if not path.is_dir() or not index.is_file():
        raise Unusable("The model is no folder with a model_index.json. Give one in the layout of diffusers.")
    said = _json(index)
    pipeline = said.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise Unusable(f"The pipeline {pipeline!r} is not served. Take one of {', '.join(PIPELINES)}.")
    if code := [name for name in _CODE if name in said]:
        raise Unusable(f"model_index.json has `{code[0]}`, and code that a model brings along is never run. Remove it.")
    parts = parts_in(said)
    denoiser = denoiser_of(parts)
    if denoiser is None:
        raise Unusable("model_index.json names neither a transformer nor a unet. Get the whole folder again.")
    for name, part in parts.items():
        _check_part(path, name, part, variant, weights=not (replaced and name == denoiser))
    return Folder(path, pipeline, denoiser, variant)


def check_file(path: Path) -> None:
    """Whether a file of weights may be read, by its name alone. Raises Unusable."""
    if path.suffix not in {".safetensors", ".gguf"}:
        raise Unusable(f"The file {path.name} is neither safetensors nor GGUF, and nothing else is read.")
    if not path.is_file():
        raise Unusable(f"The file {path.name} is missing. Correct its path in the model's options.")


def _check_part(path: Path, name: str, part: list[Any], variant: str | None, *, weights: bool) -> None:
    folder, kind = path / name, tuple(part)
    if not _PLAIN.fullmatch(name) or not all(isinstance(each, str) for each in kind):
        raise Unusable("model_index.json is none of diffusers. Get the whole folder again.")
    if kind not in _WEIGHTS | _OTHER_PARTS:
        raise Unusable(f"The part `{name}` is a {'.'.join(kind)}, which is not served. Take a model without it.")
    if not folder.is_dir():
        raise Unusable(f"The folder of the part `{name}` is missing. Get the whole model again.")
    config = folder / "config.json"
    if config.is_file() and any(each in _json(config) for each in _CODE):
        raise Unusable(f"The part `{name}` brings code along, which is never run. Take a model without it.")
    if kind in _WEIGHTS:
        if not config.is_file():
            raise Unusable(f"The config.json of the part `{name}` is missing. Get the whole model again.")
        if weights:
            _check_weights(folder, variant)


def _check_weights(folder: Path, variant: str | None) -> None:
    """Weights of a part: safetensors, and all of them there."""
    found = {each.name for each in folder.glob("*.safetensors") if each.is_file()}
    if not found:
        others = any(each.suffix in {".bin", ".pt", ".pth", ".ckpt"} for each in folder.iterdir())
        remedy = "Convert them to safetensors: theirs is a format that can run code." if others else "Get it again."
        raise Unusable(f"The part `{folder.name}` has no weights in safetensors. {remedy}")
    indexes = list(folder.glob(f"*.safetensors.index.{variant}.json")) if variant else []
    if not indexes and not (variant and any(f".{variant}." in name for name in found)):
        indexes = list(folder.glob("*.safetensors.index.json"))
    for index in indexes:
        files = _json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(each, str) for each in files.values()):
            raise Unusable(f"The list of weights of the part `{folder.name}` cannot be read. Get it again.")
        if missing := set(files.values()) - found:
            raise Unusable(f"The part `{folder.name}` lacks {len(missing)} of its files of weights. Get it again.")


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _JSON_BYTES_MAX:
            raise Unusable(f"{path.name} of `{path.parent.name}` is too large. Get it again.")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise Unusable(f"{path.name} of `{path.parent.name}` cannot be read. Get it again.") from None
    if not isinstance(found, dict):
        raise Unusable(f"{path.name} of `{path.parent.name}` is no JSON object. Get it again.")
    return found
