"""One image edited with every combination of some settings: pictures side by side, seconds and differences.

It refuses settings that it does not know, and more combinations than a person looks at.
"""

import asyncio
import datetime as dt
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forebay
from forebay.bench.edits import Edit, Edited, Subject, drawing, editing, sample
from forebay.bench.painters import Choice, chosen
from forebay.bench.report import machine
from forebay.bench.stage import config_of, place_of, served
from forebay.config import Settings
from forebay.errors import SetupError
from forebay.inference import Capability
from forebay.model_config import Model
from forebay.replicas.catalog import Catalog
from forebay.replicas.commands import capabilities_of

CELLS_MAX = 64
_NAME = "image-grid"
_READERS: Mapping[str, Callable[[str], Any]] = {
    "model": str,
    "steps": int,
    "guidance": float,
    "strength": float,
    "seed": int,
    "size": str,
    "quality": str,
    "mask_dilation": int,
    "mask_feather": int,
}

Cell = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The settings that vary, as `name=value,value`, and what is edited; without files an image of so many pixels."""

    axes: Sequence[str]
    image: Path | None
    mask: Path | None
    edge: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """One combination and what came of it."""

    cell: Cell
    edited: Edited
    differences: Mapping[str, float]


def cells_of(axes: Sequence[str]) -> list[Cell]:
    """Every combination of `steps=20,28 guidance=2,10`; the last setting changes fastest. Raises SetupError."""
    values = dict[str, list[Any]]()
    for axis in axes:
        name, equals, listed = axis.partition("=")
        if name not in _READERS:
            raise SetupError(f"`{name}` cannot vary in a grid. Take one of {', '.join(_READERS)}.")
        if name in values:
            raise SetupError(f"`{name}` is there twice. Put all of its values into one list.")
        if not equals:
            raise SetupError(f"Write `{name}` with its values, such as `steps=20,28`.")
        values[name] = [_value(name, each) for each in listed.split(",")]
    cells: list[Cell] = [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]
    if len(cells) > CELLS_MAX:
        raise SetupError(f"These are {len(cells)} pictures, and a grid has at most {CELLS_MAX}. Leave some values out.")
    return cells


def _value(name: str, written: str) -> Any:
    try:
        found = _READERS[name](written.strip())
    except ValueError:
        raise SetupError(f"`{written}` is no value of `{name}`.") from None
    if found == "":
        raise SetupError(f"`{name}` has an empty value.")
    if isinstance(found, float) and not math.isfinite(found):
        raise SetupError(f"`{written}` is no value of `{name}`.")
    return found


def label_of(cell: Cell) -> str:
    """How a combination is called on a sheet and in a table."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in cell.items()
    )


async def run(
    settings: Settings,
    choice: Choice,
    wanted: Wanted,
    fixed: Mapping[str, Any],
    out: Path,
    say: Callable[[str], None],
) -> tuple[list[Outcome], tuple[Path, Path, Path]]:
    """Edit the image with every combination, one after another, and write a sheet, a table and JSON to `out`.

    `fixed` are fields that all have in common, where they do not vary. Raises SetupError.
    """
    cells = cells_of(wanted.axes)
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as scratch:
        subject = await _subject(wanted, Path(scratch))
        async with chosen(settings, choice) as (found, name):
            common = {**({} if name is None else {"model": name}), **fixed}
            common = {field: value for field, value in common.items() if field not in cells[0]}
            return await _edited(found, cells, subject, common, out, say)


async def _subject(wanted: Wanted, scratch: Path) -> Subject:
    if (wanted.image is None) != (wanted.mask is None):
        raise SetupError("An image needs its mask. Give both of `--image` and `--mask`, or none.")
    if wanted.image is not None and wanted.mask is not None:
        for path in (wanted.image, wanted.mask):
            if not path.is_file():
                raise SetupError(f"There is no file {path}.")
        return Subject(wanted.image, wanted.mask)
    async with drawing() as program:
        return await sample(program, scratch, wanted.edge, 1)


