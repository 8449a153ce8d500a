"""`forebay usage`: what was used by day, from the database, also while the server runs.

It refuses to show more rows than a person reads.
"""

import asyncio
from enum import StrEnum
from typing import Annotated

import typer

from forebay.cli.options import ConfigFile, DataFolder, load_settings, sentences
from forebay.cli.tables import print_table
from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.quotas import Use, day_of
from forebay.store.database import Database
from forebay.store.projects import ProjectStore
from forebay.store.usage import UsageRow, UsageStore

_ROWS_MAX = 1000
_DAY_SECONDS = 86_400


class Group(StrEnum):
    """What usage is grouped by, beside the day."""

    PROJECT = "project"
    KEY = "key"
    MODEL = "model"
    CAPABILITY = "capability"


_COLUMNS = {Group.PROJECT: "project_id", Group.KEY: "key_id", Group.MODEL: "model", Group.CAPABILITY: "capability"}
_TITLES = ("requests", "prompt tokens", "cached", "written tokens", "audio seconds", "megapixel-steps", "images")


def usage(
    days: Annotated[int, typer.Option(min=1, max=3660, help="How many days, today included.")] = 7,
    by: Annotated[
        list[Group] | None, typer.Option(help="Group by this as well; repeat it. Projects without it.")
    ] = None,
    project: Annotated[str | None, typer.Option(help="Only this project.")] = None,
    config_file: ConfigFile = None,
    data_dir: DataFolder = None,
) -> None:
    """Show what was used, by day and project, key, model or capability."""
    chosen = [group for group in Group if group in (by or [Group.PROJECT])]

    async def read(settings: Settings) -> tuple[list[UsageRow], bool, dict[str, str]]:
        database, clock = await Database.open(settings), SystemClock()
        try:
            store = UsageStore(database, clock)
            only = None if project is None else (await ProjectStore(database, clock).get(project)).id
            first = day_of(clock.now() - (days - 1) * _DAY_SECONDS)
            groups = [_COLUMNS[group] for group in chosen]
            rows, more = await store.report(
                first=first, last=day_of(clock.now()), groups=groups, limit=_ROWS_MAX, project=only
            )
            names = await store.project_names({row.group[0] for row in rows}) if Group.PROJECT in chosen else {}
            return rows, more, names
        finally:
            await database.close()

    with sentences():
        rows, more, names = asyncio.run(read(load_settings(config_file, data_dir=data_dir)))
    if not rows:
        typer.echo("Nothing was used in these days.", err=True)
        return
    cells = [(row.day, *(names.get(value, value) for value in row.group), *_amounts(row.use)) for row in rows]
    print_table(("day", *(group.value for group in chosen), *_TITLES), cells)
    if more:
        typer.echo(f"There is more than these {_ROWS_MAX} rows: ask for fewer days or groups.", err=True)


def _amounts(use: Use) -> tuple[str, ...]:
    counts = (use.requests, use.prompt_tokens, use.cached_tokens, use.completion_tokens)
    return (*map(str, counts), f"{use.audio_ms / 1000:g}", f"{use.pixel_steps / 1_000_000:g}", str(use.images))
