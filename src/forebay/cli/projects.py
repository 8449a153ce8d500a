"""`forebay projects`: list projects, and set their shares and quotas, also while the server runs.

It refuses to make a project: `forebay keys create` does.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from forebay.cli.options import ConfigFile, DataFolder, load_settings, sentences
from forebay.cli.tables import clock_time, print_table
from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.quotas import parse_quotas
from forebay.store.database import Database
from forebay.store.projects import LimitedProject, ProjectStore

app = typer.Typer(help="List projects, and set their shares and quotas.", no_args_is_help=True)

_PAGES_MAX = 1000

Answer = TypeVar("Answer")


@app.command("list")
def list_projects(config_file: ConfigFile = None, data_dir: DataFolder = None) -> None:
    """List the projects by name, with what is set for them."""

    async def work(store: ProjectStore) -> list[LimitedProject]:
        found: list[LimitedProject] = []
        for _ in range(_PAGES_MAX):
            page, more = await store.list(after=found[-1].name if found else None)
            found += page
            if not more:
                break
        return found

    _print(_run(config_file, data_dir, work))


@app.command("set")
def set_limits(
    name: Annotated[str, typer.Argument(help="The project.", show_default=False)],
    weight: Annotated[float | None, typer.Option(help="Its share where several wait; 1 is that of all others.")] = None,
    quota: Annotated[
        list[str] | None,
        typer.Option(help="Such as tokens=1000000/day, requests=unlimited/month, stored_bytes=5000000; repeat it."),
    ] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Forget first what was set before.")] = False,
    config_file: ConfigFile = None,
    data_dir: DataFolder = None,
) -> None:
    """Set the share or quotas of a project; what is not named stays. A running server follows in a second."""

    async def work(store: ProjectStore) -> LimitedProject:
        return await store.set(name, weight=weight, quotas=parse_quotas(quota or ()), reset=reset)

    _print([_run(config_file, data_dir, work)])


def _print(found: list[LimitedProject]) -> None:
    rows = [
        (
            project.name,
            project.id,
            f"{project.limits.weight:g}",
            ", ".join(map(str, project.limits.quotas)) or "the defaults",
            clock_time(project.created_at),
        )
        for project in found
    ]
    print_table(("project", "id", "weight", "quotas", "created"), rows)


def _run(config_file: Path | None, data_dir: Path | None, work: Callable[[ProjectStore], Awaitable[Answer]]) -> Answer:
    async def run(settings: Settings) -> Answer:
        database = await Database.open(settings)
        try:
            return await work(ProjectStore(database, SystemClock()))
        finally:
            await database.close()

    with sentences():
        return asyncio.run(run(load_settings(config_file, data_dir=data_dir)))
