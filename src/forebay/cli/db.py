"""`forebay db`: bring the database up to date, look whether it is well, back it up; also while the server runs.

It refuses to repair anything: what is damaged is restored from a backup.
"""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from forebay.cli.options import ConfigFile, DataFolder, load_settings, sentences
from forebay.errors import SetupError
from forebay.store import schema, upkeep

app = typer.Typer(help="Upgrade, check and back up the database.", no_args_is_help=True)


@app.command()
def upgrade(config_file: ConfigFile = None, data_dir: DataFolder = None) -> None:
    """Bring the schema to this version's, as a start of the server would."""
    with sentences():
        before, after = asyncio.run(schema.upgrade(load_settings(config_file, data_dir=data_dir)))
        if before == after:
            typer.echo(f"The schema is {after} already; there was nothing to do.")
        else:
            typer.echo(f"Brought the schema from {before or 'nothing'} to {after}.")


@app.command()
def check(config_file: ConfigFile = None, data_dir: DataFolder = None) -> None:
    """Look at the schema, the rows and, on SQLite, every page. Status 1 if something is wrong."""
    with sentences():
        found = asyncio.run(upkeep.check(load_settings(config_file, data_dir=data_dir)))
        if found.faults:
            raise SetupError(f"{found.address} is not well. {' '.join(found.faults)}")
        typer.echo(f"{found.address} is well, with schema {found.schema}.")
        for name, count in found.counts.items():
            typer.echo(f"{count:>10}  {name}")


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="Where the copy goes.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    config_file: ConfigFile = None,
    data_dir: DataFolder = None,
) -> None:
    """Copy a SQLite database as it is at this moment, also while the server runs and writes."""
    with sentences():
        size = upkeep.backup(load_settings(config_file, data_dir=data_dir), file, overwrite=force)
        typer.echo(f"Wrote {file}, {size:,} bytes.")
