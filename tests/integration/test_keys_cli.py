"""`forebay keys` as a program."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forebay.config import Settings
from forebay.inference import Capability
from forebay.store.database import Database
from forebay.store.key_format import Role, hash_key, lookup_prefix
from forebay.store.keys import KeyRecord, KeyStore
from tests.support.clock import FakeClock


def forebay_keys(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FOREBAY_")}
    return subprocess.run(
        [sys.executable, "-c", "from forebay.cli.keys import app; app(prog_name='keys')", *arguments],
        cwd=folder, env=kept | environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def stored(folder: Path, plain: str) -> KeyRecord | None:
    async def find() -> KeyRecord | None:
        database = await Database.open(Settings(data_dir=folder))
        try:
            return await KeyStore(database, FakeClock()).find(lookup_prefix(plain) or "")
        finally:
            await database.close()

    return asyncio.run(find())


def test_the_life_of_a_key(tmp_path: Path) -> None:
    created = forebay_keys(
        tmp_path, "create", "--project", "shop", "--role", "member", "--scope", "chat", "--scope", "embedding",
        "--expires-days", "2", "--requests-per-minute", "5", "--tokens-per-minute", "1000", "--name", "till [1]",
    )  # fmt: skip
    assert created.returncode == 0, created.stderr
    plain = created.stdout.removesuffix("\n")
    assert lookup_prefix(plain)  # the key, the whole key and nothing but the key
    assert plain not in created.stderr
    record = stored(tmp_path / "data", plain)
    assert record is not None
    assert record.hash == hash_key(plain)
    assert (record.project, record.role, record.name) == ("shop", Role.MEMBER, "till [1]")
    assert record.scopes == {Capability.CHAT, Capability.EMBEDDING}
    assert (record.requests_per_minute, record.tokens_per_minute) == (5, 1000)
    assert record.expires_at == pytest.approx(record.created_at + 2 * 86_400, abs=60)

    listed = forebay_keys(tmp_path, "list")
    assert listed.returncode == 0
    row = listed.stdout.splitlines()[1]
    for cell in (record.id, record.prefix, record.last4, "shop", "till [1]", "chat, embedding", "5 requests/min"):
        assert cell in row
    assert plain.split("_")[2] not in listed.stdout
    assert record.id not in forebay_keys(tmp_path, "list", "--project", "default").stdout

    revoked = forebay_keys(tmp_path, "revoke", record.prefix)
    assert (revoked.returncode, revoked.stdout) == (0, "")
    assert record.id in revoked.stderr
    assert "revoked 20" in forebay_keys(tmp_path, "list").stdout


def test_the_defaults(tmp_path: Path) -> None:
    created = forebay_keys(tmp_path, "create", "--data-dir", str(tmp_path / "elsewhere"))
    assert created.returncode == 0, created.stderr
    record = stored(tmp_path / "elsewhere", created.stdout.strip())
    assert record is not None
    assert (record.project, record.role, record.scopes, record.expires_at) == ("default", Role.MEMBER, set(), None)
    assert not (tmp_path / "data").exists()


def test_the_configuration_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text('data_dir = "configured"\n')
    created = forebay_keys(tmp_path, "create", "--config", "other.toml")
    assert created.returncode == 0, created.stderr
    assert (tmp_path / "configured" / "forebay.db").exists()


async def test_it_works_while_the_server_has_the_database_open(tmp_path: Path) -> None:
    database = await Database.open(Settings(data_dir=tmp_path / "data"))
    keys = KeyStore(database, FakeClock())
    mine, _ = await keys.create_key()
    created = await asyncio.to_thread(forebay_keys, tmp_path, "create")
    assert await keys.find(lookup_prefix(created.stdout.strip()) or "")
    assert (await asyncio.to_thread(forebay_keys, tmp_path, "revoke", mine.id)).returncode == 0
    found = await keys.find(mine.prefix)
    assert found is not None
    assert found.revoked_at is not None
    await database.close()


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        (("create",), {"FOREBAY_PORTT": "1"}, "Did you mean `FOREBAY_PORT`?"),
        (("create", "--config", "none.toml"), {}, "There is no configuration file none.toml."),
        (("list",), {"FOREBAY_DATABASE_URL": "postgresql://me:hunter2@127.0.0.1:1/x"}, "cannot be opened"),
        (("create", "--project", "../x"), {}, "A project name has 1 to 64"),
        (("revoke", "nope"), {}, "There is no such API key."),
    ],
)
def test_trouble_is_one_sentence(
    tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str], sentence: str
) -> None:
    result = forebay_keys(tmp_path, *arguments, **environment)
    assert (result.returncode, result.stdout) == (1, "")
    assert sentence in result.stderr
    assert "hunter2" not in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [("create", "--role", "king"), ("create", "--scope", "flying"), ("create", "--expires-days", "0"), ("revoke",)],
)
def test_a_wrong_option_is_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert forebay_keys(tmp_path, *arguments).returncode == 2
    assert not (tmp_path / "data").exists()


def test_no_keys_is_said(tmp_path: Path) -> None:
    result = forebay_keys(tmp_path, "list")
    assert (result.returncode, result.stdout) == (0, "")
    assert "forebay keys create" in result.stderr
