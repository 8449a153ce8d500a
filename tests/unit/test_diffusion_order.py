"""Requests to the diffusion engine: what is read out of a body, and what is refused, naming the field."""

import json
from typing import Any

import pytest

from forebay.engines.connection import Refused
from forebay.engines.diffusion_order import Order, Rules, read_order
from forebay.pipelines import EDIT, GENERATE, IMAGE_TO_IMAGE
from forebay.pixels import Size

ALL = frozenset({EDIT, IMAGE_TO_IMAGE, GENERATE})
HEADER = {
    "prompt": "a cat",
    "negative_prompt": None,
    "steps": None,
    "guidance": None,
    "strength": None,
    "seeds": [1, 2],
    "reproducible": False,
    "partial_images": 0,
    "width": 16,
    "height": 8,
    "images": [{"width": 16, "height": 8}],
    "mask": True,
}


def rules(**more: Any) -> Rules:
    found = {
        "kinds": ALL,
        "strength_kinds": frozenset({EDIT, IMAGE_TO_IMAGE}),
        "factor": 8,
        "edge_max": 64,
        "steps": 20,
        "steps_max": 50,
        "guidance": 3.5,
        "guidance_max": 30.0,
        "strength": None,
        "takes_negative": True,
        "rounds_down": True,
    }
    return Rules(**{**found, **more})


def read(header: dict[str, Any], pixels: int | None = None, model: Rules | None = None, *, edits: bool = True) -> Order:
    said = {**HEADER, **header}
    count = said["width"] * said["height"] if isinstance(said["width"], int) else 0
    size = count * (3 * edits + bool(said["mask"])) if pixels is None else pixels
    return read_order(json.dumps(said).encode() + b"\n" + bytes(size), model or rules(), edits=edits)


def test_an_edit_is_read_with_what_the_model_does_by_itself() -> None:
    found = read({})
    assert found.settings.kind == EDIT
    assert (found.settings.size, found.settings.steps, found.settings.guidance) == (Size(16, 8), 20, 3.5)
    assert found.settings.strength is None
    assert (found.prompt, found.negative_prompt, found.seeds) == ("a cat", "", (1, 2))
    assert found.image is not None
    assert found.mask is not None
    assert (len(found.image), len(found.mask)) == (3 * 128, 128)


def test_without_a_mask_or_an_image_it_is_another_kind_of_work() -> None:
    assert read({"mask": False}).settings.kind == IMAGE_TO_IMAGE
    usual = rules(strength=0.5)
    made = read({"mask": False, "images": [], "strength": 0.5}, model=usual, edits=False)
    assert made.settings.kind == GENERATE
    assert made.settings.strength is None, "there is nothing to give up"
    assert (made.image, made.mask) == (None, None)


@pytest.mark.parametrize(
    ("header", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": "x" * 32_001}, "prompt"),
        ({"negative_prompt": 3}, "negative_prompt"),
        ({"steps": 0}, "steps"),
        ({"steps": 51}, "steps"),
        ({"steps": True}, "steps"),
        ({"guidance": -0.1}, "guidance"),
        ({"guidance": 31}, "guidance"),
        ({"guidance": float("nan")}, "guidance"),
        ({"strength": 1.5}, "strength"),
        ({"strength": 0}, "strength"),
        ({"strength": 0.04}, "strength"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [2**32]}, "seeds"),
        ({"seeds": [1.0]}, "seeds"),
        ({"seeds": [1] * 65}, "seeds"),
        ({"partial_images": 4}, "partial_images"),
        ({"reproducible": 1}, "reproducible"),
        ({"mask": None}, "mask"),
        ({"width": 0}, "width"),
        ({"height": 72}, "height"),
        ({"width": 12, "images": [{"width": 12, "height": 8}]}, "size"),
        ({"images": []}, "images"),
        ({"images": [{"width": 8, "height": 8}]}, "images"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_its_name(header: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as refused:
        read(header)
    assert refused.value.status == 400
    assert json.loads(refused.value.body)["error"]["param"] == param


def test_other_pixels_than_those_that_are_told_of_are_refused() -> None:
    for wrong in (0, 4 * 128 - 1, 4 * 128 + 1):
        with pytest.raises(Refused, match="other pixels"):
            read({}, wrong)


def test_a_model_is_not_asked_for_what_it_cannot_do() -> None:
    with pytest.raises(Refused, match="cannot paint from a prompt alone; it can fill in a mask"):
        read({"mask": False, "images": []}, model=rules(kinds=frozenset({EDIT})), edits=False)
    with pytest.raises(Refused, match="knows no `strength`"):
        read({"strength": 0.5}, model=rules(strength_kinds=frozenset({IMAGE_TO_IMAGE})))
    assert read({"strength": None}, model=rules(strength_kinds=frozenset())).settings.strength is None
    with pytest.raises(Refused, match="no `negative_prompt`"):
        read({"negative_prompt": "a dog"}, model=rules(takes_negative=False))


def test_an_empty_negative_prompt_is_another_than_none() -> None:
    assert read({"negative_prompt": ""}).settings.has_negative
    assert not read({}).settings.has_negative


def test_so_much_strength_as_one_step_takes_is_enough() -> None:
    assert read({"strength": 0.05}).settings.strength == 0.05
    assert read({"strength": 0.04}, model=rules(rounds_down=False)).settings.strength == 0.04
