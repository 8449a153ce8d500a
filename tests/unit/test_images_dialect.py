"""Bodies of requests for pictures: what each field becomes, every bound, forms that say the same as JSON, and answers."""

import base64
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import ImageEditCompletedEvent, ImageEditPartialImageEvent, ImagesResponse
from openai.types.image_gen_completed_event import ImageGenCompletedEvent
from openai.types.image_gen_partial_image_event import ImageGenPartialImageEvent

from forebay.dialects.images import ImageRef
from forebay.dialects.imaging import ImageRules, ImageTask, MaskPlan, OutputPlan, Painted
from forebay.dialects.openai.call import Call, Context, Wire, parse
from forebay.dialects.openai.image_events import Delivered, PictureShape, written
from forebay.dialects.openai.images import EDITS, GENERATIONS, IMAGE_FORM
from forebay.errors import ForebayError, InvalidRequest
from forebay.inference import Capability
from forebay.pixels import Size
from forebay.replicas.calls import ENDPOINTS
from tests.support.recordings import form_of

PATHS = (EDITS, GENERATIONS)
URL = "data:image/png;base64,AAAA"
RULES = ImageRules(
    edge_max=512, images_max=2, needs_mask=False, steps=20, steps_max=50, guidance=7.5, guidance_max=30.0, strength=0.6,
    takes_strength=True, mask_dilation=3, mask_feather=4, fingerprint="f",
)  # fmt: skip
PLAIN = ImageRules(takes_prompt=False)  # as a program that repairs scratches
FULL: Mapping[str, dict[str, Any]] = {
    EDITS: {
        "model": "m", "prompt": "a red 7", "negative_prompt": "true", "n": 3, "size": "640x480", "quality": "medium",
        "background": "opaque", "output_format": "webp", "output_compression": 80, "response_format": "url",
        "stream": True, "partial_images": 2, "user": "1", "safety_identifier": "2", "steps": 12, "guidance": 2.5,
        "seed": 4294967295, "input_fidelity": "high", "strength": 0.25, "mask_mode": "white", "mask_specks": 9,
        "mask_dilation": 8, "mask_feather": 2,
    },
    GENERATIONS: {
        "model": "m", "prompt": "a", "n": 1, "size": "auto", "quality": "low", "background": True, "backdrop": "opaque",
        "output_format": "jpeg", "output_compression": 0, "response_format": "file_id", "moderation": "low", "guidance": 0,
        "webhook_url": "https://example.com/hook", "seed": 0, "stream": False,
    },
}  # fmt: skip


def made(
    path: str = EDITS, *, pictures: int = 1, with_mask: bool = True, rules: ImageRules = RULES, **fields: Any
) -> Call:
    endpoint = ENDPOINTS[path]
    raw = json.dumps({"model": "m", "prompt": "a", **fields}).encode()
    context = Context("req_1", "p", None, 1024, 4, pictures=pictures, with_mask=with_mask, picture_rules=rules)
    call: Call = endpoint.build(parse(endpoint.body, raw), context)
    return call


def task(path: str = EDITS, **fields: Any) -> ImageTask:
    picture = made(path, **fields).picture
    assert picture is not None
    return picture


def refused(path: str = EDITS, *, saying: str = "", **fields: Any) -> str:
    with pytest.raises(InvalidRequest) as error:
        made(path, **fields)
    assert error.value.code in {"invalid_value", "missing_required_parameter"} or "Unrecognized" in str(error.value)
    assert saying in str(error.value)
    return str(error.value.param)


@pytest.mark.parametrize(
    ("path", "capability"), [(EDITS, Capability.IMAGE_EDIT), (GENERATIONS, Capability.IMAGE_GENERATION)]
)
def test_the_least_body(path: str, capability: Capability) -> None:
    call = made(path)
    assert (call.request.path, call.request.capability, call.request.body) == (path, capability, b"")
    assert (call.kind, call.stream, call.speech, call.items) == ("picture", False, None, None)
    assert call.picture == ImageTask(
        "edit" if path == EDITS else "generate", "a", steps=20, guidance=7.5, rules=RULES,
        strength=0.6 if path == EDITS else None,
        mask_plan=MaskPlan(dilation=3, feather=4) if path == EDITS else MaskPlan(),
        output=OutputPlan(size=None if path == EDITS else Size(512, 512)),
    )  # fmt: skip


