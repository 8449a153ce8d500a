"""`forebay batch`: hand a file of requests to a running server, watch it being worked on, fetch the results.

It refuses to hold a batch up: a batch goes on when nobody watches, and results that are half fetched are not kept.
"""

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer

from forebay.cli.api_client import LOCAL_SERVER, ApiClient, Busy, KeyFile, NotNow, ServerUrl, ask, path_of
from forebay.cli.options import EXIT_FAILED, sentences
from forebay.cli.progress import follow
from forebay.cli.results import print_out, write_whole
from forebay.cli.tables import clock_time, print_table
from forebay.errors import SetupError

app = typer.Typer(help="Hand in files of requests and fetch their results.", no_args_is_help=True)

_LINE_BYTES_MAX = 8 * 2**20
_METADATA_PAIRS_MAX = 16
_LIVE = {"validating", "in_progress", "finalizing", "cancelling"}

BatchId = Annotated[str, typer.Argument(metavar="ID", help="The batch, as `forebay batch list` shows it.")]
OutFile = Annotated[Path | None, typer.Option("--out", "-o", help="Write here instead of to standard output.")]
Watch = Annotated[bool, typer.Option("--watch", help="Show how far it is until it ends.")]


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="One request a line, as OpenAI's batches have them.")],
    endpoint: Annotated[str | None, typer.Option(help="That of its first line without it.")] = None,
    window: Annotated[str, typer.Option(help="Time that it may take, such as 24h or 30m.")] = "24h",
    metadata: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, kept with the batch; repeat it.")] = None,
    watch: Watch = False,
    url: ServerUrl = LOCAL_SERVER,
    key_file: KeyFile = None,
) -> None:
    """Upload a file, make a batch of it and print the batch's id, alone on standard output."""
    pairs = _pairs(metadata or [])

    async def work(client: ApiClient) -> dict[str, Any]:
        chosen = endpoint or _endpoint_of(file)
        uploaded = await _upload(client, file)
        body = {"input_file_id": uploaded["id"], "endpoint": chosen, "completion_window": window, "metadata": pairs}
        try:
            return await client.call("POST", path_of("batches"), json=body)
        except SetupError as error:
            if isinstance(error, Busy) or not isinstance(error, NotNow):  # refused for certain: nobody needs the file
                with suppress(SetupError):
                    await client.call("DELETE", path_of("files", uploaded["id"]))
            raise

    batch = ask(url, key_file, work, "Stopped. The batch was not made, or `forebay batch list` shows it.")
    typer.echo(str(batch["id"]))
    if watch:
        _watch(url, key_file, str(batch["id"]))
    else:
        typer.echo(f"Follow it with `forebay batch status {batch['id']} --watch`.", err=True)


@app.command()
def status(batch: BatchId, watch: Watch = False, url: ServerUrl = LOCAL_SERVER, key_file: KeyFile = None) -> None:
    """Show a batch: state, counts, files, and what is wrong with it."""
    if watch:
        _watch(url, key_file, batch)
        return

    async def work(client: ApiClient) -> dict[str, Any]:
        return await client.call("GET", path_of("batches", batch))

    typer.echo(json.dumps(ask(url, key_file, work), ensure_ascii=False, indent=2))


@app.command()
def cancel(batch: BatchId, url: ServerUrl = LOCAL_SERVER, key_file: KeyFile = None) -> None:
    """Stop a batch. What is done by then is kept as its results."""

    async def work(client: ApiClient) -> dict[str, Any]:
        return await client.call("POST", path_of("batches", batch, "cancel"))

    found = ask(url, key_file, work)
    typer.echo(f"The batch is {_words(found['status'])}.", err=True)


@app.command()
def results(batch: BatchId, out: OutFile = None, url: ServerUrl = LOCAL_SERVER, key_file: KeyFile = None) -> None:
    """Fetch the answers, one a line; the order of the lines is not that of the requests."""
    _fetch(batch, "output_file_id", out, url, key_file)


@app.command()
def errors(batch: BatchId, out: OutFile = None, url: ServerUrl = LOCAL_SERVER, key_file: KeyFile = None) -> None:
    """Fetch the lines that failed, one a line."""
    _fetch(batch, "error_file_id", out, url, key_file)


@app.command("list")
def list_batches(
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many at most, newest first.")] = 20,
    url: ServerUrl = LOCAL_SERVER,
    key_file: KeyFile = None,
) -> None:
    """List the project's batches, newest first."""

    async def work(client: ApiClient) -> dict[str, Any]:
        return await client.call("GET", path_of("batches", limit=limit))

    found = ask(url, key_file, work).get("data", [])
    if not found:
        typer.echo("There are no batches. Make one with `forebay batch submit`.", err=True)
        return
    titles = ("id", "state", "endpoint", "model", "done", "failed", "lines", "created")
    print_table(titles, [_row(batch) for batch in found])


