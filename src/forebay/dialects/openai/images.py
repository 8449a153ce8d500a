"""The bodies of requests for pictures: edits of images, and new ones.

It refuses what it cannot check, what does not go together, and what the model of the request knows nothing of.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from forebay.dialects.images import ImageRef
from forebay.dialects.imaging import Backdrop, Delivery, Format, ImageTask, MaskMode, MaskPlan, OutputPlan, Task
from forebay.dialects.openai.call import Call, Context, Wire
from forebay.dialects.openai.form_fields import FormFields
from forebay.dialects.openai.image_events import PictureShape, Quality
from forebay.errors import InvalidRequest
from forebay.inference import Capability, Request
from forebay.pixels import Size

EDITS = "/v1/images/edits"
GENERATIONS = "/v1/images/generations"

IMAGES_MAX = 16
PICTURES_MAX = 10
EDGE_MIN, EDGE_MAX = 16, 4096  # of the pictures that are asked for by their size
STEPS_MAX = 1000
MASK_PIXELS_MAX = 512  # that a mask may grow, and of its seam
SPECK_PIXELS_MAX = 1_000_000
_EDGE_USUAL = 1024  # of a new picture whose request names no size
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_STEPS_OF: dict[Quality, tuple[int, int]] = {"high": (1, 1), "medium": (3, 4), "low": (1, 2)}  # of the model's own

IMAGE_FORM = FormFields(
    numbers=frozenset(
        {
            *("n", "steps", "guidance", "strength", "seed", "output_compression", "partial_images"),
            *("mask_specks", "mask_dilation", "mask_feather"),
        }
    ),
    flags=frozenset({"stream", "background"}),
    large=frozenset({"prompt", "negative_prompt"}),
    left_out=frozenset({"images", "mask"}),  # they are files there
)


def _sized(written: str) -> str:
    if written != "auto" and _SIZE.fullmatch(written) is None:
        raise ValueError("write a size as `WIDTHxHEIGHT`, such as `1024x1024`, or `auto`")
    return written


Prompt = Annotated[str, Field(max_length=32_000)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
MaskPixels = Annotated[int, Field(ge=0, le=MASK_PIXELS_MAX)]
Written = Annotated[str, Field(max_length=32), AfterValidator(_sized)]


class Reference(Wire):
    """Where an image is: an uploaded file, or an address (`data:`, http or https)."""

    file_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    image_url: Annotated[str, Field(min_length=1)] | None = None


class Pictured(Wire):
    """What every request for pictures has.

    `background` is what lies behind the picture, as OpenAI has it, or `true` for a job; then `backdrop` says the former.
    Accepted and without effect: `user`, `safety_identifier`.
    """

    model: Name
    prompt: Prompt | None = None
    n: Annotated[int, Field(ge=1, le=PICTURES_MAX)] | None = None
    size: Written | None = None
    quality: Literal["auto", "standard", "high", "medium", "low"] | None = None
    background: bool | Backdrop | None = None
    output_format: Format | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    response_format: Delivery | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    # Ours: what local models offer beyond OpenAI.
    negative_prompt: Prompt | None = None
    steps: Annotated[int, Field(ge=1, le=STEPS_MAX)] | None = None
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    backdrop: Backdrop | None = None
    webhook_url: Annotated[str, Field(max_length=2048)] | None = None


class EditBody(Pictured):
    """The body of POST /v1/images/edits. In a form the images and the mask are files beside it.

    `input_fidelity` is accepted without effect: what the mask leaves alone stays as it is anyway.
    """

    images: Annotated[tuple[Reference, ...], Field(min_length=1, max_length=IMAGES_MAX, fail_fast=True)] | None = None
    mask: Reference | None = None
    input_fidelity: Literal["high", "low"] | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    mask_mode: MaskMode | None = None
    mask_specks: Annotated[int, Field(ge=0, le=SPECK_PIXELS_MAX)] | None = None
    mask_dilation: MaskPixels | None = None
    mask_feather: MaskPixels | None = None


class GenerationBody(Pictured):
    """The body of POST /v1/images/generations. `moderation` is accepted without effect: nothing is filtered."""

    moderation: Literal["auto", "low"] | None = None


def edit_call(body: EditBody, context: Context) -> Call:
    """The call that `body` asks for. Raises InvalidRequest."""
    rules = context.picture_rules
    images, mask = _images(body, context), _mask(body, context)
    _check_known(body, "strength", rules.takes_strength or None, "strength")
    plan = MaskPlan(
        body.mask_mode or "alpha",
        body.mask_specks or 0,
        rules.mask_dilation if body.mask_dilation is None else body.mask_dilation,
        rules.mask_feather if body.mask_feather is None else body.mask_feather,
    )
    strength = rules.strength if body.strength is None else body.strength
    output = _output(body, _size(body))
    task = _task("edit", body, context, output, images=images, mask=mask, plan=plan, strength=strength)
    return _call(body, context, Capability.IMAGE_EDIT, EDITS, task)


def generation_call(body: GenerationBody, context: Context) -> Call:
    """The call that `body` asks for. Raises InvalidRequest."""
    most = context.picture_rules.edge_max
    size = _size(body)
    if size is None:
        size = Size(min(_EDGE_USUAL, most), min(_EDGE_USUAL, most))
    if max(size.width, size.height) > most:
        raise _refusal(f"The model {body.model} makes pictures of at most {most} pixels on a side.", "size")
    output = _output(body, size)
    if output.backdrop == "transparent":
        field = "background" if body.background == "transparent" else "backdrop"
        raise _refusal("New pictures have no transparent parts. Leave this out, or send `opaque`.", field)
    task = _task("generate", body, context, output)
    return _call(body, context, Capability.IMAGE_GENERATION, GENERATIONS, task)


def _call(body: Pictured, context: Context, capability: Capability, path: str, task: ImageTask) -> Call:
    background, stream = body.background is True, bool(body.stream)
    if body.webhook_url is not None and not background:
        raise _refusal("`webhook_url` needs `background` to be true.", "webhook_url")
    if stream and background:
        raise _refusal("A picture in the background is not streamed; its job has events.", "stream")
    if task.partial_images and not stream:
        raise _refusal("`partial_images` needs `stream` to be true.", "partial_images")
    request = Request(
        id=context.request_id,
        project=context.project,
        model=body.model,
        capability=capability,
        path=path,
        body=b"",  # written once the images are ready
        traceparent=context.traceparent,
    )
    shape = PictureShape(task.task, task.output, task.delivery, _quality(body))
    return Call(request, "picture", stream=stream, include_usage=False, tier="default", shape=shape, picture=task)


def _task(
    kind: Task,
    body: Pictured,
    context: Context,
    output: OutputPlan,
    *,
    images: Sequence[ImageRef] = (),
    mask: ImageRef | None = None,
    plan: MaskPlan | None = None,
    strength: float | None = None,
) -> ImageTask:
    """The work, with the model's own numbers where the body has none."""
    rules = context.picture_rules
    _check_known(body, "guidance", rules.guidance_max, "guidance", rules.guidance_max)
    _check_known(body, "steps", rules.steps, "steps", rules.steps_max)
    _check_known(body, "negative_prompt", rules.takes_prompt or None, "prompt")
    if not body.prompt and rules.takes_prompt:
        raise InvalidRequest("Missing required parameter: 'prompt'.", param="prompt", code="missing_required_parameter")
    return ImageTask(
        kind,
        body.prompt or "",
        body.negative_prompt,
        _steps(body, rules.steps),
        rules.guidance if body.guidance is None else body.guidance,
        strength,
        body.seed,
        body.n or 1,
        tuple(images),
        mask,
        plan or MaskPlan(),
        output,
        body.response_format or "b64_json",
        body.partial_images or 0,
        background=body.background is True,
        rules=rules,
    )


