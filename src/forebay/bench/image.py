"""Edits of images through the server beside diffusers driven directly (P13).

Both are given the same files, an image and its mask, and end with the bytes of a PNG: each decodes both, makes them as
large as the model takes them, runs the same pipeline with as many steps and the same seed, makes what was painted as
large as the image again, puts it into the image where the mask is, and encodes that. Diffusers is driven the fastest
way that is known: in inference mode and outside of the main thread, whose memory the C library gives back after each
step. The time of a picture through the server is that of its request, upload and answer included; the time of diffusers
is what its process needs from the paths of the files to the bytes. The ratio is the time of diffusers by that of the
server, over all pictures of a seed: 1 costs nothing.

It refuses to compare what is not alike: pipelines that are set up in a way that diffusers is not driven here.
"""

import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forebay.bench.edits import Edit, Subject, drawing, editing, sample
from forebay.bench.painters import Choice, chosen
from forebay.bench.processes import Memory, spent_seconds, watched
from forebay.bench.program import Program, running
from forebay.bench.report import Measure, Report
from forebay.bench.stage import config_of, of_engine, served
from forebay.config import Settings
from forebay.errors import SetupError
from forebay.model_config import DiffusionModel
from forebay.pixels import Size as Pixels
from forebay.pixels import fit

_ALIKE = {"mask_dilation": 0, "mask_feather": 0, "output_format": "png"}  # what diffusers does as well
_REMEDY = "Look at what it said."
_RATIO = "time of diffusers / through"


@dataclass(frozen=True, slots=True)
class Size:
    """How much to measure for each seed: pictures on each side, and the sides of the image in pixels."""

    pictures: int
    edge: int


FULL = Size(2, 512)
QUICK = Size(1, 64)


def measures() -> dict[str, Measure]:
    """What a run fills in."""
    found = [
        Measure("P13", _RATIO, "", [], 0.97, 0.99, more_is_better=True),
        Measure("P13", "a picture through, median", "s"),
        Measure("P13", "a picture by diffusers, median", "s"),
        Measure("P13", "what the server adds to a picture, median", "s"),
        Measure("P13", "CPU time of a picture, through / diffusers", ""),
        Measure("P13", "difference of the two pictures inside the mask, of 255", ""),
        Measure("P13", "pixels outside the mask that a picture through has changed", ""),
        Measure("P13", "peak memory of the server and its processes", "MiB"),
        Measure("P13", "peak memory of diffusers", "MiB"),
    ]
    return {measure.name: measure for measure in found}


async def run(
    settings: Settings, choice: Choice, fixed: Mapping[str, Any], seeds: int, size: Size, say: Callable[[str], None]
) -> Report:
    """Measure everything once for each seed; `fixed` are fields of all requests. Raises SetupError."""
    async with chosen(settings, choice) as (found, name):
        if name is None:
            raise SetupError("Say what is to be measured with `--model`, `--source` or `--tiny`.")
        return await _measured(found, name, fixed, seeds, size, say)


async def _measured(
    settings: Settings, name: str, fixed: Mapping[str, Any], seeds: int, size: Size, say: Callable[[str], None]
) -> Report:
    report = Report(f"image-{name}", seeds, measures())
    model, folder = _model(settings, name)
    asked = {"model": name, "steps": model.options.steps, **fixed, **_ALIKE}
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as scratch:
        async with (
            served(config_of({name: model})) as (url, key, pid),
            _directly(model, folder) as program,
            editing(url, key) as edit,
            drawing() as pictures,
            watched(pid) as of_server,
            watched(program.pid) as of_program,
        ):
            bench = _Bench(edit, program, pictures, model, asked, Path(scratch), report, pid, of_server, of_program)
            say("load both")
            await bench.warm_up(size.edge)
            for seed in range(1, seeds + 1):
                say(f"seed {seed}: {size.pictures} pictures of {size.edge} pixels, {asked['steps']} steps")
                await bench.measure(size, seed)
    report.notes += [
        f"{name}: {bench.version}, {model.options.dtype} on {model.options.device}, {asked['steps']} steps.",
        f"An image of {size.edge} x {size.edge} pixels, another one for each picture; its mask covers a fifth of it.",
        "Both decode image and mask, fit them to the model and paint, fit that to the image, and encode what both make a PNG.",
        "The ratio is of the time of a request, and of diffusers from the paths of the files to the bytes.",
        "Client, server, engine and diffusers share the machine's cores; only one side works at a time, in turns.",
        "Memory is the sum over the processes of a side, and counts libraries that they share more than once.",
    ]
    return report


