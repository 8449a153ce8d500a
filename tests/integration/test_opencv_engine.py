"""The `opencv` engine fills holes in photographs, follows nothing but the mask, and lets go of who has gone."""

import base64
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import psutil
import pytest

from forebay.engines.opencv import Spec
from forebay.model_config import OpencvModel
from forebay.replicas.catalog import DEFAULT_MODELS
from forebay.replicas.commands import command_for
from forebay.replicas.figures import read
from tests.support.engines import KEY, Engine, Stream, eventually, ready
from tests.support.photographs import Array, cat, psnr, scratches

EDITS = "/v1/images/edits"
PSNR_MIN = 25.0


@pytest.fixture(scope="module", params=["telea", "ns"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with ready("opencv", {"name": "o", "slots": 2, "method": request.param}) as engine:
        yield engine


@pytest.fixture(scope="module")
def telea() -> Iterator[Engine]:
    with ready("opencv", {"name": "o", "slots": 2, "threads": 1}) as engine:
        yield engine


def told(image: Array, **more: Any) -> dict[str, Any]:
    size = {"width": image.shape[1], "height": image.shape[0]}
    return {**size, "prompt": "", "seeds": [1], "partial_images": 0, "images": [size], "mask": True, **more}


def edit(engine: Engine, image: Array, mask: Array, **more: Any) -> tuple[list[Array], dict[str, Any]]:
    """The pictures and the last record."""
    status, records = engine.records(EDITS, told(image, **more), image.tobytes() + mask.tobytes())
    assert status == 200, records
    rows: dict[int, bytes] = {}
    for each in records:
        if each["type"] == "rows":
            rows[each["image"]] = rows.get(each["image"], b"") + base64.b64decode(each["pixels"])
    return [np.frombuffer(each, np.uint8).reshape(image.shape) for each in rows.values()], records[-1]


@pytest.mark.parametrize("seed", range(3))
def test_scratches_in_a_photograph_are_gone(engine: Engine, seed: int) -> None:
    image = cat()
    mask = scratches(*image.shape[:2], seed)
    scratched = image.copy()
    scratched[mask > 0] = 255
    (filled,), done = edit(engine, scratched, mask)
    inside = mask > 0
    assert psnr(scratched[inside], image[inside]) < 10
    assert psnr(filled[inside], image[inside]) >= PSNR_MIN
    assert np.array_equal(filled[~inside], scratched[~inside])
    assert done["used"]["engine"] == "opencv"
    assert done["used"]["engine_version"] == cv2.__version__
    assert "follows no prompt" in done["used"]["notices"][0]


def test_it_is_what_the_library_makes_of_the_whole_picture(engine: Engine) -> None:
    """Only the surroundings of a hole are looked at, so that holes can be filled one after the other."""
    image, mask = cat(), np.zeros((300, 451), np.uint8)
    mask[40:48, 60:300] = mask[100:230, 20:26] = mask[250:262, 400:412] = mask[0:9, 440:451] = 255
    (filled,), done = edit(engine, image, mask)
    method = cv2.INPAINT_TELEA if done["used"]["pipeline"] == "inpaint-telea" else cv2.INPAINT_NS
    whole = np.asarray(cv2.inpaint(image, mask, 3, method))
    assert np.mean(np.abs(filled.astype(int) - whole)[mask > 0] > 2) < 0.01


def test_the_same_again_and_for_every_picture_that_is_asked_for(telea: Engine) -> None:
    image = cat()
    mask = scratches(300, 451, 9)
    several, _ = edit(telea, image, mask, seeds=[1, 2, 3])
    (again,), _ = edit(telea, image, mask)
    assert len(several) == 3
    assert all(np.array_equal(each, again) for each in several)


def test_what_surrounds_a_hole_is_never_another_hole(telea: Engine) -> None:
    image, mask = np.full((320, 320, 3), 100, np.uint8), np.zeros((320, 320), np.uint8)
    mask[:, 30:34] = mask[290:294, :] = 255  # a corner, and in it a hole of its own
    mask[100:110, 200:210] = 255
    image[mask > 0] = 255
    (filled,), _ = edit(telea, image, mask)
    assert np.max(np.abs(filled.astype(int) - 100)) <= 5


def test_a_large_hole_is_filled_in_bounded_time_at_a_smaller_scale() -> None:
    image, mask = np.full((2600, 2600, 3), 100, np.uint8), np.zeros((2600, 2600), np.uint8)
    mask[200:2400, 200:2400] = 255
    image[mask > 0] = 0
    with ready("opencv", {"name": "o", "method": "ns"}) as engine:
        (filled,), done = edit(engine, image, mask)
        assert engine.metric("paint_seconds_total") < 30
    assert "smaller scale" in done["used"]["notices"][1]
    assert np.array_equal(filled[mask == 0], image[mask == 0])
    assert np.max(np.abs(filled.astype(int) - 100)) <= 1


def test_who_leaves_stops_it_before_the_next_hole(telea: Engine) -> None:
    image, mask = np.zeros((3200, 1400, 3), np.uint8), np.zeros((3200, 1400), np.uint8)
    for row in range(0, 3200, 400):
        mask[row : row + 250, :1300] = 255  # each takes about a second of a processor
    cancelled = telea.metric("cancelled_total")
    engine = psutil.Process(telea.pid)
    before = engine.cpu_times().user
    with contextlib.closing(Stream(telea.address, EDITS, told(image), image.tobytes() + mask.tobytes())) as stream:
        eventually(lambda: engine.cpu_times().user > before + 0.8, 30)
        assert telea.busy() == 1
        stream.half_close()
        assert b"rows" not in stream.read_to_end()
    assert telea.busy() == 0
    assert telea.metric("cancelled_total") == cancelled + 1
    assert engine.cpu_times().user < before + 5


@pytest.mark.parametrize(
    ("more", "pixels", "param"),
    [
        ({"mask": False}, 3 * 16, "mask"),
        ({"images": []}, 4 * 16, "images"),
        ({"images": [{"width": 8, "height": 2}]}, 4 * 16, "images"),
        ({"width": 0}, 4 * 16, "width"),
        ({"height": 4000}, 4 * 16, "height"),
        ({}, 4 * 16 - 1, "images"),
        ({"seeds": []}, 4 * 16, "seeds"),
        ({"seeds": [1] * 65}, 4 * 16, "seeds"),
    ],
)
def test_what_it_cannot_do_is_refused(telea: Engine, more: dict[str, Any], pixels: int, param: str) -> None:
    header = {**told(np.zeros((4, 4, 3), np.uint8)), **more}
    status, (answer,) = telea.records(EDITS, header, bytes(pixels))
    assert (status, answer["error"]["param"]) == (400, param)


def test_a_mask_of_everything_is_refused(telea: Engine) -> None:
    status, (answer,) = telea.records(EDITS, told(np.zeros((4, 4, 3), np.uint8)), bytes(48) + b"\xff" * 16)
    assert status == 400
    assert "covers everything" in answer["error"]["message"]


def test_it_tells_its_figures(telea: Engine) -> None:
    edit(telea, cat(), scratches(300, 451, 1), seeds=[1, 2])
    figures = read(telea.metrics())
    assert figures["forebay_engine_pictures_total"] >= 2
    assert figures["forebay_engine_paint_seconds_total"] > 0
    assert figures["forebay_engine_requests_running"] == 0


@pytest.mark.parametrize("name", ["opencv-telea", "opencv-ns"])
def test_the_built_in_models_start_with_what_the_catalogue_says(name: str) -> None:
    model = DEFAULT_MODELS[name]
    assert isinstance(model, OpencvModel)
    spec = json.loads(command_for(name, model, 2, None, KEY, 0).environment["FOREBAY_ENGINE_SPEC"])
    assert Spec(**spec) == Spec(name=name, slots=2, method=name.removeprefix("opencv-"))


@pytest.mark.parametrize("more", [{"method": "magic"}, {"radius": 99.0}, {"slots": 0}, {"edge_max": 9999}])
def test_settings_that_make_no_sense_end_it(more: dict[str, Any]) -> None:
    engine = Engine("opencv", {"name": "o", **more})
    assert engine.guard.wait(30) == 78
    assert "o needs" in engine.log
