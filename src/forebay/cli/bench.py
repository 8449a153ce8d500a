"""`forebay bench`: measure what the server adds, beside the engine driven directly, on this machine.

It refuses to call a run good that had errors: they are counted, printed, and make the exit status 1.
"""

import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from forebay.bench import batch as batch_bench
from forebay.bench import chat as chat_bench
from forebay.bench import coserve as coserve_bench
from forebay.bench import embed as embed_bench
from forebay.bench import image as image_bench
from forebay.bench import image_grid
from forebay.bench import jobs as jobs_bench
from forebay.bench import overhead as overhead_bench
from forebay.bench import prefix as prefix_bench
from forebay.bench import speech as speech_bench
from forebay.bench.painters import Choice
from forebay.bench.report import Report, figure
from forebay.cli.options import EXIT_FAILED, PIPED_WIDTH, ConfigFile, DataFolder, load_settings, loop_factory, sentences
from forebay.errors import SetupError

app = typer.Typer(help="Measure this server on this machine.", no_args_is_help=True)

Seeds = Annotated[int, typer.Option(min=1, max=20, help="How often everything is measured; the median counts.")]
Quick = Annotated[bool, typer.Option("--quick", help="A few seconds, to see that it works; the figures mean little.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the JSON and the table.")]
Seconds = Annotated[float, typer.Option(min=0.5, max=120, help="Length of each part that is measured by time.")]
DatabaseUrl = Annotated[
    str | None, typer.Option(help="An empty PostgreSQL database; SQLite in a new folder if absent.")
]

_RESULTS = Path("benchmarks/results")


@app.command()
def overhead(seeds: Seeds = 3, seconds: Seconds = 5.0, quick: Quick = False, out: Out = _RESULTS) -> None:
    """Latency, requests per second, CPU per token and time to first token that the server adds (P1-P4)."""
    size = overhead_bench.Size(60, 0.5, 20) if quick else overhead_bench.Size(2000, seconds)
    with _measuring(out) as runner:
        _show(runner.run(overhead_bench.run(1 if quick else seeds, size, _say)), out)


@app.command()
def chat(
    model: Annotated[str, typer.Option(help="A model of the catalogue that is here.")] = "smollm2-135m-instruct",
    seeds: Seeds = 3,
    quick: Quick = False,
    out: Out = _RESULTS,
    config_file: ConfigFile = None,
    data_dir: DataFolder = None,
) -> None:
    """Tokens per second through the server and straight to the engine, at 1, 8 and 32 streams (P5)."""
    with _measuring(out) as runner:
        settings = load_settings(config_file, data_dir=data_dir)
        size = chat_bench.QUICK if quick else chat_bench.FULL
        _show(runner.run(chat_bench.run(settings, model, 1 if quick else seeds, size, _say)), out)


@app.command()
def jobs(
    database_url: DatabaseUrl = None,
    seeds: Seeds = 3,
    quick: Quick = False,
    out: Out = _RESULTS,
) -> None:
    """Durable jobs that do nothing: completed per second, and how soon they start (P8, P10)."""
    size = jobs_bench.Size(500, 5) if quick else jobs_bench.Size(20_000, 100)
    with _measuring(out) as runner:
        _show(runner.run(jobs_bench.run(database_url, 1 if quick else seeds, size, _say)), out)


@app.command()
def batch(
    database_url: DatabaseUrl = None,
    seeds: Seeds = 3,
    quick: Quick = False,
    out: Out = _RESULTS,
) -> None:
    """Batches: handing in the largest one, and lines per second beside the engine driven directly (P6, P9)."""
    size = batch_bench.Size(500, 300) if quick else batch_bench.Size(50_000, 10_000)
    with _measuring(out) as runner:
        _show(runner.run(batch_bench.run(database_url, 1 if quick else seeds, size, _say)), out)


@app.command()
def embed(
    reference_python: Annotated[
        Path | None, typer.Option(help="A Python that has sentence-transformers and torch, to be compared with.")
    ] = None,
    database_url: DatabaseUrl = None,
    seeds: Seeds = 3,
    quick: Quick = False,
    out: Out = _RESULTS,
    config_file: ConfigFile = None,
    data_dir: DataFolder = None,
) -> None:
    """Embeddings beside sentence-transformers, beside a large request, and as lines of a batch (P11)."""
    with _measuring(out) as runner:
        settings = load_settings(config_file, data_dir=data_dir)
        size = embed_bench.QUICK if quick else embed_bench.FULL
        measuring = embed_bench.run(settings, reference_python, database_url, 1 if quick else seeds, size, _say)
        _show(runner.run(measuring), out)


@app.command()
def speech(
    model: Annotated[str, typer.Option(help="A model of the engine `whisper` that is here.")] = "whisper-tiny.en",
    seeds: Seeds = 3,
    quick: Quick = False,
    out: Out = _RESULTS,
    config_file: ConfigFile = None,
    data_dir: DataFolder = None,
) -> None:
    """Recordings beside faster-whisper driven directly: one file, and eight at once (P12)."""
    with _measuring(out) as runner:
        settings = load_settings(config_file, data_dir=data_dir)
        size = speech_bench.QUICK if quick else speech_bench.FULL
        _show(runner.run(speech_bench.run(settings, model, 1 if quick else seeds, size, _say)), out)


