"""The diffusion engine on tiny random models: what it computes, tells, shares and stops, and what it says it cannot do."""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
from base64 import b64decode, b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
import pytest

from forebay.engines.start import CANNOT_START
from tests.support.direct_pictures import hole, paint, photo
from tests.support.engines import Engine, Stream, environment, eventually, ready
from tests.support.tiny_pipelines import folder
from tests.support.tiny_weights import lora, quantised

WIDTH, HEIGHT = 48, 64
EDITS, GENERATIONS = "/v1/images/edits", "/v1/images/generations"
LARGE, _TILES_BYTES = 640, 52 * 2**20  # decoded as a whole it takes 85 MiB more, in tiles 12


@cache
def files() -> "tempfile.TemporaryDirectory[str]":
    """Where files of weights are made for this run."""
    return tempfile.TemporaryDirectory(prefix="tiny-weights-")


@cache
def specs() -> dict[str, dict[str, Any]]:
    """The engines, by the kind of their models."""
    weights = Path(files().name)
    flux = {
        "transformer_file": str(quantised(folder("flux"), weights / "flux.gguf")),
        "loras": [{"file": str(lora(folder("flux"), weights / "lora.safetensors")), "weight": 0.5}],
    }
    return {
        "flux-fill": {},
        "flux": flux,
        "sd-inpaint": {},
        "sd": {"scheduler": "EulerAncestralDiscreteScheduler"},
    }


@dataclass(frozen=True)
class Case:
    """A request, and how diffusers is asked for the same."""

    kind: str
    pipeline: str
    asked: dict[str, Any]
    path: str = EDITS
    mask: bool = True

    @property
    def header(self) -> dict[str, Any]:
        said = {key: value for key, value in self.asked.items() if key != "seed"}
        images = [{"width": WIDTH, "height": HEIGHT}] if self.path == EDITS else []
        more = {"seeds": [self.asked["seed"]], "images": images, "mask": self.mask, "reproducible": True}
        return asked(**said) | more

    @property
    def direct(self) -> dict[str, Any]:
        names = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
        said = {names.get(name, name): value for name, value in self.asked.items()}
        seed = said.pop("seed")
        if "Img2Img" not in self.pipeline or "Flux" in self.pipeline:
            said |= {"width": WIDTH, "height": HEIGHT}
        wish = {"folder": str(folder(self.kind)), "pipeline": self.pipeline, "seed": seed, "arguments": said}
        wish |= {"width": WIDTH, "height": HEIGHT, **specs()[self.kind]}
        if self.path == EDITS:
            wish["image"] = b64encode(photo(WIDTH, HEIGHT)).decode()
        if self.mask:
            wish["mask_image"] = b64encode(hole(WIDTH, HEIGHT)).decode()
        return wish


CASES = {
    "flux fill": Case("flux-fill", "FluxFillPipeline", {"prompt": "a cat", "seed": 7, "steps": 4, "guidance": 30.0}),
    "flux fill, part of the steps": Case(
        "flux-fill", "FluxFillPipeline", {"prompt": "a dog", "seed": 8, "steps": 5, "guidance": 2.0, "strength": 0.5}
    ),
    "quantised flux, changed": Case(
        "flux", "FluxPipeline", {"prompt": "a cat", "seed": 7, "steps": 3}, GENERATIONS, mask=False
    ),
    "quantised flux from an image": Case(
        "flux",
        "FluxImg2ImgPipeline",
        {"prompt": "a cat", "seed": 9, "steps": 5, "strength": 0.5, "guidance": 3.5},
        mask=False,
    ),
    "sd inpaint": Case(
        "sd-inpaint",
        "StableDiffusionInpaintPipeline",
        {"prompt": "a cat", "negative_prompt": "a dog", "seed": 7, "steps": 4, "guidance": 7.5},
    ),
    "sd inpaint, part of the steps": Case(
        "sd-inpaint", "StableDiffusionInpaintPipeline", {"prompt": "a cat", "seed": 7, "steps": 5, "strength": 0.5}
    ),
    "sd from a prompt": Case(
        "sd", "StableDiffusionPipeline", {"prompt": "a cat", "seed": 2**32 - 1, "steps": 3}, GENERATIONS, mask=False
    ),
    "sd from an image": Case(
        "sd",
        "StableDiffusionImg2ImgPipeline",
        {"prompt": "a cat", "seed": 7, "steps": 5, "strength": 0.6},
        mask=False,
    ),
    "sd with a mask": Case("sd", "StableDiffusionInpaintPipeline", {"prompt": "a cat", "seed": 7, "steps": 3}),
}


