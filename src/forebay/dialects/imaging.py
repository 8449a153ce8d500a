"""What a request for an image asks for, whoever asks: edit one, or make one.

It holds values alone, and refuses to know how an answer is written and how pixels are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from forebay.dialects.images import ImageRef
from forebay.pixels import Size

Task = Literal["edit", "generate"]
MaskMode = Literal["alpha", "white"]
Format = Literal["png", "jpeg", "webp"]
Backdrop = Literal["auto", "opaque", "transparent"]
Delivery = Literal["b64_json", "url", "file_id"]


@dataclass(frozen=True, slots=True)
class ImageRules:
    """What the model of a request can do, and what it does where the request says nothing.

    `edge_max` is the longest side in pixels that it is given, `edge_factor` what both sides are multiples of, `images_max`
    how many images it takes. `steps` is none for a model that knows no such thing, `guidance_max` for one that knows no
    guidance; where `guidance` or `strength` is none the model has a value of its own.
    """

    edge_max: int = 1024
    edge_factor: int = 8
    images_max: int = 1
    needs_mask: bool = True
    takes_prompt: bool = True
    steps: int | None = None
    steps_max: int = 0
    guidance: float | None = None
    guidance_max: float | None = None
    strength: float | None = None
    takes_strength: bool = False
    mask_dilation: int = 0
    mask_feather: int = 0
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class MaskPlan:
    """How the mask of an edit is read and cleaned up; lengths in pixels of the image itself.

    `specks` is the area of the largest spot that is dropped, `dilation` how far the rest grows, `feather` how wide the seam
    is, inside what it has grown to: every pixel outside stays as it is.
    """

    mode: MaskMode = "alpha"
    specks: int = 0
    dilation: int = 0
    feather: int = 0


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """How a picture is written. `size` is none for that of the image, `compression` 0 to 100 in OpenAI's sense."""

    format: Format = "png"
    compression: int | None = None
    backdrop: Backdrop = "auto"
    size: Size | None = None


@dataclass(frozen=True, slots=True)
class ImageTask:
    """The work on one request, with nothing left open but the random `seed`.

    `images` and `mask` say where they are; both are empty where they came with the request. `rules` are those of the model.
    """

    task: Task
    prompt: str
    negative_prompt: str | None = None
    steps: int | None = None
    guidance: float | None = None
    strength: float | None = None
    seed: int | None = None
    n: int = 1
    images: tuple[ImageRef, ...] = ()
    mask: ImageRef | None = None
    mask_plan: MaskPlan = field(default_factory=MaskPlan)
    output: OutputPlan = field(default_factory=OutputPlan)
    delivery: Delivery = "b64_json"
    partial_images: int = 0
    background: bool = False
    rules: ImageRules = field(default_factory=ImageRules)

    @property
    def refs(self) -> tuple[ImageRef, ...]:
        """Where all of them are, the mask last."""
        return self.images if self.mask is None else (*self.images, self.mask)


@dataclass(frozen=True, slots=True)
class Painted:
    """One finished picture, encoded. `used` is all that it takes to make it again, as JSON: model, seed, steps and so on."""

    data: bytes
    content_type: str
    size: Size
    used: Mapping[str, Any]
    preview: bytes | None = None