@app.command()
def coserve(
    speech: Annotated[bool, typer.Option("--speech", help="Chat beside a batch of recordings instead.")] = False,
    lines: Annotated[int, typer.Option(min=1, max=50_000, help="Of the batch.")] = 2000,
    load: Annotated[float, typer.Option(min=0.05, max=0.95, help="Share of the machine that online work takes.")] = 0.4,
    seconds: Annotated[float, typer.Option(min=1, max=3600, help="Length of each load.")] = 120.0,
    seeds: Seeds = 3,
    quick: Quick = False,
    out: Out = _RESULTS,
    config_file: ConfigFile = None,
    data_dir: DataFolder = None,
) -> None:
    """Chat, embeddings, recordings and pictures on one machine, with a batch and without (P7)."""
    with _measuring(out) as runner:
        settings = load_settings(config_file, data_dir=data_dir)
        plan = coserve_bench.SPEECH if speech else coserve_bench.MIXED
        size = coserve_bench.QUICK if quick else coserve_bench.Size(seconds, lines, load)
        _show(runner.run(coserve_bench.run(settings, plan, 1 if quick else seeds, size, _say)), out)


@app.command()
def prefix(
    model: Annotated[str, typer.Option(help="A model of llama.cpp that is here.")] = "smollm2-135m-instruct",
    mix: Annotated[
        list[str] | None, typer.Option(help="One mix alone, by its name in the results; more than once for several.")
    ] = None,
    seeds: Seeds = 2,
    quick: Quick = False,
    out: Out = _RESULTS,
    config_file: ConfigFile = None,
    data_dir: DataFolder = None,
) -> None:
    """Batches whose lines share the beginning of their prompts, beside the engine driven in file order (P6)."""
    with _measuring(out) as runner:
        settings, mixes = load_settings(config_file, data_dir=data_dir), prefix_bench.chosen(mix)
        size = prefix_bench.QUICK if quick else prefix_bench.FULL
        _show(runner.run(prefix_bench.run(settings, model, mixes, 1 if quick else seeds, size, _say)), out)


@app.command()
def image(
    axes: Annotated[list[str] | None, typer.Argument(metavar="[NAME=VALUES]...", help="More of a grid.")] = None,
    model: Annotated[str | None, typer.Option(help="A model of the catalogue that is here.")] = None,
    source: Annotated[Path | None, typer.Option(help="A folder in the layout of diffusers instead.")] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A small pipeline of random weights instead, built here.")
    ] = False,
    grid: Annotated[
        str | None, typer.Option(help="Pictures with every combination: --grid steps=20,28 guidance=2,10 model=a,b.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--image", help="The image of a grid; without it one is made.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Its mask, white where it is to change.")] = None,
    prompt: Annotated[str, typer.Option(help="What is to be seen.")] = "a red fox in the snow",
    steps: Annotated[int | None, typer.Option(min=1, help="Of each picture; else what the model does best.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of all pictures of a grid.")] = 1,
    edge: Annotated[
        int | None, typer.Option(min=16, max=3840, help="Pixels on each side of an image that is made.")
    ] = None,
    seeds: Seeds = 3,
    quick: Quick = False,
    out: Out = _RESULTS,
    config_file: ConfigFile = None,
    data_dir: DataFolder = None,
) -> None:
    """Edits of images beside diffusers driven directly (P13), or pictures with every combination of some settings."""
    with _measuring(out) as runner:
        settings, choice = load_settings(config_file, data_dir=data_dir), Choice(model, source, tiny)
        size = image_bench.QUICK if quick else image_bench.FULL
        size = size if edge is None else replace(size, edge=edge)
        fixed: dict[str, Any] = {"prompt": prompt} | ({} if steps is None else {"steps": steps})
        if grid is not None:
            wanted = image_grid.Wanted([grid, *(axes or ())], picture, mask, size.edge)
            running = image_grid.run(settings, choice, wanted, {**fixed, "seed": seed}, out, _say)
            _show_grid(*runner.run(running))
        elif axes or picture or mask:
            raise SetupError("Settings, `--image` and `--mask` are for a `--grid`.")
        else:
            _show(runner.run(image_bench.run(settings, choice, fixed, 1 if quick else seeds, size, _say)), out)


@contextmanager
def _measuring(out: Path) -> Iterator[asyncio.Runner]:
    """A loop to measure in, once it is known that `out` can take the results."""
    with sentences():
        try:
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=out):
                pass
        except OSError as error:
            raise _unwritable(out, error) from None
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            yield runner


def _unwritable(out: Path, error: OSError) -> SetupError:
    return SetupError(f"The folder {out} cannot be written: {error.strerror or error}. Choose another with --out.")


def _show_grid(outcomes: Sequence[image_grid.Outcome], files: Sequence[Path]) -> None:
    troubles = [each.edited.trouble for each in outcomes if each.edited.trouble]
    typer.echo(f"{len(outcomes)} pictures, {len(troubles)} errors. Written to {', '.join(map(str, files))}.")
    if troubles:
        raise typer.Exit(EXIT_FAILED)


def _say(what: str) -> None:
    typer.echo(what, err=True)


def _show(report: Report, out: Path) -> None:
    """Print it before it is written: what took an hour to measure is not lost with the disk."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(width=PIPED_WIDTH, highlight=False)
    table = Table("#", "measure", "median", "by seed", "floor", "goal", "keeps", box=None, pad_edge=False)
    for measure in report.as_dict()["measures"].values():
        bounds = ("" if bound is None else f"{bound:g}" for bound in (measure["floor"], measure["goal"]))
        seeds = ", ".join(f"{value:g}" for value in measure["by_seed"])
        table.add_row(measure["id"], measure["name"], figure(measure), seeds, *bounds, measure["verdict"])
    console.print(table)
    errors = sum(report.errors.values())
    console.print(f"{report.requests} requests, {errors} errors.")
    for reason, count in report.errors.items():
        typer.echo(f"{count} x {reason}", err=True)
    try:
        files = report.write(out)
    except OSError as error:
        raise _unwritable(out, error) from None
    console.print(f"Written to {files[0]} and {files[1]}.")
    if errors:
        raise typer.Exit(EXIT_FAILED)