@dataclass(slots=True)
class _Side:
    """What one side has done for a seed."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0


@dataclass(slots=True)
class _Bench:
    edit: Edit
    program: Program
    pictures: Program
    model: DiffusionModel
    asked: Mapping[str, Any]
    scratch: Path
    report: Report
    server_pid: int
    of_server: Memory
    of_program: Memory
    version: str = ""

    async def warm_up(self, edge: int) -> None:
        """Everything is loaded and has worked once."""
        subject = await sample(self.pictures, self.scratch, edge, 0)
        edited = await self.edit(subject, {**self.asked, "seed": 0})
        if edited.trouble:
            raise SetupError(f"The first picture did not come: {edited.trouble}")
        self.version = (await self._direct(subject, edge, 0))["version"]

    async def measure(self, size: Size, seed: int) -> None:
        """All pictures of a seed, on both sides in turns."""
        for memory in (self.of_server, self.of_program):
            memory.peak_bytes = 0
        through, direct, away = _Side(), _Side(), list[Mapping[str, float]]()
        for number in range(size.pictures):
            which = seed * size.pictures + number
            subject = await sample(self.pictures, self.scratch, size.edge, which)
            made: dict[str, Path] = {}
            for side in ("through", "direct") if which % 2 else ("direct", "through"):
                made[side] = self.scratch / f"{side}.png"
                if side == "through":
                    await self._through(through, subject, which, made[side])
                else:
                    await self._direct(subject, size.edge, which, direct, made[side])
            away.append(await self._apart(subject, made))
        self._add(through, direct, away)

    async def _through(self, side: _Side, subject: Subject, seed: int, out: Path) -> None:
        cpu = spent_seconds(self.server_pid)
        edited = await self.edit(subject, {**self.asked, "seed": seed})
        side.cpu_seconds += spent_seconds(self.server_pid) - cpu
        side.seconds.append(edited.seconds)
        self.report.count([edited.trouble])
        await asyncio.to_thread(out.write_bytes, edited.picture or subject.image.read_bytes())

    async def _direct(
        self, subject: Subject, edge: int, seed: int, side: _Side | None = None, out: Path | None = None
    ) -> dict[str, Any]:
        side, out = side or _Side(), out or self.scratch / "direct.png"
        options, cpu = self.model.options, spent_seconds(self.program.pid)
        size = fit(Pixels(edge, edge), options.edge_max, options.edge_factor)
        files = {"image": str(subject.image), "mask": str(subject.mask), "out": str(out)}
        numbers = {
            "steps": self.asked["steps"],
            "guidance": options.guidance,
            "strength": options.strength,
            "seed": seed,
        }
        order = {**files, **numbers, "prompt": self.asked["prompt"], "width": size.width, "height": size.height}
        answer = await self.program.ask(order)
        side.cpu_seconds += spent_seconds(self.program.pid) - cpu
        side.seconds.append(answer["seconds"])
        return answer

    async def _apart(self, subject: Subject, made: Mapping[str, Path]) -> Mapping[str, float]:
        """How the two pictures differ, and the one through the server from its image."""
        tiles = [{"path": str(made[side]), "label": side} for side in ("direct", "through")]
        order = {"image": str(subject.image), "mask": str(subject.mask), "white": subject.white, "tiles": tiles}
        found = await self.pictures.ask({"sheet": {**order, "out": str(self.scratch / "sheet.png")}})
        away: Mapping[str, float] = found["differences"][1]
        return away

    def _add(self, through: _Side, direct: _Side, away: list[Mapping[str, float]]) -> None:
        add, medians = self.report.add, [statistics.median(side.seconds) for side in (through, direct)]
        add(_RATIO, sum(direct.seconds) / sum(through.seconds))
        add("a picture through, median", medians[0])
        add("a picture by diffusers, median", medians[1])
        add("what the server adds to a picture, median", medians[0] - medians[1])
        add("CPU time of a picture, through / diffusers", through.cpu_seconds / direct.cpu_seconds)
        add("difference of the two pictures inside the mask, of 255", max(each["from_first"] for each in away))
        add("pixels outside the mask that a picture through has changed", max(each["outside"] for each in away))
        add("peak memory of the server and its processes", self.of_server.peak_bytes / 2**20)
        add("peak memory of diffusers", self.of_program.peak_bytes / 2**20)


def _model(settings: Settings, name: str) -> tuple[DiffusionModel, Path]:
    """The model as it is run here, and its folder. Raises SetupError."""
    model, path = of_engine(settings, name, DiffusionModel)
    options = model.options
    usual = {**_DRIVEN, "task": options.task if options.task in {"auto", "edit"} else "edit"}
    if odd := [option for option, value in usual.items() if getattr(options, option) != value]:
        raise SetupError(
            f"{name} sets `{odd[0]}`, and diffusers is driven without. Measure a model that leaves it out."
        )
    return model.model_copy(update={"source": f"file:{path}"}), path


_DRIVEN: Mapping[str, Any] = {
    "transformer_file": None,
    "loras": (),
    "lossy": (),
    "compile": False,
    "offload": "none",
    "scheduler": "model",
}


@asynccontextmanager
async def _directly(model: DiffusionModel, folder: Path) -> AsyncIterator[Program]:
    options = model.options
    automatic = "float32" if options.device == "cpu" else "bfloat16"
    settings = {
        "folder": str(folder),
        "variant": options.variant,
        "device": options.device if options.device == "cpu" else f"{options.device}:{options.device_index}",
        "dtype": automatic if options.dtype == "auto" else options.dtype,
        "threads": options.threads or os.cpu_count(),
    }
    command = (sys.executable, "-P", "-m", "forebay.bench.image_program", json.dumps(settings))
    async with running(command, "diffusers", _REMEDY) as program:
        yield program
