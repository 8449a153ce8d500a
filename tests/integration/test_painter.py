"""The way of a request for pictures through an engine: what it is sent, and what becomes of its records."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image

from forebay import __version__
from forebay.dialects.imaging import ImageRules, Painted
from forebay.dialects.openai.call import Call, Context, parse
from forebay.engines import picture_records
from forebay.engines.fake_images import read_canvas
from forebay.errors import EngineGarbled, ForebayError
from forebay.media.pictures import Inputs, Pictures
from forebay.pixels import Size
from forebay.replicas.calls import ENDPOINTS, IMAGE_EDITS, IMAGE_GENERATIONS
from forebay.scheduler.painter import FINISHING, PAINTING, SEED_MAX, Painter, Painting, Pixels
from tests.support.images import encoded
from tests.support.listening import pictures

SIDE = 16
RULES = ImageRules(edge_max=SIDE, steps=4, steps_max=50, guidance=2.5, guidance_max=30.0, fingerprint="f")
ROW = bytes(3 * SIDE)
Records = Iterator[dict[str, Any] | bytes]


class Told:
    """Keeps whatever it is told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, float]] = []
        self.steps: list[tuple[int, int, int]] = []
        self.partials: list[Pixels] = []
        self.pictures: dict[int, Painted] = {}

    def stage(self, stage: str, percent: float) -> None:
        self.stages.append((stage, percent))

    def step(self, image: int, step: int, steps: int) -> None:
        self.steps.append((image, step, steps))

    def partial(self, pixels: Pixels) -> None:
        self.partials.append(pixels)

    async def kept(self, image: int, picture: Painted) -> None:
        self.pictures[image] = picture


