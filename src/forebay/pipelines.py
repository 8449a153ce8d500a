"""The pipelines of diffusers that are served, by name, and what each one does.

It holds names alone, and refuses to know libraries, folders and weights.
"""

from collections.abc import Mapping

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
