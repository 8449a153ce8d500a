"""The pipelines of diffusers that are served, by name, and what each one does; the schedulers, and the parts of a model.

It holds names alone, and refuses to know libraries, folders and weights.
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

AUTO = "auto"
EDIT = "edit"
IMAGE_TO_IMAGE = "image_to_image"
GENERATE = "generate"

_FLUX = {GENERATE: "FluxPipeline", IMAGE_TO_IMAGE: "FluxImg2ImgPipeline"}
_SD = {
    GENERATE: "StableDiffusionPipeline",
    IMAGE_TO_IMAGE: "StableDiffusionImg2ImgPipeline",
    EDIT: "StableDiffusionInpaintPipeline",
}
_XL = {
    GENERATE: "StableDiffusionXLPipeline",
    IMAGE_TO_IMAGE: "StableDiffusionXLImg2ImgPipeline",
    EDIT: "StableDiffusionXLInpaintPipeline",
}
PIPELINES: Mapping[str, Mapping[str, str]] = {
    "FluxFillPipeline": {EDIT: "FluxFillPipeline"},
    "FluxKontextPipeline": {IMAGE_TO_IMAGE: "FluxKontextPipeline"},
    **dict.fromkeys(_FLUX.values(), _FLUX),
    **dict.fromkeys(_SD.values(), _SD),
    **dict.fromkeys(_XL.values(), _XL),
}
"""By the pipeline that a folder names: which one does what with its parts."""

Scheduler = Literal[
    "model",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
]
"""How steps follow each other; `model` is the folder's own."""

SCHEDULERS: tuple[str, ...] = get_args(Scheduler)[1:]

_DENOISERS = ("transformer", "unet")


def parts_in(index: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The parts that a `model_index.json` names, by the names of their folders."""
    return {name: part for name, part in index.items() if isinstance(part, list) and part != [None, None]}


def denoiser_of(parts: Collection[str]) -> str | None:
    """Which of the parts paints; none if there is none that is known."""
    return next((name for name in _DENOISERS if name in parts), None)
