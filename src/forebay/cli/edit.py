"""`forebay edit`: have a running server change what a mask marks in an image, as a prompt says.

It refuses to write over what is there, and to leave work behind when it is stopped.
"""

import base64
import binascii
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from forebay.cli.api_client import LOCAL_SERVER, ApiClient, KeyFile, ServerUrl, ask, path_of
from forebay.cli.options import looking, sentences
from forebay.cli.progress import View, view_of
from forebay.cli.results import write_whole
from forebay.cli.uploads import form_of
from forebay.errors import SetupError

_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_PICTURES_MAX = 10
_EVENT_BYTES_MAX = 128 * 2**20  # of a picture in base64
_STOPPED = "Stopped. What was not finished is cancelled."
_PATH = path_of("images", "edits")
_TOO_EARLY = "The server ended the answer too early. Ask again."


class MaskMode(StrEnum):
    """What of a mask is to be changed."""

    ALPHA = "alpha"
    WHITE = "white"


def edit(
    image: Annotated[Path, typer.Argument(help="The image, as PNG, JPEG or WebP.")],
    prompt: Annotated[str | None, typer.Option(help="What is to be seen; some models only take away.")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="What is to be changed; else where the image is transparent.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write: .png, .jpg or .webp; -1, -2 for several.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Which model; the first that edits images without it.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What is not to be seen.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="More take longer; else what the model does best.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="How closely to follow the prompt.")] = None,
    strength: Annotated[float | None, typer.Option(min=0, max=1, help="How much of the image may change.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="The same gives the same picture.")] = None,
    size: Annotated[str | None, typer.Option(help="Of the picture, such as 1024x768; else that of the image.")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=_PICTURES_MAX, help="How many pictures.")] = 1,
    mask_mode: Annotated[
        MaskMode | None, typer.Option(help="Whether the mask marks by what is transparent, or by what is white.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over files that are there.")] = False,
    background: Annotated[
        bool, typer.Option("--background", help="Only hand it in and print the id of its job.")
    ] = False,
    url: ServerUrl = LOCAL_SERVER,
    key_file: KeyFile = None,
) -> None:
    """Change what a mask marks in an image, as a prompt says."""
    files = {"image": image} if mask is None else {"image": image, "mask": mask}
    with sentences(), looking():
        outs = (
            []
            if background and output is None
            else _outs(output, count, tuple(files.values()), force=force or background)
        )
    fields = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "steps": steps,
        "guidance": guidance,
        "strength": strength,
        "seed": seed,
        "size": size,
        "n": count,
        "mask_mode": mask_mode,
        "output_format": _FORMATS[output.suffix.lower()] if output is not None else None,
        "background" if background else "stream": "true",
    }
    given = {name: str(value) for name, value in fields.items() if value is not None}

    async def work(client: ApiClient) -> None:
        asked = {"model": model or await _first_model(client), **given}
        if background:
            await _hand_in(client, asked, files)
        else:
            await _paint(client, asked, files, outs)

    ask(url, key_file, work, _STOPPED)


def _outs(output: Path | None, count: int, files: Sequence[Path], *, force: bool) -> list[Path]:
    """What is to be written where, before anything is sent. Raises SetupError."""
    if output is None:
        raise SetupError("Say where the picture goes with --output.")
    if output.suffix.lower() not in _FORMATS:
        raise SetupError(f"{output} is no name of a picture. End it in .png, .jpg or .webp.")
    if not output.parent.is_dir():
        raise SetupError(f"There is no folder {output.parent}. Make it, or write somewhere else.")
    names = [f"{output.stem}-{number}{output.suffix}" for number in range(1, count + 1)] if count > 1 else [output.name]
    outs = [output.with_name(name) for name in names]
    for out in outs:
        if out.exists() and (not force or any(file.exists() and out.samefile(file) for file in files)):
            raise SetupError(f"{out} is there already. Give --force to write over it, or another --output.")
    return outs


async def _first_model(client: ApiClient) -> str:
    """A model that edits images, one that is loaded rather than another. Raises SetupError."""
    found = [each for each in (await client.call("GET", path_of("models")))["data"] if _edits(each)]
    if not found:
        raise SetupError("No model of this server edits images. See docs/configure.md for how to add one.")
    return str(min(found, key=lambda each: each.get("state") != "ready")["id"])


def _edits(model: dict[str, Any]) -> bool:
    return "image_edit" in model.get("capabilities", ())


async def _hand_in(client: ApiClient, fields: dict[str, str], files: dict[str, Path]) -> None:
    view = view_of()
    with view, form_of(fields, files, view) as form:
        job = await client.call("POST", _PATH, data=form)
    typer.echo(str(job["id"]))


async def _paint(client: ApiClient, fields: dict[str, str], files: dict[str, Path], outs: list[Path]) -> None:
    """Every picture is written when it is finished. Raises SetupError."""
    view, notices, left = view_of(), dict[str, None](), dict(enumerate(outs))
    with view, form_of(fields, files, view) as form:
        async with aclosing(client.events(_PATH, "POST", _EVENT_BYTES_MAX, data=form)) as events:
            async for event in events:
                data = event["data"]
                if "error" in data:
                    raise SetupError(str((data["error"] or {}).get("message") or _TOO_EARLY))
                if event["event"] == "image_edit.progress":
                    _show(view, data, len(outs))
                elif event["event"] == "image_edit.completed" and (out := left.pop(data["image"], None)):
                    await write_whole(_decoded(data), out)
                    notices |= dict.fromkeys([_again(data["used"]), *data["used"].get("notices", ())])
    for notice in filter(None, notices):
        typer.echo(notice, err=True)
    if left:
        raise SetupError(_TOO_EARLY)


def _show(view: View, progress: dict[str, Any], count: int) -> None:
    which = f" {int(progress['image']) + 1}/{count}" if count > 1 else ""
    view.show_steps(f"painting{which}", int(progress["step"]), int(progress["steps"]))


async def _decoded(data: dict[str, Any]) -> AsyncIterator[bytes]:
    try:
        yield base64.b64decode(data["b64_json"], validate=True)
    except (KeyError, TypeError, binascii.Error):
        raise SetupError("The server sent something that is no picture.") from None


def _again(used: dict[str, Any]) -> str:
    """What it takes to get the same picture."""
    shown = [f"--{name} {used[name]}" for name in ("model", "seed", "steps", "guidance", "strength") if name in used]
    return f"The same again: {' '.join(shown)}" if shown else ""
