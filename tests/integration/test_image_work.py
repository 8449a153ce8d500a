"""The program that works on images, as it is spoken to: a photograph there and back, and what its answers mean."""

import io
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from forebay.engines import fence, image_formats, image_orders, image_output, image_steps, image_work
from forebay.media import editor
from tests.support.image_program import Answer, Program, running
from tests.support.images import encoded
from tests.support.photographs import cat

MODULES = fence, image_formats, image_steps, image_output, image_orders
PLAN = {"mode": "white", "specks": 5, "dilation": 6, "feather": 4}
SCRATCH = (180, 40, 200, 260)
SPECK = (400, 20)


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    with running() as one:
        yield one


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(cat())


@pytest.fixture(scope="module")
def mask(photograph: Image.Image) -> bytes:
    """A scratch, and a speck that nobody meant."""
    image = Image.new("L", photograph.size)
    image.paste(255, SCRATCH)
    image.putpixel(SPECK, 255)
    return encoded(image)


def picture_of(answer: Answer) -> Image.Image:
    assert answer.verdict == fence.OK, answer
    assert len(answer.data) == answer.facts["picture"] + answer.facts["preview"]
    return Image.open(io.BytesIO(answer.data[: answer.facts["picture"]]))


@pytest.mark.parametrize("output", [{"format": "png"}, {"format": "webp"}], ids=["png", "webp"])
@pytest.mark.parametrize("edge", [512, 256])
def test_a_photograph_comes_back_as_it_was_but_for_what_was_marked(
    program: Program, photograph: Image.Image, mask: bytes, output: dict[str, Any], edge: int
) -> None:
    cut = program.prepare([encoded(photograph)], mask, plan=PLAN, output=output, edge_max=edge, edge_factor=1)
    size = cut.facts["size"]
    assert max(size) == min(edge, photograph.width)
    to_paint = np.frombuffer(cut.data, np.uint8, offset=3 * size[0] * size[1]).reshape(size[::-1])
    painted = bytes((0, 255, 0)) * (size[0] * size[1])
    made = program.finish([encoded(photograph)], mask, painted, painted=size, plan=PLAN, output=output)
    old, new = np.asarray(photograph), np.asarray(picture_of(made))
    changed = (old != new).any(axis=2)
    left, top, right, bottom = (side + step for side, step in zip(SCRATCH, (-6, -6, 6, 6), strict=True))
    outside = np.ones_like(changed)
    outside[top:bottom, left:right] = False
    assert not changed[outside].any(), "neither around it, nor where the speck was"
    assert (new[SCRATCH[1] : SCRATCH[3], SCRATCH[0] : SCRATCH[2]] == (0, 255, 0)).all()
    if edge > photograph.width:
        assert (to_paint[changed] == 255).all(), "nothing changes that was not painted"
        assert set(np.unique(to_paint)) == {0, 255}


def test_what_is_decoded_for_a_model_is_the_photograph(program: Program, photograph: Image.Image, mask: bytes) -> None:
    cut = program.prepare([encoded(photograph)], mask, plan=PLAN, edge_factor=1)
    assert cut.data[: 3 * photograph.width * photograph.height] == photograph.tobytes()
    same = program.prepare([encoded(photograph)], mask, plan=PLAN, edge_factor=1)
    assert (same.facts, same.data) == (cut.facts, cut.data)


def test_the_same_order_gives_the_same_bytes(program: Program, photograph: Image.Image, mask: bytes) -> None:
    for name in ("png", "jpeg", "webp"):
        more = {"painted": [64, 48], "plan": PLAN, "output": {"format": name, "compression": 80}}
        one, other = (program.finish([encoded(photograph)], mask, bytes(64 * 48 * 3), **more) for _ in range(2))
        assert picture_of(one).format == name.upper()
        assert one.data == other.data


def test_another_size_of_the_same_shape(program: Program, photograph: Image.Image, mask: bytes) -> None:
    output = {"size": [902, 600]}
    more = {"painted": [64, 48], "plan": PLAN, "output": output}
    assert picture_of(program.finish([encoded(photograph)], mask, bytes(64 * 48 * 3), **more)).size == (902, 600)
    refused = program.prepare([encoded(photograph)], mask, plan=PLAN, output={"size": [600, 600]})
    assert (refused.verdict, refused.facts) == (image_output.OTHER_SHAPE, {"file": "output"})


def test_a_verdict_means_the_same_everywhere() -> None:
    told = {
        name: int(number) for number, name in re.findall(r"^(\d+) +([A-Z_]+)", image_work.__doc__ or "", re.MULTILINE)
    }
    assert told == {verdict.name: verdict.value for verdict in editor._Verdict}
    assert max(told.values()) == image_work._HIGHEST
    for name, number in told.items():
        assert [getattr(module, name) for module in MODULES if hasattr(module, name)][:1] == [number]
