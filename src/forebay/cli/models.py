"""`forebay models`: list, pull, verify and remove model files, also while the server runs.

It refuses every name that is not in the catalogue, and never deletes a file that was not pulled.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from forebay.cli.options import PIPED_WIDTH, ConfigFile, DataFolder, load_settings, look_into, run, sentences
from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.errors import SetupError
from forebay.model_config import (
    AlignerModel,
    DiffusionModel,
    LlamaCppModel,
    Model,
    OnnxModel,
    OpencvModel,
    SpeakersModel,
    WhisperModel,
)
from forebay.replicas import download, pull
from forebay.replicas.catalog import Catalog

app = typer.Typer(help="List, pull, verify and remove models.", no_args_is_help=True)

_LINE_SHARE = 10  # without a terminal, a line for each tenth of a file

Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of the catalogue.", show_default=False)]
SomeNames = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME...]", help="Names of the catalogue.", show_default=False),
]


@app.command("list")
def list_models(config_file: ConfigFile = None, data_dir: DataFolder = None) -> None:
    """List the catalogue: what each model is, how large, and whether it is here."""
    with sentences():
        catalog = _catalog(load_settings(config_file, data_dir=data_dir))
        console = Console()
        if not console.is_terminal:
            console = Console(width=PIPED_WIDTH)
        table = Table("name", "engine", "capability", "size", "state", "description", box=None, pad_edge=False)
        for name in catalog.names():
            model = catalog.get(name)
            table.add_row(
                Text(name),
                model.engine,
                _capability(model),
                _size(catalog.size_bytes(name)),
                _state(catalog, name),
                Text(model.description),
            )
        console.print(table)
        typer.echo(_suggestion(catalog), err=True)


@app.command("pull")
def pull_models(
    names: SomeNames = None,
    every: Annotated[bool, typer.Option("--all", help="All models of the catalogue.")] = False,
    config_file: ConfigFile = None,
    data_dir: DataFolder = None,
) -> None:
    """Pull models; without a name, those that the server loads at its start."""
    with sentences("Stopped. What was pulled so far is kept; the same command goes on from there."):
        settings = load_settings(config_file, data_dir=data_dir)
        catalog = _catalog(settings)
        wanted = _wanted(catalog, names or [], every=every)
        missing = [name for name in wanted if not catalog.present(name)]
        for name in wanted:
            if name not in missing:
                typer.echo(f"{name} is here.")
        if every and missing:
            total = sum(catalog.size_bytes(name) or 0 for name in missing)
            typer.echo(f"{len(missing)} models to pull, {decimal(total)} in all.")
        for name in missing:
            path = run(_pull(name, catalog, settings))
            typer.echo(f"{name} is here: {path}")


@app.command()
def verify(
    names: SomeNames = None,
    every: Annotated[bool, typer.Option("--all", help="All models that are here.")] = False,
    config_file: ConfigFile = None,
    data_dir: DataFolder = None,
) -> None:
    """Read model files again, whole, and check them; without a name, all that are here."""
    with sentences():
        catalog = _catalog(load_settings(config_file, data_dir=data_dir))
        for name in names or []:
            look_into(catalog.path(name).parent)
        here = [name for name in catalog.names() if catalog.needs_file(name) and catalog.present(name)]
        for name in here if every or not names else names:
            run(pull.verify(name, catalog))
            checked = "checksum and header" if catalog.get(name).sha256 else "header; the catalogue has no checksum"
            typer.echo(f"{name} is sound ({checked}).")


@app.command()
def remove(names: Names, config_file: ConfigFile = None, data_dir: DataFolder = None) -> None:
    """Delete pulled files. A running engine keeps the one it has open until it stops."""
    with sentences():
        catalog = _catalog(load_settings(config_file, data_dir=data_dir))
        for name in names:
            look_into(catalog.path(name).parent)
        for name in names:
            removed = pull.remove(name, catalog)
            typer.echo(f"{name} is removed." if removed else f"{name} was not here.")


def _catalog(settings: Settings) -> Catalog:
    """The catalogue. Raises SetupError where this user cannot see which models are here."""
    look_into(settings.models_folder)
    return Catalog(settings)


def _wanted(catalog: Catalog, names: list[str], *, every: bool) -> list[str]:
    """The models to pull, each one known and with a file to pull."""
    if every and names:
        raise SetupError("Give names or --all, not both.")
    if not every and not names:
        return [name for name in catalog.names() if catalog.get(name).preload and catalog.needs_file(name)]
    if every:
        return [name for name in catalog.names() if catalog.needs_file(name)]
    for name in names:
        look_into(catalog.path(name).parent)
    return list(dict.fromkeys(names))


async def _pull(name: str, catalog: Catalog, settings: Settings) -> Path:
    with _progress(name, catalog.size_bytes(name)) as progress:
        return await pull.pull(name, catalog, settings.pull, SystemClock(), progress)


@contextmanager
def _progress(name: str, size_bytes: int | None) -> Iterator[download.Progress]:
    """A bar on a terminal, a line for each tenth elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        typer.echo(f"Pulling {name} ({'size unknown' if size_bytes is None else decimal(size_bytes)}).", err=True)
        yield _lines(name)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bars:
        bar = bars.add_task(name, total=size_bytes)
        yield lambda done, total: bars.update(bar, completed=done, total=total or size_bytes)


def _lines(name: str) -> download.Progress:
    last = 0

    def show(done: int, total: int | None) -> None:
        nonlocal last
        share = _LINE_SHARE * done // total if total else 0
        if share > last:
            last = share
            typer.echo(f"{name}: {100 * share // _LINE_SHARE} %, {decimal(done)}", err=True)

    return show


def _capability(model: Model) -> str:
    if isinstance(model, LlamaCppModel):
        return "embedding" if model.options.embeddings else "chat"
    if isinstance(model, OnnxModel):
        return model.options.capability
    if isinstance(model, WhisperModel | SpeakersModel | AlignerModel | OpencvModel | DiffusionModel):
        return model.options.capabilities[0].value
    return "what it serves" if model.engine in {"command", "upstream"} else "chat"


def _size(size_bytes: int | None) -> str:
    return "" if size_bytes is None else decimal(size_bytes)


def _state(catalog: Catalog, name: str) -> str:
    if not catalog.needs_file(name):
        return "nothing to pull"
    return "here" if catalog.present(name) else "not pulled"


def _suggestion(catalog: Catalog) -> str:
    """How to get more: the smallest absent model that is more than a toy, if there is one."""
    toy_bytes = 10**9
    absent = [
        (catalog.size_bytes(name) or 0, name)
        for name in catalog.names()
        if catalog.needs_file(name) and not catalog.present(name)
    ]
    real = sorted(pair for pair in absent if pair[0] > toy_bytes)
    if real:
        return f"Pull one with `forebay models pull NAME`; `forebay models pull {real[0][1]}` is a good start."
    return "Pull one with `forebay models pull NAME`." if absent else "There is nothing to pull."
