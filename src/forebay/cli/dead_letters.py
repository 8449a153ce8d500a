"""`forebay dead-letters`: what was given up, why, and another try at it.

It refuses to requeue what was requeued before unless it is told to.
"""

import json
from typing import Annotated, Any

import typer

from forebay.cli.api_client import LOCAL_SERVER, ApiClient, KeyFile, ServerUrl, ask, path_of
from forebay.cli.options import sentences
from forebay.cli.tables import clock_time, print_table
from forebay.errors import SetupError

app = typer.Typer(help="List, show and requeue what was given up.", no_args_is_help=True)

_ROUNDS_MAX = 1000

Kind = Annotated[
    str | None,
    typer.Option(help="Only those of this kind: batch for lines, message for pushed ones, otherwise that of the job."),
]
JobId = Annotated[str | None, typer.Option("--job", help="Only those of this job or batch.")]
Code = Annotated[str | None, typer.Option(help="Only those with this error code.")]


@app.command("list")
def list_letters(
    kind: Kind = None,
    job: JobId = None,
    code: Code = None,
    waiting: Annotated[bool, typer.Option("--waiting", help="Only those that were not requeued.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many at most, newest first.")] = 20,
    url: ServerUrl = LOCAL_SERVER,
    key_file: KeyFile = None,
) -> None:
    """List the project's dead letters, newest first."""
    chosen = path_of("dead-letters", kind=kind, job=job, code=code, waiting="true" if waiting else None, limit=limit)
    found = ask(url, key_file, lambda client: client.call("GET", chosen)).get("data", [])
    if not found:
        typer.echo("There are no such dead letters.", err=True)
        return
    titles = ("id", "kind", "job", "line", "custom id", "error", "created", "requeued as")
    print_table(titles, [_row(letter) for letter in found])


@app.command()
def show(
    letter: Annotated[str, typer.Argument(metavar="ID", help="As `forebay dead-letters list` shows it.")],
    url: ServerUrl = LOCAL_SERVER,
    key_file: KeyFile = None,
) -> None:
    """Show a dead letter with its input and every attempt, as JSON."""
    found = ask(url, key_file, lambda client: client.call("GET", path_of("dead-letters", letter)))
    typer.echo(json.dumps(found, ensure_ascii=False, indent=2))


@app.command()
def requeue(
    letter: Annotated[str | None, typer.Argument(metavar="[ID]", show_default=False)] = None,
    every: Annotated[bool, typer.Option("--all", help="All that were not requeued and fit the filters.")] = False,
    kind: Kind = None,
    job: JobId = None,
    code: Code = None,
    again: Annotated[bool, typer.Option("--again", help="Also one that was requeued before.")] = False,
    url: ServerUrl = LOCAL_SERVER,
    key_file: KeyFile = None,
) -> None:
    """Try one of them again, or all; prints the ids of the jobs that do."""
    chosen = {name: value for name, value in (("kind", kind), ("job", job), ("code", code)) if value is not None}
    with sentences():
        if (letter is None) != every:
            raise SetupError("Name one dead letter, or say --all.")
        if every and again:
            raise SetupError("--again goes with one dead letter: --all takes those that were not requeued.")
        if chosen and not every:
            raise SetupError(f"--{next(iter(chosen))} goes with --all: an ID is one dead letter already.")

    async def one(client: ApiClient) -> None:
        path = path_of("dead-letters", str(letter), "requeue")
        typer.echo(str((await client.call("POST", path, json={"again": again}))["requeued_as"]))

    ask(url, key_file, (lambda client: _requeue_all(client, chosen)) if every else one)


async def _requeue_all(client: ApiClient, chosen: dict[str, str]) -> None:
    """Take up all that can be, a round at a time. Raises SetupError if there are some that cannot."""
    nothing = True
    for _ in range(_ROUNDS_MAX):
        found = await client.call("POST", path_of("dead-letters", "requeue"), json=chosen)
        for made in found["jobs"]:  # these go on, whatever becomes of the next round
            typer.echo(str(made["id"]))
            nothing = False
        if found["left"] == found["gone"] or not found["requeued"]:
            break
    if found["gone"]:
        typer.echo(f"Passed over {found['gone']} whose input or job is gone.", err=True)
    if (stuck := found["left"] - found["gone"]) > 0:
        those = "is left that cannot be taken as it is" if stuck == 1 else "are left that cannot be taken as they are"
        raise SetupError(f"{stuck} {those}; `forebay dead-letters requeue ID` says why.")
    if nothing:
        typer.echo("There was nothing to requeue.", err=True)


def _row(letter: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(letter["id"]),
        str(letter["kind"]),
        str(letter["job_id"] or ""),
        str(letter["line"] or ""),
        str(letter["custom_id"] or ""),
        str(letter["error"]["code"]),
        clock_time(letter["created_at"]),
        str(letter["requeued_as"] or ""),
    )