def asked(prompt: str = "a cat", *seeds: int, width: int = WIDTH, height: int = HEIGHT, **more: Any) -> dict[str, Any]:
    """A header as the server sends it."""
    return {
        "prompt": prompt,
        "negative_prompt": None,
        "steps": None,
        "guidance": None,
        "strength": None,
        "seeds": list(seeds or (1,)),
        "reproducible": False,
        "partial_images": 0,
        "width": width,
        "height": height,
        "images": [{"width": width, "height": height}],
        "mask": True,
        **more,
    }


def pixels(header: dict[str, Any]) -> bytes:
    size = header["width"], header["height"]
    return (photo(*size) if header["images"] else b"") + (hole(*size) if header["mask"] else b"")


def painted(engine: Engine, header: dict[str, Any], path: str = EDITS) -> list[dict[str, Any]]:
    try:
        status, records = engine.records(path, header, pixels(header))
    except HTTPException:
        pytest.fail(engine.log[-2000:])
    assert status == 200, records
    return records


def picture(records: list[dict[str, Any]], image: int = 0, partial: int | None = None) -> bytes:
    """The pixels of one picture."""
    rows = [each for each in records if each["type"] == "rows" and each["image"] == image]
    return b"".join(b64decode(each["pixels"]) for each in rows if each.get("partial") == partial)


def steps(records: list[dict[str, Any]], image: int = 0) -> list[tuple[int, int]]:
    found = [each for each in records if each["type"] == "step" and each["image"] == image]
    return [(each["step"], each["steps"]) for each in found]


@pytest.fixture(scope="module")
def started() -> Iterator[dict[str, Any]]:
    """An engine for each kind of model, and what diffusers paints by itself; all loaded at once: that takes seconds."""
    kinds = specs()
    with ExitStack() as stack, ThreadPoolExecutor(len(kinds) + 1) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # the C library keeps nothing large for itself
        direct = pool.submit(paint, [case.direct for case in CASES.values()])

        def start(kind: str) -> Engine:
            spec = {"name": kind, "model_path": str(folder(kind)), "threads": 1, "batch_images": 2, **kinds[kind]}
            return stack.enter_context(ready("diffusion", {**spec, "oom_cooldown_seconds": 0.5}))

        engines = dict(zip(kinds, pool.map(start, kinds), strict=True))
        yield {**engines, "direct": dict(zip(CASES, direct.result(), strict=True))}


@pytest.fixture(scope="module")
def fill(started: dict[str, Any]) -> Engine:
    found: Engine = started["flux-fill"]
    return found


@pytest.mark.parametrize("name", CASES)
def test_it_paints_what_diffusers_paints_by_itself_and_tells_of_every_step(started: dict[str, Any], name: str) -> None:
    case = CASES[name]
    records = painted(started[case.kind], case.header, case.path)
    assert picture(records) == started["direct"][name]
    assert len(set(picture(records))) > 10, "a picture of one colour shows nothing"
    computed = int(case.asked["steps"] * case.asked.get("strength", 1.0) + 0.5 * ("Flux" in case.pipeline))
    assert steps(records) == [(step, computed) for step in range(1, computed + 1)]
    image, done = records[-2:]
    assert image == {"type": "image", "image": 0, "used": {"steps_computed": computed, "notices": []}}
    assert done["used"]["pipeline"] == case.pipeline
    assert done["used"] | {"engine": "diffusion", "device": "cpu", "dtype": "float32"} == done["used"]


