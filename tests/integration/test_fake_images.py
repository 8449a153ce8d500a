"""The fake engine speaks the protocol of the engines that paint: what it answers, how it streams, and how it goes wrong."""

import base64
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.engines import Engine, Stream, alive, eventually

EDITS, GENERATIONS = "/v1/images/edits", "/v1/images/generations"
WIDTH, HEIGHT = 48, 32
IMAGE = bytes(range(256)) * (3 * WIDTH * HEIGHT // 256)
MASK = bytes(WIDTH * HEIGHT)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine("fake", {"name": "fake", "slots": 2, "capabilities": ["image_edit", "image_generation"]})
    engine.wait_until_ready()
    yield engine
    engine.end()


def header(prompt: str = "a cat", images: int = 1, mask: bool = True, **more: Any) -> dict[str, Any]:
    size = {"width": WIDTH, "height": HEIGHT}
    told = {"prompt": prompt, "steps": 3, "seeds": [7], "partial_images": 0, "mask": mask, "images": [size] * images}
    return {**size, **told, **more}


def paint(engine: Engine, path: str, told: Any, data: bytes) -> list[Any]:
    with contextlib.closing(Stream(engine.address, path, told, data)) as stream:
        stream.read_until(b"0\r\n\r\n")
        assert b"application/x-ndjson" in stream.received
        return [json.loads(line) for line in stream.received.split(b"\n") if line.startswith(b"{")]


def pixels(records: list[Any], image: int = 0, partial: int | None = None) -> bytes:
    found = [each for each in records if each["type"] == "rows" and each["image"] == image]
    return b"".join(base64.b64decode(each["pixels"]) for each in found if each.get("partial") == partial)


def test_an_edit_tells_its_steps_and_then_other_pixels_everywhere(engine: Engine) -> None:
    told = paint(engine, EDITS, header(), IMAGE + MASK)
    assert [each["type"] for each in told] == ["step", "step", "step", "rows", "image", "done"]
    assert [(each["step"], each["steps"]) for each in told[:3]] == [(1, 3), (2, 3), (3, 3)]
    painted = pixels(told)
    assert len(painted) == len(IMAGE)
    assert all(one != two for one, two in zip(painted, IMAGE, strict=True))


def test_seed_prompt_and_image_decide_every_pixel(engine: Engine) -> None:
    first = pixels(paint(engine, EDITS, header(), IMAGE + MASK))
    assert pixels(paint(engine, EDITS, header(), IMAGE + MASK)) == first
    assert pixels(paint(engine, EDITS, header(seeds=[8]), IMAGE + MASK)) != first
    assert pixels(paint(engine, EDITS, header("a dog"), IMAGE + MASK)) != first
    assert pixels(paint(engine, EDITS, header(), IMAGE[::-1] + MASK)) != first


def test_several_pictures_with_partial_ones(engine: Engine) -> None:
    told = paint(engine, GENERATIONS, header(images=0, mask=False, seeds=[1, 2], partial_images=2, steps=6), b"")
    assert [each["image"] for each in told if each["type"] == "image"] == [0, 1]
    found = [pixels(told, image, partial) for image in (0, 1) for partial in (None, 0, 1)]
    assert {len(each) for each in found} == {len(IMAGE)}
    assert len(set(found)) == len(found)
    assert pixels(paint(engine, GENERATIONS, header(images=0, mask=False, seeds=[2], steps=6), b"")) == found[3]


def test_large_pictures_come_in_whole_rows_of_at_most_a_mebibyte(engine: Engine) -> None:
    told = paint(engine, GENERATIONS, header(images=0, mask=False, width=1000, height=800, steps=1), b"")
    rows = [base64.b64decode(each["pixels"]) for each in told if each["type"] == "rows"]
    assert len(rows) > 1
    assert all(len(each) <= 2**20 and len(each) % 3000 == 0 for each in rows)
    assert len(b"".join(rows)) == 3 * 1000 * 800


def _open(engine: Engine, prompt: str) -> Stream:
    return Stream(engine.address, EDITS, header(prompt, steps=4), IMAGE + MASK)


def test_steps_come_as_they_are_done_and_a_half_closed_connection_stops_it(engine: Engine) -> None:
    before = engine.get("/fake/stats")[1]["cancelled"]
    with contextlib.closing(_open(engine, "[[fake hang_at=2]]")) as stream:
        assert stream.read_until(b'"step": 2').count(b'"step"') == 4
        assert engine.busy() == 1
        stream.half_close()
        assert b'"done"' not in stream.read_to_end()
    eventually(lambda: engine.busy() == 0, 5)
    assert engine.get("/fake/stats")[1]["cancelled"] == before + 1


@pytest.mark.parametrize("how", ["crash_at=1", "oom_at=1"])
def test_it_dies_before_a_step(how: str) -> None:
    engine = Engine("fake", {"name": "fake", "capabilities": ["image_edit"]})
    try:
        engine.wait_until_ready()
        pid = engine.pid
        with contextlib.closing(_open(engine, f"[[fake {how}]]")) as stream:
            received = stream.read_to_end()
        assert received.count(b'"type": "step"') == 1
        assert b'"done"' not in received
        eventually(lambda: not alive(pid), 5)
    finally:
        engine.end()


def test_it_answers_garbage_and_errors_on_request(engine: Engine) -> None:
    with contextlib.closing(_open(engine, "[[fake garbage_at=1]]")) as stream:
        assert b"<garbage>" in stream.read_until(b"0\r\n\r\n")
    with contextlib.closing(_open(engine, "[[fake status=503]]")) as stream:
        assert stream.read_until(b"}").startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize(
    ("path", "told", "data"),
    [
        (EDITS, [], b""),
        (EDITS, header(), IMAGE),
        (EDITS, header(), IMAGE + MASK + b"\0"),
        (EDITS, header(images=0), MASK),
        (EDITS, header(width=0), IMAGE + MASK),
        (EDITS, header(width=10**9), IMAGE + MASK),
        (EDITS, header(seeds=[]), IMAGE + MASK),
        (GENERATIONS, header(mask=False), IMAGE),
        (GENERATIONS, header(images=0, mask=False, partial_images=4), b""),
    ],
)
def test_what_makes_no_sense_is_refused(engine: Engine, path: str, told: Any, data: bytes) -> None:
    with contextlib.closing(Stream(engine.address, path, told, data)) as stream:
        assert stream.read_until(b"}").startswith(b"HTTP/1.1 400 ")


def test_what_it_does_not_serve_is_not_there() -> None:
    engine = Engine("fake", {"name": "fake", "capabilities": ["image_generation"]})
    try:
        engine.wait_until_ready()
        assert engine.ask("POST", EDITS, {})[0] == 404
    finally:
        engine.end()