def _check_known(body: Pictured, field: str, known: object, what: str, most: float | None = None) -> None:
    """Refuse what the model knows nothing of, and more than it takes."""
    value = getattr(body, field)
    if value is None:
        return
    if known is None:
        raise _refusal(f"The model {body.model} knows no {what}. Leave `{field}` out.", field)
    if most is not None and value > most:
        raise _refusal(f"The model {body.model} takes a `{field}` of at most {most}.", field)


def _steps(body: Pictured, usual: int | None) -> int | None:
    """The steps that are asked for, or so many of the model's own as the quality says."""
    if body.steps is not None or usual is None:
        return body.steps
    part, whole = _STEPS_OF[_quality(body)]
    return max(1, round(usual * part / whole))


def _quality(body: Pictured) -> Quality:
    """What is meant, of the words that OpenAI has had for it."""
    if body.quality is None or body.quality in {"auto", "standard", "high"}:
        return "high"
    return "medium" if body.quality == "medium" else "low"


def _size(body: Pictured) -> Size | None:
    """The size that is asked for, if there is one."""
    found = _SIZE.fullmatch(body.size or "auto")
    if found is None:
        return None
    size = Size(int(found[1]), int(found[2]))
    if not EDGE_MIN <= min(size.width, size.height) <= max(size.width, size.height) <= EDGE_MAX:
        raise _refusal(f"Both sides of a `size` have {EDGE_MIN} to {EDGE_MAX} pixels.", "size")
    return size