def test_every_field_of_an_edit() -> None:
    assert task(**FULL[EDITS]) == ImageTask(
        "edit", "a red 7", "true", 12, 2.5, 0.25, 4294967295, 3, mask_plan=MaskPlan("white", 9, 8, 2),
        output=OutputPlan("webp", 80, "opaque", Size(640, 480)), delivery="url", partial_images=2, rules=RULES,
    )  # fmt: skip
    call = made(**FULL[EDITS])
    assert call.stream
    assert call.shape == PictureShape("edit", OutputPlan("webp", 80, "opaque", Size(640, 480)), "url", "medium")


def test_every_field_of_a_new_picture() -> None:
    assert task(GENERATIONS, **FULL[GENERATIONS]) == ImageTask(
        "generate", "a", None, 10, 0.0, None, 0, 1, output=OutputPlan("jpeg", 0, "opaque", Size(512, 512)),
        delivery="file_id", background=True, rules=RULES,
    )  # fmt: skip


def test_images_and_a_mask_are_named_in_json() -> None:
    found = task(
        pictures=0, with_mask=False, images=[{"image_url": URL}, {"file_id": "file-1"}], mask={"image_url": URL}
    )
    assert found.images == (
        ImageRef("images[0].image_url", url=URL),
        ImageRef("images[1].file_id", file_id="file-1"),
    )
    assert found.mask == ImageRef("mask.image_url", url=URL)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("field", "least", "most"),
    [("n", 1, 10), ("output_compression", 0, 100), ("seed", 0, 2**32 - 1), ("steps", 1, 50), ("guidance", 0, 30)],
)
def test_bounds(path: str, field: str, least: Any, most: Any) -> None:
    wrong: Any
    for value in (least, most):
        made(path, output_format="webp", **{field: value})
    for wrong in (
        least - 1,
        most + 1,
        -(2**70),
        2**70,
        str(least),
        True,
        [least],
        {},
        1.5 if field != "guidance" else "x",
    ):
        assert refused(path, output_format="webp", **{field: wrong}) == field


@pytest.mark.parametrize(
    ("field", "least", "most"), [("mask_specks", 0, 1_000_000), ("mask_dilation", 0, 512), ("mask_feather", 0, 512)]
)
def test_bounds_of_masks(field: str, least: Any, most: Any) -> None:
    wrong: Any
    for value in (least, most):
        made(**{field: value})
    for wrong in (least - 1, most + 1, 0.5, "1"):
        assert refused(**{field: wrong}) == field
    assert "Unrecognized" not in refused(GENERATIONS, **{field: least})


def test_strength_lies_between_nothing_and_all() -> None:
    assert [task(strength=value).strength for value in (0.001, 1)] == [0.001, 1.0]
    for wrong in (0, -0.1, 1.01, "0.5", float("1e308")):
        assert refused(strength=wrong) == "strength"
    assert refused(GENERATIONS, strength=0.5) == "strength"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("prompt", "x" * 32_001), ("negative_prompt", "x" * 32_001), ("model", ""), ("model", "m" * 257),
        ("user", "u" * 513), ("safety_identifier", "u" * 513), ("webhook_url", "h" * 2049),
        *[("quality", value) for value in ("hd", "xhigh", "max", "", 1)],
        ("background", []),
        *[("background", value) for value in ("white", "", 1, "true")],
        *[("backdrop", value) for value in ("white", True)],
        *[("output_format", value) for value in ("gif", "svg", "PNG", "")],
        *[("response_format", value) for value in ("json", "b64", "")],
        *[("stream", value) for value in ("true", 1)],
        *[("partial_images", value) for value in (-1, 4, 1.5, "1")],
    ],
)  # fmt: skip
def test_what_no_field_may_be(path: str, field: str, wrong: Any) -> None:
    assert refused(path, **{field: wrong}) == field


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "size", ["0x512", "512x0", "15x64", "64x15", "4097x64", "64x4097", "99999x99999", "512", "512X512", "x", "512x",
             " 512x512", "-1x5", "1e3x1", "512x512x3", "AUTO", "²x²", "٣x٣", 512, [512, 512], "9" * 500],
)  # fmt: skip
def test_sizes_that_are_none(path: str, size: Any) -> None:
    assert refused(path, size=size) == "size"