class Engine:
    """Answers as `says` does, in pieces of any length. `asked` are the headers and the pixels that it was sent."""

    def __init__(self, says: Callable[[Call], Records]) -> None:
        self._says = says
        self.asked: list[tuple[dict[str, Any], bytes]] = []
        self._chance = Random(1)

    async def compute(self, part: Call) -> bytes:
        head, _, data = part.request.body.partition(b"\n")
        self.asked.append((json.loads(head), data))
        gatherer = part.shape.gatherer(part)
        whole = b"".join(
            each if isinstance(each, bytes) else json.dumps(each).encode() + b"\n" for each in self._says(part)
        )
        while whole:
            count = self._chance.randrange(1, max(5000, len(whole) // 32))
            gatherer.feed(whole[:count])
            whole = whole[count:]
        return gatherer.body()


def fake(part: Call) -> Records:
    """As the fake engine paints."""
    canvas = read_canvas(part.request.path, part.request.body)
    yield from (canvas.token(word) for word in canvas.words)
    yield canvas.end()


def rows(count: int, image: int = 0, **more: Any) -> dict[str, Any]:
    return {"type": "rows", "image": image, "pixels": base64.b64encode(ROW * count).decode(), **more}


def image(number: int = 0, **used: Any) -> dict[str, Any]:
    return {"type": "image", "image": number, "used": used}


def step(number: int, image: int = 0, steps: int = 4) -> dict[str, Any]:
    return {"type": "step", "image": image, "step": number, "steps": steps}


DONE: dict[str, Any] = {"type": "done", "used": {"engine": "e", "engine_version": "1"}}


@pytest.fixture
async def room(tmp_path: Path) -> AsyncIterator[Pictures]:
    async with pictures(tmp_path) as made:
        yield made
        assert list((tmp_path / "pictures").iterdir()) == []


def call(path: str = IMAGE_GENERATIONS, rules: ImageRules = RULES, count: int = 0, **fields: Any) -> Call:
    endpoint = ENDPOINTS[path]
    raw = json.dumps({"model": "m", "prompt": "a", **fields}).encode()
    made: Call = endpoint.build(
        parse(endpoint.body, raw), Context("req_1", "p", None, 1024, 4, pictures=count, picture_rules=rules)
    )
    return made


async def painting(room: Pictures, **fields: Any) -> Painting:
    return await Painter(room).prepare(call(**fields), Inputs())


async def told_by(room: Pictures, says: Callable[[Call], Records], **fields: Any) -> tuple[Told, list[Painted]]:
    told = Told()
    return told, await ran(await painting(room, **fields), Engine(says), told)


async def ran(made: Painting, engine: Engine, told: Told, **more: Any) -> list[Painted]:
    """The pictures that were kept, in order."""
    await made.run(engine.compute, told, **more)
    return [picture for _, picture in sorted(told.pictures.items())]


async def test_what_an_engine_is_asked_for(room: Pictures) -> None:
    engine = Engine(fake)
    made = await painting(
        room, prompt="a cat", negative_prompt="a dog", n=3, seed=SEED_MAX, guidance=3.5, stream=True, partial_images=1
    )
    await made.run(engine.compute, Told())
    assert engine.asked == [
        (
            {
                "prompt": "a cat", "negative_prompt": "a dog", "steps": 4, "guidance": 3.5, "strength": None,
                "seeds": [SEED_MAX, 0, 1], "reproducible": True, "partial_images": 1, "width": SIDE, "height": SIDE,
                "images": [], "mask": False,
            },
            b"",
        )
    ]  # fmt: skip


async def test_what_is_told_of_pictures_on_their_way_and_at_their_end(room: Pictures) -> None:
    told, made = await told_by(room, fake, n=2, seed=7, stream=True, partial_images=2)
    assert told.steps == [(number, each, 4) for number in range(2) for each in range(1, 5)]
    assert [(each.image, each.partial, len(each.data)) for each in told.partials] == [
        (number, part, 3 * SIDE * SIDE) for number in range(2) for part in range(2)
    ]
    assert [percent for stage, percent in told.stages if stage == PAINTING] == [
        0,
        *(12.5 * each for each in range(1, 9)),
    ]
    assert [percent for stage, percent in told.stages if stage == FINISHING] == [0, 50]
    assert made == [told.pictures[0], told.pictures[1]]
    assert len({each.data for each in made}) == 2
    for number, each in enumerate(made):
        assert (each.content_type, each.size, each.preview) == ("image/png", Size(SIDE, SIDE), None)
        assert each.used == {
            "model": "m", "model_fingerprint": "f", "prompt": "a", "steps": 4, "guidance": 2.5, "seed": 7 + number,
            "width": SIDE, "height": SIDE, "engine": "fake", "pipeline": "Fake", "notices": [],
            "forebay_version": __version__,
        }  # fmt: skip
        assert Image.open(io.BytesIO(each.data)).size == (SIDE, SIDE)


async def test_a_picture_is_what_the_engine_has_sent_of_it(room: Pictures) -> None:
    pixels = Random(2).randbytes(3 * SIDE * SIDE)

    def says(_part: Call) -> Records:
        yield b"\n\n"  # signs of life
        for start in range(0, len(pixels), 7 * 3 * SIDE):
            yield b"".join(each + b"\n" for each in picture_records.rows(0, pixels[start : start + 7 * 3 * SIDE], SIDE))
        yield image(note="own") | {"more": 1}
        yield DONE

    _, (made,) = await told_by(room, says)
    assert Image.open(io.BytesIO(made.data)).tobytes() == pixels
    assert {name: made.used[name] for name in ("note", "engine", "engine_version")} == {
        "note": "own", "engine": "e", "engine_version": "1",
    }  # fmt: skip


async def test_seeds(room: Pictures) -> None:
    asked = []
    for seed in (5, 5, None, None):
        engine = Engine(fake)
        made = await ran(await painting(room, n=2, seed=seed), engine, Told())
        ((head, _),) = engine.asked
        assert head["reproducible"] == (seed is not None)
        assert [each.used["seed"] for each in made] == head["seeds"]
        asked.append((head["seeds"], [each.data for each in made]))
    assert asked[0] == asked[1]
    assert len({tuple(seeds) for seeds, _ in asked}) == 3
    assert all(seeds[1] == (seeds[0] + 1) % (SEED_MAX + 1) for seeds, _ in asked)


async def test_one_after_the_other_and_what_was_done_before(room: Pictures) -> None:
    together = (await told_by(room, fake, n=3, seed=5))[1]
    engine, told = Engine(fake), Told()
    made = await painting(room, n=3, seed=5)
    alone = await ran(made, engine, told, done={1}, each_alone=True)
    assert [head["seeds"] for head, _ in engine.asked] == [[5], [7]]
    assert sorted(told.pictures) == [0, 2]
    assert {number for number, _, _ in told.steps} == {0, 2}
    assert [each.data for each in alone] == [together[0].data, together[2].data]
    await made.run(engine.compute, told, range(3))
    assert len(engine.asked) == 2, "nothing is left to do"


async def test_large_pictures_are_not_held_all_at_once(room: Pictures) -> None:
    side = 4096

    def black(part: Call) -> Records:
        pixels = base64.b64encode(bytes(3 * side * 64)).decode()
        yield from ({"type": "rows", "image": 0, "pixels": pixels} for _ in range(side // 64))
        yield image()
        yield DONE

    engine, told = Engine(black), Told()
    wide = replace(RULES, edge_max=side)
    made = await Painter(room).prepare(
        call(rules=wide, n=2, seed=5, size=f"{side}x{side}", output_format="jpeg"), Inputs()
    )
    assert [each.size for each in await ran(made, engine, told)] == [Size(side, side)] * 2
    assert [head["seeds"] for head, _ in engine.asked] == [[5], [6]]


async def test_edits(tmp_path: Path, room: Pictures) -> None:
    noise = Image.frombytes("RGB", (40, 30), Random(3).randbytes(3600))
    mask = Image.new("L", (40, 30), 255)
    mask.paste(0, (10, 10, 20, 20))
    through = noise.copy()
    through.putalpha(mask)
    engine, told = Engine(fake), Told()
    async with room.spool() as spool:
        await spool.write(encoded(through))
        asked = call(IMAGE_EDITS, replace(RULES, edge_factor=8), count=1, seed=1, mask_specks=3)
        made = await Painter(room).prepare(asked, Inputs((spool,)), preview=True)
        (picture,) = await ran(made, engine, told)
    ((head, data),) = engine.asked
    assert (head["width"], head["height"], head["images"], head["mask"]) == (16, 8, [{"width": 16, "height": 8}], True)
    assert len(data) == 16 * 8 * 4
    out = Image.open(io.BytesIO(picture.data))
    assert out.size == (picture.size.width, picture.size.height) == (40, 30)
    painted, kept = out.convert("RGB"), noise.copy()
    assert painted.getpixel((15, 15)) != kept.getpixel((15, 15))
    kept.paste(painted.crop((10, 10, 20, 20)), (10, 10))
    assert painted.tobytes() == kept.tobytes(), "and nothing outside the mask has changed"
    cleaned = {"mask_mode": "alpha", "mask_specks": 3, "mask_dilation": 0, "mask_feather": 0}
    assert cleaned.items() <= picture.used.items(), "what the mask was made into cannot be seen in the picture"
    assert picture.preview is not None
    assert Image.open(io.BytesIO(picture.preview)).format == "JPEG"


GARBLED: dict[str, list[dict[str, Any] | bytes]] = {
    "nothing": [],
    "no end": [rows(SIDE), image()],
    "no picture": [DONE],
    "no rows": [image(), DONE],
    "too few rows": [rows(SIDE - 1), image(), DONE],
    "too many rows": [rows(SIDE), rows(1), image(), DONE],
    "far too many rows": [rows(100 * SIDE)],
    "too many rows of what is not finished": [rows(SIDE + 1, partial=0)],
    "half a pixel": [rows(SIDE) | {"pixels": base64.b64encode(ROW * SIDE + b"x").decode()}, image(), DONE],
    "the same picture twice": [rows(SIDE), image(), rows(SIDE), image(), DONE],
    "a picture that nobody asked for": [rows(SIDE, 1)],
    "a picture before the first": [rows(SIDE, -1)],
    "the end of a picture that nobody asked for": [rows(SIDE), image(), image(1)],
    "an unfinished one that nobody asked for": [rows(SIDE, partial=1)],
    "unfinished with a number below all": [rows(SIDE, partial=-1)],
    "no base64": [rows(1) | {"pixels": "é"}],
    "base64 with a hole in it": [rows(1) | {"pixels": "AAAA AAAA"}],
    "pixels as numbers": [rows(1) | {"pixels": [0, 0, 0]}],
    "rows of none": [{"type": "rows", "pixels": "AAAA"}],
    "a picture by its name": [rows(1) | {"image": "0"}],
    "a picture and a half": [rows(1) | {"image": 0.5}],
    "a step of none": [step(1, 1)],
    "step 0": [step(0)],
    "a step after the last": [step(5)],
    "endless steps": [b'{"type": "step", "image": 0, "step": 1e999, "steps": 1e999}\n'],
    "no type": [{"image": 0}],
    "a list": [b"[]\n"],
    "no JSON": [b"{\n"],
    "what was used as a word": [rows(SIDE), image() | {"used": "all"}, DONE],
    "more after the end": [rows(SIDE), image(), DONE, DONE],
}


async def test_records_that_are_none(room: Pictures) -> None:
    for name, records in GARBLED.items():
        told = Told()
        made = await painting(room, stream=True, partial_images=1)
        try:
            await made.run(Engine(lambda _, records=records: iter(records)).compute, told)  # type: ignore[misc]
        except EngineGarbled:
            assert not told.pictures, name
        else:
            pytest.fail(name)


async def test_what_an_engine_says_that_failed(room: Pictures) -> None:
    refusal = {"error": {"code": 500, "message": "no", "type": "out_of_memory"}}
    with pytest.raises(ForebayError) as failed:
        await told_by(room, lambda _: iter([step(1), refusal]))
    assert not isinstance(failed.value, EngineGarbled)


async def test_records_of_a_kind_that_is_not_known_are_left_out(room: Pictures) -> None:
    _, made = await told_by(room, lambda _: iter([{"type": "mood", "image": 99}, rows(SIDE), image(), DONE]))
    assert len(made) == 1


async def test_a_cancel_ends_the_finishing(room: Pictures, tmp_path: Path) -> None:
    told = Told()
    running = asyncio.create_task((await painting(room, size="16x16")).run(Engine(fake).compute, told))
    while (FINISHING, 0.0) not in told.stages:
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not told.pictures