def _row(batch: dict[str, Any]) -> tuple[str, ...]:
    counts = batch.get("request_counts") or {}
    return (
        str(batch["id"]),
        _words(batch["status"]),
        str(batch["endpoint"]),
        str(batch.get("model") or ""),
        *(str(counts.get(name, 0)) for name in ("completed", "failed", "total")),
        clock_time(batch["created_at"]),
    )


def _words(status: object) -> str:
    return str(status).replace("_", " ")


def _pairs(given: list[str]) -> dict[str, str] | None:
    with sentences():
        if len(given) > _METADATA_PAIRS_MAX:
            raise SetupError(f"A batch has at most {_METADATA_PAIRS_MAX} pairs of metadata.")
        found = {}
        for pair in given:
            name, equals, value = pair.partition("=")
            if not (name and equals):
                raise SetupError(f"`{pair}` is no metadata. Write it as NAME=VALUE.")
            found[name] = value
    return found or None


def _endpoint_of(file: Path) -> str:
    """The `url` of the first line. Raises SetupError."""
    try:
        with file.open("rb") as lines:
            first = json.loads(lines.readline(_LINE_BYTES_MAX))
        return str(first["url"])
    except OSError as error:
        raise _unreadable(file, error) from None
    except (ValueError, KeyError, TypeError):
        raise SetupError(
            f'The first line of {file} is no request. Write it as {{"custom_id": "1", "method": "POST", '
            '"url": "/v1/chat/completions", "body": {…}}.'
        ) from None


async def _upload(client: ApiClient, file: Path) -> dict[str, Any]:
    try:
        content = await asyncio.to_thread(file.open, "rb")
    except OSError as error:
        raise _unreadable(file, error) from None
    with content:
        form = aiohttp.FormData()
        form.add_field("purpose", "batch")
        name = file.name if file.name.endswith(".jsonl") else f"{file.stem}.jsonl"
        form.add_field("file", content, filename=name, content_type="application/jsonl")
        return await client.call("POST", path_of("files"), data=form)


def _unreadable(file: Path, error: OSError) -> SetupError:
    return SetupError(f"{file} cannot be read: {error.strerror}.")


def _watch(url: str, key_file: Path | None, batch: str) -> None:
    """Show progress until the batch ends; its end decides the status of the command."""

    async def work(client: ApiClient) -> dict[str, Any]:
        await follow(client, batch)
        return await client.call("GET", path_of("batches", batch))

    goes_on = f"The batch goes on. Look again with `forebay batch status {batch} --watch`."
    found = ask(url, key_file, work, goes_on)
    counts = found.get("request_counts") or {}
    summary = f"{counts.get('completed', 0)} of {counts.get('total', 0)} lines done, {counts.get('failed', 0)} failed."
    hints = [
        f"`forebay batch {name} {batch}` fetches the {noun}."
        for name, field, noun in (("results", "output_file_id", "answers"), ("errors", "error_file_id", "failed lines"))
        if found.get(field)
    ]
    typer.echo(" ".join([f"The batch is {_words(found['status'])}: {summary}", *hints]), err=True)
    for fault in ((found.get("errors") or {}).get("data") or [])[:10]:
        where = f"line {fault['line']}: " if fault.get("line") else ""
        typer.echo(f"  {where}{fault.get('message')}", err=True)
    if found["status"] != "completed":
        raise typer.Exit(EXIT_FAILED)


def _fetch(batch: str, field: str, out: Path | None, url: str, key_file: Path | None) -> None:
    async def work(client: ApiClient) -> None:
        found = await client.call("GET", path_of("batches", batch))
        file_id = found.get(field)
        if file_id is None:
            raise SetupError(_nothing(found, field))
        async with client.request("GET", path_of("files", str(file_id), "content")) as response:
            pieces = response.content.iter_chunked(2**18)
            await (print_out(pieces) if out is None else write_whole(pieces, out))

    ask(url, key_file, work)


def _nothing(batch: dict[str, Any], field: str) -> str:
    noun = "results" if field == "output_file_id" else "failed lines"
    if batch["status"] in _LIVE:
        return f"The batch is {_words(batch['status'])}: there are no {noun} yet."
    return f"The batch is {_words(batch['status'])} and has no {noun}."