def test_the_larger_pipelines_paint_the_same_as_well(prove: bool, tmp_path: Path) -> None:
    if not prove:
        pytest.skip("two more engines take long to start")
    shutil.copytree(folder("flux"), tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxKontextPipeline"}))
    said = {"prompt": "a cat", "seed": 3, "steps": 4, "strength": 0.5}
    cases = [
        (folder("xl"), Case("sd", "StableDiffusionXLInpaintPipeline", said)),
        (folder("xl"), Case("sd", "StableDiffusionXLImg2ImgPipeline", said, mask=False)),
        (
            folder("xl"),
            Case("sd", "StableDiffusionXLPipeline", {"prompt": "a cat", "seed": 3}, GENERATIONS, mask=False),
        ),
    ]
    wishes = [case.direct for _, case in cases]
    direct = paint(
        [wish | {"folder": str(path), "scheduler": None} for wish, (path, _) in zip(wishes, cases, strict=True)]
    )
    with ready("diffusion", {"name": "xl", "model_path": str(folder("xl")), "threads": 1, "steps": 50}) as engine:
        for (_, case), wanted in zip(cases, direct, strict=True):
            assert picture(painted(engine, case.header, case.path)) == wanted, case.pipeline
    with ready("diffusion", {"name": "kontext", "model_path": str(tmp_path), "threads": 1}) as engine:
        header = asked(mask=False, steps=3, partial_images=1)
        records = painted(engine, header)
        assert steps(records) == [(1, 3), (2, 3), (3, 3)]
        assert records[-1]["used"]["pipeline"] == "FluxKontextPipeline"
        assert len(set(picture(records))) > 10


def test_the_same_seed_gives_the_same_bytes_whoever_else_asks(fill: Engine) -> None:
    header = asked("a cat", 5, 6, steps=3, reproducible=True)
    alone = painted(fill, header)
    assert picture(alone, 0) != picture(alone, 1)
    others = [asked(f"a dog {number}", number, steps=3) for number in range(4)]
    with ThreadPoolExecutor(5) as pool:
        crowd = [pool.submit(painted, fill, other) for other in others]
        beside = pool.submit(painted, fill, header).result()
        told = [each.result() for each in crowd]
    assert [picture(beside, image) for image in range(2)] == [picture(alone, image) for image in range(2)]
    assert len({picture(each) for each in told}) == 4


def _paused(engine: Engine, header: dict[str, Any]) -> tuple[bool, bytes]:
    """Whether it was still at work whenever it was paused, and the picture."""
    at_work = True
    with closing(Stream(engine.address, EDITS, header, pixels(header))) as stream:
        for step in (2, 4):
            stream.read_until(f'"step": {step},'.encode())
            with engine.paused():
                at_work = at_work and b'"step": 30,' not in stream.read_what_is_there()
        told = stream.read_until(b'"type": "done"')
    return at_work, picture([json.loads(line) for line in _lines(told)])


def test_a_picture_that_was_paused_is_the_same(fill: Engine) -> None:
    header = asked("a cat", 5, steps=30, reproducible=True)
    wanted, at_work = picture(painted(fill, header)), False
    for _ in range(3):  # it may have come to its end before the pause: it is short
        if not at_work:
            at_work, found = _paused(fill, header)
            assert found == wanted
    assert at_work


def test_nothing_after_the_running_step_is_computed_once_the_caller_has_gone(fill: Engine) -> None:
    before = fill.metric("steps_total")
    header = asked("a cat", 1, 2, steps=100)
    with closing(Stream(fill.address, EDITS, header, pixels(header))) as stream:
        told = stream.read_until(b'"step": 3,')
        stream.half_close()
        told = stream.read_to_end()
    at_end = fill.metric("steps_total")
    last = max(record["step"] for record in map(json.loads, _lines(told)) if record["type"] == "step")
    assert 3 <= last <= at_end - before <= last + 1
    painted(fill, asked(steps=2))
    assert fill.metric("steps_total") == at_end + 2, "nothing went on behind the closed connection"
    assert fill.busy() == 0


def _lines(received: bytes) -> list[bytes]:
    return [line for line in received.splitlines() if line.startswith(b"{")]


def test_pictures_of_several_requests_share_a_batch(fill: Engine) -> None:
    """A long picture holds the thread until both others wait; then it is given up."""
    long = asked("a bird", steps=100, guidance=1.0, width=512, height=512)
    before = fill.metric("batches_total")
    with closing(Stream(fill.address, EDITS, long, pixels(long))) as stream, ThreadPoolExecutor(2) as pool:
        stream.read_until(b'"step": 1,')
        waiting = [pool.submit(painted, fill, asked(f"a cat {seed}", seed, steps=3)) for seed in (1, 2)]
        eventually(lambda: fill.metric("pictures_waiting") == 2, 20)
        stream.half_close()
        told = [each.result() for each in waiting]
    assert fill.metric("batches_total") == before + 2
    assert [steps(each) for each in told] == [[(1, 3), (2, 3), (3, 3)]] * 2
    assert picture(told[0]) != picture(told[1])


def test_partial_pictures_come_after_evenly_spaced_steps(started: dict[str, Any]) -> None:
    for kind in ("flux-fill", "sd-inpaint"):
        records = painted(started[kind], asked(steps=8, partial_images=3, reproducible=True))
        order = [(each["type"], each.get("partial"), each.get("step")) for each in records]
        at = [order.index(("rows", partial, None)) for partial in range(3)]
        assert [order[place - 1] for place in at] == [("step", None, 2), ("step", None, 4), ("step", None, 6)]
        shown = [picture(records, partial=partial) for partial in (0, 1, 2, None)]
        assert {len(each) for each in shown} == {3 * WIDTH * HEIGHT}
        assert len(set(shown)) == 4
        plain = painted(started[kind], asked(steps=8, reproducible=True))
        assert picture(plain) == shown[-1], "looking changes nothing"


def test_what_a_model_cannot_do_is_refused(started: dict[str, Any]) -> None:
    fill, sd = started["flux-fill"], started["sd"]
    for engine, header, path in [
        (fill, asked(mask=False, images=[]), GENERATIONS),
        (fill, asked(mask=False), EDITS),
        (fill, asked(negative_prompt="a dog"), EDITS),
        (fill, asked(width=40), EDITS),
        (sd, asked(steps=101), EDITS),
    ]:
        status, records = engine.records(path, header, pixels(header))
        assert status == 400
        assert records[0]["error"]["message"]


def test_short_of_memory_it_decodes_in_tiles_and_says_so_and_gives_the_memory_back(started: dict[str, Any]) -> None:
    engine: Engine = started["sd"]
    process = psutil.Process(engine.pid)
    header = asked(width=LARGE, height=LARGE, steps=1, guidance=1.0, mask=False, images=[])
    plain = painted(engine, header, GENERATIONS)
    assert plain[-2]["used"]["notices"] == []
    held = [process.memory_info().rss]
    for _ in range(2):
        with _limited(process, _TILES_BYTES):
            tiled = painted(engine, header, GENERATIONS)
        held.append(process.memory_info().rss)
        assert len(picture(tiled)) == len(picture(plain)) == 3 * LARGE**2
        assert "tiles" in tiled[-2]["used"]["notices"][0]
        eventually(lambda: not painted(engine, asked(steps=1))[-2]["used"]["notices"], 20)
        assert picture(painted(engine, header, GENERATIONS)) == picture(plain)
    assert max(held[1:]) - held[0] < 32 * 2**20, "nothing of the tries that failed"


def test_a_picture_that_does_not_fit_in_any_way_fails_with_a_sentence(started: dict[str, Any], prove: bool) -> None:
    if not prove:
        pytest.skip("the line of pictures is tested without a model; this takes long")
    engine: Engine = started["sd"]
    process = psutil.Process(engine.pid)
    header = asked(width=1024, height=1024, steps=1, guidance=1.0, mask=False, images=[])
    painted(engine, header, GENERATIONS)
    before = process.memory_info().rss
    with _limited(process, 6 * 2**20):
        _, records = engine.records(GENERATIONS, header, pixels(header))
    assert records[-1]["error"]["code"] == "out_of_memory"
    assert "smaller" in records[-1]["error"]["message"]
    assert process.memory_info().rss - before < 32 * 2**20
    painted(engine, header, GENERATIONS)


class _limited:  # noqa: N801  a context
    """Lets a process have so many bytes more of address space than it has."""

    def __init__(self, process: psutil.Process, more: int) -> None:
        self._process = process
        self._more = more

    def __enter__(self) -> None:
        _, hard = self._process.rlimit(resource.RLIMIT_AS)
        self._process.rlimit(resource.RLIMIT_AS, (self._process.memory_info().vms + self._more, hard))

    def __exit__(self, *_: object) -> None:
        _, hard = self._process.rlimit(resource.RLIMIT_AS)
        self._process.rlimit(resource.RLIMIT_AS, (hard, hard))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"model_path": "/nowhere"}, "layout of diffusers"),
        ({"task": "generate"}, "cannot do the task generate"),
        ({"transformer_file": "/nowhere.pt"}, "neither safetensors nor GGUF"),
        ({"loras": [{"file": "/nowhere.safetensors", "weight": 1}]}, "is missing"),
        ({"dtype": "int4"}, "dtype has to be one of"),
        ({"offload": "model"}, "offload is for a device other than the cpu"),
    ],
)
def test_what_cannot_start_says_why_at_once(spec: dict[str, Any], reason: str) -> None:
    engine = Engine("diffusion", {"name": "tiny", "model_path": str(folder("flux-fill")), **spec})
    assert engine.guard.wait(60) == CANNOT_START
    assert reason in engine.log
    engine.end()


def test_without_the_packages_it_names_the_extra() -> None:
    program = "import forebay.engines.diffusion as it; it.find_spec = lambda name: None; it.main()"
    spec = {"name": "tiny", "model_path": str(folder("flux-fill"))}
    ended = subprocess.run([sys.executable, "-c", program], env=environment(spec), capture_output=True, check=False)
    assert ended.returncode == CANNOT_START
    assert b"pip install 'forebay[diffusion]'" in ended.stderr


def test_weights_that_are_cut_off_are_refused(tmp_path: Path) -> None:
    whole = folder("sd-inpaint")
    for path in [each for each in whole.rglob("*") if each.is_file()]:
        target = tmp_path / path.relative_to(whole)
        target.parent.mkdir(exist_ok=True)
        data = path.read_bytes()
        target.write_bytes(data[: len(data) // 2] if path.parts[-2:] == ("vae", _VAE) else data)
    engine = Engine("diffusion", {"name": "tiny", "model_path": str(tmp_path), "threads": 1})
    assert engine.guard.wait(60) == CANNOT_START
    assert "diffusers cannot load it" in engine.log
    engine.end()


_VAE = "diffusion_pytorch_model.safetensors"