def test_sizes() -> None:
    assert task(size="16x4096").output.size == Size(16, 4096)
    assert task(size="auto").output.size is None
    assert task(GENERATIONS, size="512x16").output.size == Size(512, 16)
    assert refused(GENERATIONS, size="513x16", saying="The model m makes pictures of at most 512") == "size"
    usual = task(GENERATIONS, rules=replace(RULES, edge_max=3000)).output.size
    assert usual == Size(1024, 1024)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "field",
    ["style", "complexity", "frame_count", "svg", "markup", "moderations", "image", "file_id", "url", "__class__"],
)
def test_fields_that_nobody_knows(path: str, field: str) -> None:
    assert refused(path, saying="Unrecognized", **{field: "vivid"}) == field


def test_fields_of_edits_alone() -> None:
    for field in ("images", "mask", "input_fidelity", "mask_mode"):
        assert refused(GENERATIONS, saying="Unrecognized", **{field: "high"}) == field
    assert refused(saying="Unrecognized", moderation="low") == "moderation"
    for value in ("high", "low"):
        assert task(input_fidelity=value) == task()


def test_references_name_one_place_each() -> None:
    nowhere: dict[str, Any] = {"pictures": 0, "with_mask": False}
    assert refused(**nowhere) == "image"
    assert refused(images=[], **nowhere) == "images"
    assert refused(images=[{}], **nowhere) == "images[0]"
    assert refused(images=[{"file_id": "f", "image_url": URL}], **nowhere) == "images[0]"
    assert refused(images=[{"file_id": "f"}], mask={}, **nowhere) == "mask"
    assert refused(images=[{"file_id": ""}], **nowhere) == "images[0].file_id"
    assert refused(images=[{"file_id": "f", "path": "/etc"}], **nowhere) == "images[0].path"
    assert refused(images=["file-1"], **nowhere) == "images[0]"
    assert refused(images=[{"file_id": "f"}] * 17, **nowhere) == "images"
    assert refused(images=[{"file_id": "f"}]) == "images"  # one came as a file already
    assert refused(mask={"file_id": "f"}, pictures=1, with_mask=True) == "mask"


def test_no_more_images_than_the_model_takes() -> None:
    assert refused(pictures=3, saying="The model m takes at most 2 images") == "image"
    three = [{"file_id": "f"}] * 3
    assert refused(pictures=0, images=three, saying="The model m takes at most 2 images") == "images"
    assert refused(pictures=2, rules=PLAIN, saying="The model m takes one image") == "image"


def test_a_model_is_not_asked_for_what_it_does_not_know() -> None:
    value: Any
    assert task(rules=PLAIN, quality="low").steps is None
    own = replace(RULES, guidance=None, strength=None)  # the model has values of its own, and requests may name others
    assert task(rules=own, guidance=2).guidance == 2
    assert task(rules=own, strength=0.5).strength == 0.5
    assert (task(rules=own).guidance, task(rules=own).strength) == (None, None)
    assert refused(rules=own, guidance=31) == "guidance"
    for field, value in (("steps", 5), ("guidance", 1), ("strength", 0.5), ("negative_prompt", "x")):
        assert refused(rules=PLAIN, saying="The model m knows no ", **{field: value}) == field
    assert refused(steps=51, saying="The model m takes a `steps` of at most 50") == "steps"


def test_a_prompt_is_needed_where_it_is_followed() -> None:
    for path in PATHS:
        assert refused(path, prompt=None) == refused(path, prompt="") == "prompt"
    assert task(prompt=None, rules=PLAIN).prompt == ""
    assert task(prompt="noted", rules=PLAIN).prompt == "noted"


