"""`forebay bench`: measure what the server adds, beside the engine driven directly, on this machine.

It refuses to call a run good that had errors: they are counted, printed, and make the exit status 1.
"""

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from forebay.bench import batch as batch_bench
from forebay.bench import chat as chat_bench
from forebay.bench import embed as embed_bench
from forebay.bench import jobs as jobs_bench
from forebay.bench import overhead as overhead_bench
from forebay.bench import speech as speech_bench
from forebay.bench.report import Report, figure
from forebay.cli.options import EXIT_FAILED, PIPED_WIDTH, ConfigFile, DataFolder, load_settings, loop_factory, sentences

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
    with sentences(), asyncio.Runner(loop_factory=loop_factory()) as runner:
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
    with sentences(), asyncio.Runner(loop_factory=loop_factory()) as runner:
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
    with sentences(), asyncio.Runner(loop_factory=loop_factory()) as runner:
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
    with sentences(), asyncio.Runner(loop_factory=loop_factory()) as runner:
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
    with sentences(), asyncio.Runner(loop_factory=loop_factory()) as runner:
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
    with sentences(), asyncio.Runner(loop_factory=loop_factory()) as runner:
        settings = load_settings(config_file, data_dir=data_dir)
        size = speech_bench.QUICK if quick else speech_bench.FULL
        _show(runner.run(speech_bench.run(settings, model, 1 if quick else seeds, size, _say)), out)


def _say(what: str) -> None:
    typer.echo(what, err=True)


def _show(report: Report, out: Path) -> None:
    files = report.write(out)
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(width=PIPED_WIDTH, highlight=False)
    table = Table("#", "measure", "median", "by seed", "floor", "goal", "keeps", box=None, pad_edge=False)
    for measure in report.as_dict()["measures"].values():
        bounds = ("" if bound is None else f"{bound:g}" for bound in (measure["floor"], measure["goal"]))
        seeds = ", ".join(f"{value:g}" for value in measure["by_seed"])
        table.add_row(measure["id"], measure["name"], figure(measure), seeds, *bounds, measure["verdict"])
    console.print(table)
    errors = sum(report.errors.values())
    console.print(f"{report.requests} requests, {errors} errors. Written to {files[0]} and {files[1]}.")
    for reason, count in report.errors.items():
        typer.echo(f"{count} x {reason}", err=True)
    if errors:
        raise typer.Exit(EXIT_FAILED)