def _output(body: Pictured, size: Size | None) -> OutputPlan:
    form: Format = body.output_format or "png"
    if form == "png" and body.output_compression not in {None, 100}:
        raise _refusal("A PNG is never compressed with losses. Ask for `jpeg` or `webp`.", "output_compression")
    if body.backdrop is not None and isinstance(body.background, str):
        raise _refusal("Send one of `background` and `backdrop`: here they mean the same.", "backdrop")
    field = "background" if isinstance(body.background, str) else "backdrop"
    backdrop: Backdrop = body.background if isinstance(body.background, str) else body.backdrop or "auto"
    if backdrop == "transparent" and form == "jpeg":
        raise _refusal("A JPEG has no transparent parts. Ask for `png` or `webp`.", field)
    return OutputPlan(form, body.output_compression, backdrop, size)


def _images(body: EditBody, context: Context) -> tuple[ImageRef, ...]:
    """Where the images are; nothing where they came with the request."""
    given = body.images or ()
    if given and context.pictures:
        raise _refusal("Send the images as files, or by `images`, and not both.", "images")
    count, most = len(given) or context.pictures, context.picture_rules.images_max
    if not count:
        raise InvalidRequest(
            "Missing required parameter: 'image'. Send the image in a form, or name it with `images`.",
            param="image",
            code="missing_required_parameter",
        )
    if count > most:
        images = "one image" if most == 1 else f"at most {most} images"
        raise _refusal(f"The model {body.model} takes {images}.", "images" if given else "image")
    return tuple(_ref(each, f"images[{place}]") for place, each in enumerate(given))


def _mask(body: EditBody, context: Context) -> ImageRef | None:
    """Where the mask is; none where it came with the request, or where there is none."""
    if body.mask is not None and context.with_mask:
        raise _refusal("Send one mask.", "mask")
    if body.mask_mode == "white" and body.mask is None and not context.with_mask:
        raise _refusal("`mask_mode` `white` is about a mask of its own. Send one as `mask`.", "mask_mode")
    return None if body.mask is None else _ref(body.mask, "mask")


def _ref(each: Reference, param: str) -> ImageRef:
    if (each.file_id is None) == (each.image_url is None):
        raise _refusal("An image is named by one of `file_id` and `image_url`.", param)
    field = "image_url" if each.file_id is None else "file_id"
    return ImageRef(f"{param}.{field}", each.image_url, each.file_id)


def _refusal(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_value")
