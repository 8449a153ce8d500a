"""Servers and workers over one database that may be killed and started again, each life with its own logs.

The engines are fake ones behind the kind `command`, so that what each of them was asked for outlives whoever asked.
"""

import asyncio
import json
import os
import re
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from forebay.store.database import Database
from tests.support.server import ADMIN_KEY, DEADLINE_SECONDS, eventually

LEASE_SECONDS = 3.0
SEGMENT_LINES = 64
CHUNKS_AT_ONCE = 4
SLOTS = 8
_SITE = "KILLABLE_SITE"  # in the environment of every process of a site, down to the engines
_LISTENS = re.compile(r"Forebay listens on (\S+)")
_TAKES = re.compile(r"The worker (\S+) takes jobs")
_EVENT = re.compile(r"event=(started|finished|cancelled) request_id=(\S+)")

CONFIG = f"""
default_models = false
[batches]
chunk_lines = 128
segment_lines = {SEGMENT_LINES}
line_backoff_seconds = 0.2
[jobs]
lease_seconds = {LEASE_SECONDS}
poll_seconds = 0.2
prune_seconds = 1
backoff_seconds_min = 0.2
chunks_at_once = {CHUNKS_AT_ONCE}
[supervisor]
tick_seconds = 0.1
backoff_seconds_min = 0.1
backoff_seconds_max = 0.3
[outbound]
allowed_networks = ["127.0.0.2/32"]
[models.fake]
engine = "command"
slots = {SLOTS}
preload = true
[models.fake.options]
argv = ["/bin/sh", "-c", 'exec "$ENGINE_PYTHON" -P -m forebay.engines.fake 2>>"$ENGINE_LOGS/$$.log"']
environment = {{ FOREBAY_ENGINE_SPEC = '{{"name": "fake", "slots": {SLOTS}, "port": {{port}}}}' }}
"""


@dataclass(frozen=True)
class EngineLife:
    """What one engine was asked for: the ids of the requests that it has begun, and of those that it has answered."""

    pid: int
    begun: frozenset[str]
    answered: frozenset[str]

    @classmethod
    def read(cls, path: Path) -> "EngineLife":
        """From its own log, in which each event is written as it happens."""
        events = _EVENT.findall(path.read_text(encoding="utf-8"))
        begun = frozenset(request_id for event, request_id in events if event == "started")
        answered = frozenset(request_id for event, request_id in events if event == "finished")
        return cls(int(path.stem), begun, answered)

    @property
    def cut_off(self) -> frozenset[str]:
        """What it has begun and did not answer."""
        return self.begun - self.answered


@dataclass
class Life:
    """One process from its start to its end."""

    process: asyncio.subprocess.Process
    log_file: Path
    engine_logs: Path
    data: Path
    began: float = field(default_factory=time.time)

    @property
    def log(self) -> str:
        """What it has printed."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def url(self) -> str:
        """Where a server listens; empty until it does."""
        found = _LISTENS.search(self.log)
        return found[1] if found else ""

    @property
    def node(self) -> str:
        """The name under which it holds leases; empty before the first life has chosen one."""
        path = self.data / "nodes" / "0.name"
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""

    @property
    def takes_jobs(self) -> bool:
        """Whether a worker has said so."""
        return _TAKES.search(self.log) is not None

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events by that name that it has logged."""
        named = f'"event": "{name}"'
        return [json.loads(line) for line in self.log.splitlines() if named in line and line.endswith("}")]

    def engines(self) -> list["EngineLife"]:
        """Its engines in the order of their starts."""
        logs = sorted(self.engine_logs.glob("*.log"), key=lambda path: path.stat().st_ctime_ns)
        return [EngineLife.read(path) for path in logs]

    def engine_pid(self) -> int | None:
        """The engine that lives, if it has begun a request."""
        return next((one.pid for one in self.engines() if one.begun and psutil.pid_exists(one.pid)), None)

    async def kill(self) -> None:
        """kill -9."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


class Site:
    """Places that share a database: each has a data folder and at most one living process."""

    def __init__(
        self, folder: Path, database_url: str | None, places: Collection[str], lease_seconds: float = LEASE_SECONDS
    ) -> None:
        self.folder = folder
        self.lives: dict[str, list[Life]] = {place: [] for place in places}
        config = CONFIG.replace(f"lease_seconds = {LEASE_SECONDS}", f"lease_seconds = {lease_seconds}")
        self._config = folder / "forebay.toml"
        self._config.write_text(config, encoding="utf-8")
        self._idle = folder / "idle.toml"
        self._idle.write_text(config.replace("preload = true", "preload = false"), encoding="utf-8")
        self._url = database_url

    @property
    def blobs(self) -> Path:
        """The folder of blobs that all places share."""
        return self.folder / "blobs"

    @property
    def environment(self) -> dict[str, str]:
        """The settings that all places share."""
        shared = {"FOREBAY_BLOBS_URL": f"file://{self.blobs}"}
        return shared if self._url is None else {**shared, "FOREBAY_DATABASE_URL": self._url}

    def data(self, place: str) -> Path:
        """The data folder of a place."""
        return self.folder / place

    def url(self) -> str:
        """Where the server listens now; empty while there is none."""
        life = self.lives["server"][-1] if self.lives["server"] else None
        return life.url if life is not None and life.process.returncode is None else ""

    async def start(self, place: str, kill_at: str | None = None) -> Life:
        """The next life of a place. Beside workers, the server does not work."""
        number = len(self.lives[place]) + 1
        alone = len(self.lives) == 1
        logs = self.folder / f"{place}-{number}-engines"
        logs.mkdir()
        settings = {
            "FOREBAY_DATA_DIR": str(self.data(place)),
            "FOREBAY_PORT": "0",
            "FOREBAY_ADMIN_KEY": ADMIN_KEY,
            "FOREBAY_LOG_FORMAT": "json",
            "PYTHONUNBUFFERED": "1",
            "ENGINE_PYTHON": sys.executable,
            "ENGINE_LOGS": str(logs),
            _SITE: str(self.folder),
        }
        if kill_at is not None:
            settings["FOREBAY_REHEARSAL_KILL_AT"] = kill_at
        works = place != "server" or alone
        if not works:
            settings["FOREBAY_JOBS_ENABLED"] = "false"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("FOREBAY_")}
        log_file = self.folder / f"{place}-{number}.log"
        command = ("serve" if place == "server" else "worker", "--config", str(self._config if works else self._idle))
        with log_file.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "forebay.cli", *command),
                env={**inherited, **self.environment, **settings},
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        life = Life(process, log_file, logs, self.data(place))
        self.lives[place].append(life)
        return life

    async def until_up(self, life: Life) -> None:
        """Wait until a server listens or a worker takes jobs, or it has ended."""
        await eventually(
            lambda: life.url or life.takes_jobs or life.process.returncode is not None,
            within_seconds=DEADLINE_SECONDS,
            what="a start",
        )

    async def close(self) -> None:
        """Kill what lives."""
        for lives in self.lives.values():
            for life in lives:
                await life.kill()

    def processes(self) -> list[psutil.Process]:
        """Every process that belongs to this site, engines and guards included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_SITE) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, FileNotFoundError):
                continue
        return found


async def holds_a_lease(database: Database, life: Life) -> bool:
    """Whether a lease was given or renewed in this life."""
    query = sa.text("SELECT count(*) FROM jobs WHERE state = 'running' AND node = :node AND lease_expires_at > :after")
    values = {"node": life.node, "after": life.began + LEASE_SECONDS}
    async with database.read() as connection:
        return bool(await connection.scalar(query, values))
