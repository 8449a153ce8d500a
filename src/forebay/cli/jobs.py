"""`forebay jobs`: whatever a running server works on behind the scenes.

It refuses to touch the database: it asks the server, as everybody else.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from forebay.cli.api_client import LOCAL_SERVER, ApiClient, KeyFile, ServerUrl, ask, path_of
from forebay.cli.progress import time_left
from forebay.cli.results import print_out, write_whole
from forebay.cli.tables import clock_time, print_table

app = typer.Typer(help="List, show, cancel and retry jobs.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job, as `forebay jobs list` shows it.")]


@app.command("list")
def list_jobs(
    kind: Annotated[str | None, typer.Option(help="Only jobs of this kind, such as batch or webhook.")] = None,
    state: Annotated[str | None, typer.Option(help="Only jobs in this state, such as running or failed.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many at most, newest first.")] = 20,
    url: ServerUrl = LOCAL_SERVER,
    key_file: KeyFile = None,
) -> None:
    """List the project's jobs, newest first."""

    async def work(client: ApiClient) -> dict[str, Any]:
        return await client.call("GET", path_of("jobs", kind=kind, state=state, limit=limit))

    found = ask(url, key_file, work).get("data", [])
    if not found:
        typer.echo("There are no such jobs.", err=True)
        return
    titles = ("id", "kind", "state", "stage", "done", "failed", "total", "time left", "created", "error")
    print_table(titles, [_row(job) for job in found])


@app.command()
def show(job: JobId, url: ServerUrl = LOCAL_SERVER, key_file: KeyFile = None) -> None:
    """Show a job with its place in line, its failed attempts and its log, as JSON."""

    async def work(client: ApiClient) -> dict[str, Any]:
        found = await client.call("GET", path_of("jobs", job))
        log = await client.call("GET", path_of("jobs", job, "log"))
        return {**found, "log": log["data"]}

    typer.echo(json.dumps(ask(url, key_file, work), ensure_ascii=False, indent=2))


@app.command()
def cancel(job: JobId, url: ServerUrl = LOCAL_SERVER, key_file: KeyFile = None) -> None:
    """Stop a job: at once if nobody works on it, otherwise as soon as its engines have stopped."""
    found = ask(url, key_file, lambda client: client.call("POST", path_of("jobs", job, "cancel")))
    asked = " and is being stopped" if found["cancel_requested_at"] and not found["finished_at"] else ""
    typer.echo(f"The job is {found['status']}{asked}.", err=True)


@app.command()
def retry(job: JobId, url: ServerUrl = LOCAL_SERVER, key_file: KeyFile = None) -> None:
    """Try a job again that was given up, cancelled or too late."""
    found = ask(url, key_file, lambda client: client.call("POST", path_of("jobs", job, "retry")))
    typer.echo(f"The job is {found['status']}.", err=True)


@app.command()
def result(
    job: JobId,
    form: Annotated[str | None, typer.Option("--format", help="How it is written, such as srt or json.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write here instead of to standard output.")] = None,
    url: ServerUrl = LOCAL_SERVER,
    key_file: KeyFile = None,
) -> None:
    """Fetch what a finished transcription has found."""

    async def work(client: ApiClient) -> None:
        async with client.request("GET", path_of("jobs", job, "result", format=form)) as response:
            pieces = response.content.iter_chunked(2**18)
            await (print_out(pieces) if out is None else write_whole(pieces, out))

    ask(url, key_file, work)


def _row(job: dict[str, Any]) -> tuple[str, ...]:
    progress = job["progress"]
    return (
        str(job["id"]),
        str(job["kind"]),
        str(job["status"]),
        str(progress["stage"]),
        *(str(progress[name]) for name in ("completed", "failed", "total")),
        time_left(job["eta_seconds"]),
        clock_time(job["created_at"]),
        str((job["error"] or {}).get("code", "")),
    )
