"""`forebay keys`: create, list and revoke API keys, also while the server runs.

It refuses to show a key again: a lost one is revoked and replaced.
"""

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from forebay.cli.options import PIPED_WIDTH, ConfigFile, DataFolder, load_settings, sentences
from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.inference import Capability
from forebay.store.database import Database
from forebay.store.key_format import Role
from forebay.store.keys import DEFAULT_PROJECT, PAGE_SIZE_MAX, KeyRecord, KeyStore

app = typer.Typer(help="Create, list and revoke API keys.", no_args_is_help=True)

_DAY = 86_400
_PAGES_MAX = 1000

Answer = TypeVar("Answer")
Rate = Annotated[int | None, typer.Option(min=1, help="429 beyond it; no limit without it.")]


@app.command()
def create(
    project: Annotated[str, typer.Option(help="Who it belongs to; created on its first key.")] = DEFAULT_PROJECT,
    role: Annotated[Role, typer.Option(help="admin: everything; member: use models; read_only: look.")] = Role.MEMBER,
    scope: Annotated[
        list[Capability] | None, typer.Option(help="What it may ask models for; repeat it. All without it.")
    ] = None,
    expires_days: Annotated[int | None, typer.Option(min=1, max=36_500, help="Days until it stops working.")] = None,
    requests_per_minute: Rate = None,
    tokens_per_minute: Rate = None,
    name: Annotated[str, typer.Option(help="A name for people.")] = "",
    config_file: ConfigFile = None,
    data_dir: DataFolder = None,
) -> None:
    """Create a key and print it, alone on standard output: KEY=$(forebay keys create)."""

    async def work(keys: KeyStore) -> tuple[KeyRecord, str]:
        return await keys.create_key(
            project,
            name=name,
            role=role,
            scopes=frozenset(scope or ()),
            expires_at=SystemClock().now() + expires_days * _DAY if expires_days else None,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
        )

    record, plain = _run(config_file, data_dir, work)
    typer.echo(plain)
    typer.echo(
        f"Created {record.id} ({record.role.value}, project {record.project}). "
        "Keep the key now: it is stored hashed and cannot be shown again.",
        err=True,
    )


@app.command("list")
def list_keys(
    project: Annotated[str | None, typer.Option(help="Only the keys of this project.")] = None,
    config_file: ConfigFile = None,
    data_dir: DataFolder = None,
) -> None:
    """List the keys, oldest first, without their secrets."""

    async def work(keys: KeyStore) -> list[KeyRecord]:
        return [record async for record in _every_key(keys, project)]

    records = _run(config_file, data_dir, work)
    if not records:
        typer.echo("There are no keys. Create one with `forebay keys create`.", err=True)
        return
    console = Console()
    console = console if console.is_terminal else Console(width=PIPED_WIDTH)
    console.print(_table(records, SystemClock().now()))


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="Its id or prefix, as `forebay keys list` shows them.")],
    config_file: ConfigFile = None,
    data_dir: DataFolder = None,
) -> None:
    """Revoke a key. A running server notices within `auth.key_cache_seconds`."""

    async def work(keys: KeyStore) -> KeyRecord:
        return await keys.revoke(key)

    record = _run(config_file, data_dir, work)
    typer.echo(f"Revoked {record.id} (project {record.project}).", err=True)


def _run(config_file: Path | None, data_dir: Path | None, work: Callable[[KeyStore], Awaitable[Answer]]) -> Answer:
    """Do the work on an open store; what goes wrong becomes one sentence and exit status 1."""

    async def run(settings: Settings) -> Answer:
        async with _store(settings) as keys:
            return await work(keys)

    with sentences():
        return asyncio.run(run(load_settings(config_file, data_dir=data_dir)))


@asynccontextmanager
async def _store(settings: Settings) -> AsyncIterator[KeyStore]:
    database = await Database.open(settings)
    try:
        yield KeyStore(database, SystemClock())
    finally:
        await database.close()


async def _every_key(keys: KeyStore, project: str | None) -> AsyncIterator[KeyRecord]:
    after = None
    for _ in range(_PAGES_MAX):
        page = await keys.list(project, after=after)
        for record in page:
            yield record
        if len(page) < PAGE_SIZE_MAX:
            return
        after = page[-1].id


def _table(records: list[KeyRecord], now: float) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("id", "key", "project", "name", "role", "scopes", "rate", "created", "state"):
        table.add_column(title, no_wrap=title in {"id", "key"})
    for record in records:
        cells = (
            record.id,
            f"fb_{record.prefix}_…{record.last4}",
            record.project,
            record.name,
            record.role.value,
            ", ".join(sorted(record.scopes)) or "all",
            _rate(record),
            _date(record.created_at),
            _state(record, now),
        )
        table.add_row(*(Text(cell) for cell in cells))  # as text: a name may look like markup
    return table


def _rate(record: KeyRecord) -> str:
    rates = (("requests", record.requests_per_minute), ("tokens", record.tokens_per_minute))
    return ", ".join(f"{rate} {noun}/min" for noun, rate in rates if rate is not None) or "no limit"


def _state(record: KeyRecord, now: float) -> str:
    if record.revoked_at is not None:
        return f"revoked {_date(record.revoked_at)}"
    if record.expires_at is None:
        return "active"
    return f"{'expired' if record.expires_at <= now else 'active until'} {_date(record.expires_at)}"


def _date(seconds: float) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%d")