async def _edited(
    settings: Settings,
    cells: Sequence[Cell],
    subject: Subject,
    fixed: Mapping[str, Any],
    out: Path,
    say: Callable[[str], None],
) -> tuple[list[Outcome], tuple[Path, Path, Path]]:
    names = dict.fromkeys({**fixed, **cell}.get("model") for cell in cells)
    models = {name: _model(settings, name) for name in names if name is not None}
    if len(models) < len(names):
        raise SetupError("Say which model edits: `model=NAME` in the grid, or `--model`, `--source` or `--tiny`.")
    async with served(config_of(models)) as (url, key, _pid), editing(url, key) as edit:
        edited = [await _one(edit, subject, fixed, cell, say) for cell in cells]
    await asyncio.to_thread(out.mkdir, parents=True, exist_ok=True)
    sheet = out / f"{_NAME}.png"
    compared = iter(await _drawn(subject, cells, edited, sheet))
    outcomes = [
        Outcome(cell, each, {} if each.trouble else next(compared)) for cell, each in zip(cells, edited, strict=True)
    ]
    common = {"image": subject.image.name, "mask": subject.mask.name, **fixed}
    return outcomes, (*_written(outcomes, common, out), sheet)


async def _drawn(
    subject: Subject, cells: Sequence[Cell], edited: Sequence[Edited], sheet: Path
) -> list[dict[str, float]]:
    """Draw all pictures on a sheet; how each of them differs."""
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        tiles = list[dict[str, str]]()
        for number, (cell, each) in enumerate(zip(cells, edited, strict=True)):
            if not each.trouble:
                path = Path(folder) / f"{number}.png"
                path.write_bytes(each.picture)
                tiles.append({"path": str(path), "label": f"{label_of(cell)}\n{each.seconds:.2f} s"})
        order = {"image": str(subject.image), "mask": str(subject.mask), "white": subject.white, "tiles": tiles}
        async with drawing() as program:
            answer = await program.ask({"sheet": {**order, "out": str(sheet)}})
    found: list[dict[str, float]] = answer["differences"]
    return found


def _model(settings: Settings, name: str) -> Model:
    """A model as it is run here. Raises SetupError."""
    catalog = Catalog(settings)
    model = catalog.get(name)
    if Capability.IMAGE_EDIT not in capabilities_of(model):
        raise SetupError(f"{name} does not edit images. Name a model that does.")
    if not catalog.needs_file(name):
        return model
    return model.model_copy(update={"source": f"file:{place_of(settings, name)}"})


async def _one(
    edit: Edit, subject: Subject, fixed: Mapping[str, Any], cell: Cell, say: Callable[[str], None]
) -> Edited:
    edited = await edit(subject, {**fixed, **cell, "output_format": "png"})
    say(f"{label_of(cell)}: {edited.trouble or f'{edited.seconds:.2f} s'}")
    return edited


def _written(outcomes: Sequence[Outcome], common: Mapping[str, Any], out: Path) -> tuple[Path, Path]:
    as_json, as_markdown = out / f"{_NAME}.json", out / f"{_NAME}.md"
    said = {
        "kind": _NAME,
        "forebay": forebay.__version__,
        "began": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "common": dict(common),
        "errors": sum(bool(each.edited.trouble) for each in outcomes),
        "cells": [_as_dict(each) for each in outcomes],
    }
    as_json.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    as_markdown.write_text(_as_markdown(said), encoding="utf-8")
    return as_json, as_markdown


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    edited = outcome.edited
    found = {"settings": dict(outcome.cell), "seconds": round(edited.seconds, 3), "used": dict(edited.used)}
    return {**found, "differences": dict(outcome.differences), "error": edited.trouble or None}


def _as_markdown(said: Mapping[str, Any]) -> str:
    where, common = said["machine"], said["common"]
    lines = [
        f"# forebay bench image --grid: {len(said['cells'])} pictures, {said['errors']} errors",
        "",
        f"{said['began']}, Forebay {said['forebay']}, {where['cores']} cores ({where['processor']}), {where['system']}.",
        "Common to all: " + ", ".join(f"{name} `{value}`" for name, value in common.items()) + ".",
        "",
        f"![All pictures, the image itself first]({_NAME}.png)",
        "",
        "| settings | seconds | seed | inside the mask, from the image | inside, from the first picture | pixels changed outside |",
        "|---|---|---|---|---|---|",
    ]
    for cell in said["cells"]:
        away, name = cell["differences"], label_of(cell["settings"])
        figures = [away.get("inside", ""), away.get("from_first", ""), away.get("outside", "")]
        row = [name, cell["error"] or cell["seconds"], cell["used"].get("seed", ""), *figures]
        lines.append(f"| {' | '.join(map(str, row))} |")
    lines += ["", "- Differences are means over the pixels inside the mask and their colours, of 255."]
    return "\n".join(lines) + "\n"