@pytest.mark.parametrize(
    ("quality", "steps", "echoed"),
    [
        ("auto", 20, "high"),
        ("standard", 20, "high"),
        ("high", 20, "high"),
        ("medium", 15, "medium"),
        ("low", 10, "low"),
    ],
)
def test_quality_is_a_part_of_the_steps(quality: str, steps: int, echoed: str) -> None:
    assert task(quality=quality).steps == steps
    assert task(quality=quality, steps=7).steps == 7
    assert task(quality=quality, rules=replace(RULES, steps=1)).steps == 1
    shape = made(quality=quality).shape
    assert isinstance(shape, PictureShape)
    assert shape.quality == echoed


def test_background_is_what_lies_behind_or_a_job() -> None:
    for value in ("transparent", "opaque", "auto"):
        assert (task(background=value).background, task(background=value).output.backdrop) == (False, value)
        both = task(background=True, backdrop=value)
        assert (both.background, both.output.backdrop) == (True, value)
    assert task(background=False).background is False
    assert refused(background="opaque", backdrop="opaque") == "backdrop"
    assert refused(webhook_url="https://example.com") == "webhook_url"
    assert refused(background="auto", webhook_url="https://example.com") == "webhook_url"
    assert refused(background=True, stream=True) == "stream"


def test_what_does_not_go_together() -> None:
    assert refused(partial_images=1) == "partial_images"
    assert task(partial_images=0).partial_images == 0
    assert refused(background="transparent", output_format="jpeg") == "background"
    assert refused(backdrop="transparent", output_format="jpeg") == "backdrop"
    assert refused(GENERATIONS, background="transparent") == "background"
    assert refused(GENERATIONS, background=True, backdrop="transparent") == "backdrop"
    assert refused(output_compression=99) == "output_compression"
    assert task(output_compression=100).output.compression == 100
    assert refused(mask_mode="white", with_mask=False) == "mask_mode"


@pytest.mark.parametrize("path", PATHS)
def test_a_form_says_the_same_as_json(path: str) -> None:
    assert json.loads(IMAGE_FORM.json_of(form_of(FULL[path]))) == FULL[path]
    assert {name for name, _ in form_of(FULL[path])} <= IMAGE_FORM.names(ENDPOINTS[path].body)
    assert not {"images", "mask"} & IMAGE_FORM.names(ENDPOINTS[path].body)


def test_the_names_of_a_form_are_those_of_bodies() -> None:
    known = set().union(*(ENDPOINTS[path].body.model_fields for path in PATHS))
    for names in (IMAGE_FORM.numbers, IMAGE_FORM.flags, IMAGE_FORM.large, IMAGE_FORM.left_out):
        assert names <= known
    for text, value in (("true", True), ("FALSE", False), ("transparent", "transparent"), ("yes", "yes")):
        assert json.loads(IMAGE_FORM.json_of([("background", text)])) == {"background": value}


NAMES = sorted(set().union(*(IMAGE_FORM.names(ENDPOINTS[path].body) for path in PATHS)))
TEXTS = ("0", "1", "-1", "5", "0.5", "1e3", "nan", "inf", "true", "auto", "64x64", "[", "{}", "x" * 300, "\x00", "²")


@given(
    fields=st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(TEXTS) | st.text(max_size=8)), max_size=6),
    path=st.sampled_from(PATHS),
)
def test_any_form_is_a_call_or_a_refusal(fields: list[tuple[str, str]], path: str) -> None:
    endpoint = ENDPOINTS[path]
    try:
        body: Wire = parse(endpoint.body, IMAGE_FORM.json_of([("model", "m"), ("prompt", "a"), *fields]))
        call = endpoint.build(body, Context("req_1", "p", None, 1, 1, pictures=1, picture_rules=RULES))
    except ForebayError as error:
        assert isinstance(error, InvalidRequest)
        assert len(str(error)) < 500
    else:
        assert call.picture is not None
        assert call.picture.steps is None or 1 <= call.picture.steps <= RULES.steps_max


