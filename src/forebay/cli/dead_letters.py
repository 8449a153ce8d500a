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
    with sentences():
        if (letter is None) != every:
            raise SetupError("Name one dead letter, or say --all.")
        if every and again:
            raise SetupError("--again goes with one dead letter: --all takes those that were not requeued.")
    chosen = {name: value for name, value in (("kind", kind), ("job", job), ("code", code)) if value is not None}

    async def one(client: ApiClient) -> list[str]:
        path = path_of("dead-letters", str(letter), "requeue")
        return [str((await client.call("POST", path, json={"again": again}))["requeued_as"])]

    async def all_of_them(client: ApiClient) -> list[str]:
        made: list[str] = []
        for _ in range(_ROUNDS_MAX):
            found = await client.call("POST", path_of("dead-letters", "requeue"), json=chosen)
            made += [str(each["id"]) for each in found["jobs"]]
            if found["left"] == found["gone"] or not found["requeued"]:
                break
        if found["gone"]:
            typer.echo(f"Passed over {found['gone']} whose input or job is gone.", err=True)
        return made

    made = ask(url, key_file, all_of_them if every else one)
    for job_id in made:
        typer.echo(job_id)
    if not made:
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
