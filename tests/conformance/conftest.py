"""What every suite over both databases starts from; a suite that needs more has fixtures of its own by these names."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from forebay.config import Settings
from forebay.store.database import Database
from tests.support import postgres
from tests.support.clock import FakeClock


@pytest.fixture(params=["sqlite", "postgres"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    url = SecretStr(postgres.new_database()) if request.param == "postgres" else None
    database = await Database.open(Settings(data_dir=tmp_path / "data", database_url=url))
    yield database
    await database.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()