PICTURE = Painted(b"\x89PNG", "image/png", Size(640, 480), {"seed": 7})
INLINE = Delivered(PICTURE)
BASE64 = base64.b64encode(b"\x89PNG").decode()


def test_the_answer_is_openais() -> None:
    shape = PictureShape("edit", OutputPlan("webp", backdrop="transparent"), "b64_json", "low")
    told = json.loads(
        written(shape.answer([INLINE, Delivered(PICTURE, url="http://x/y"), Delivered(PICTURE, file_id="file-1")], 123))
    )
    assert told == {
        "created": 123, "output_format": "webp", "quality": "low", "size": "640x480", "background": "transparent",
        "data": [
            {"b64_json": BASE64, "used": {"seed": 7}},
            {"url": "http://x/y", "used": {"seed": 7}},
            {"file_id": "file-1", "used": {"seed": 7}},
        ],
    }  # fmt: skip
    parsed = ImagesResponse.model_validate(told)
    assert parsed.data is not None
    assert [each.b64_json for each in parsed.data] == [BASE64, None, None]
    assert "background" not in PictureShape("edit", OutputPlan(), "b64_json", "high").answer([INLINE], 1)


@pytest.mark.parametrize("task_name", ["edit", "generate"])
def test_events_are_openais(task_name: Any) -> None:
    shape = PictureShape(task_name, OutputPlan("jpeg"), "b64_json", "medium")
    prefix = "image_edit" if task_name == "edit" else "image_generation"
    types: tuple[Any, Any] = (
        (ImageEditPartialImageEvent, ImageEditCompletedEvent)
        if task_name == "edit"
        else (ImageGenPartialImageEvent, ImageGenCompletedEvent)
    )
    partial, completed = shape.partial(1, 2, PICTURE, 123), shape.completed(1, INLINE, 124)
    for data, kind, name in ((partial, types[0], "partial_image"), (completed, types[1], "completed")):
        head, body = data.decode().removesuffix("\n\n").split("\n")
        assert head == f"event: {prefix}.{name}"
        event = json.loads(body.removeprefix("data: "))
        parsed = kind.model_validate(event)
        assert (parsed.type, parsed.b64_json, parsed.size) == (f"{prefix}.{name}", BASE64, "640x480")
        assert (parsed.quality, parsed.background, parsed.output_format) == ("medium", "auto", "jpeg")
        assert event["image"] == 1
    assert json.loads(partial.split(b"data: ")[1])["partial_image_index"] == 2
    step = json.loads(shape.progress(0, 1, 3).split(b"data: ")[1])
    assert step == {"type": f"{prefix}.progress", "image": 0, "step": 1, "steps": 3, "percent": 33.3}


@pytest.mark.parametrize("size", [0, 1, 3 * 2**18 - 1, 3 * 2**18, 3 * 2**18 + 1, 2_000_001])
def test_base64_of_any_length_is_whole(size: int) -> None:
    data = bytes(place % 251 for place in range(size))
    shape = PictureShape("edit", OutputPlan(), "b64_json", "high")
    picture = Painted(data, "image/png", Size(1, 1), {"prompt": '"b64_json"'})
    told = json.loads(written(shape.answer([Delivered(picture)] * 2, 1)))
    assert [base64.b64decode(each["b64_json"]) for each in told["data"]] == [data] * 2
    event = json.loads(shape.completed(0, Delivered(picture), 1).split(b"data: ", 1)[1])
    assert base64.b64decode(event["b64_json"]) == data


@pytest.mark.parametrize("name", ["x" * 100_000, "x y" * 40_000])
def test_a_name_that_nobody_knows_is_not_echoed_whole(name: str) -> None:
    for fields in ({name: 1}, {"mask": {name: 1}}):
        with pytest.raises(InvalidRequest) as error:
            parse(ENDPOINTS[EDITS].body, json.dumps({"model": "m", **fields}).encode())
        assert len(str(error.value)) < 200
        assert len(error.value.param or "") < 100
