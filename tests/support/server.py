"""A real server in a real process: started from a configuration, told to stop, or killed."""

import asyncio
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import psutil

from tests.support.processes import command_line, family

ADMIN_KEY = "test-admin-key-0123456789abcdef0123456789"
DEADLINE_SECONDS = 60.0

FAKE = """
default_models = false
[models.fake]
engine = "fake"
preload = true
"""


async def eventually(
    condition: Callable[[], Awaitable[Any] | Any], *, within_seconds: float = 10.0, what: str = "the condition"
) -> Any:
    """Poll `condition` until it is truthy and return its value; fail with `what` after the deadline."""
    deadline = asyncio.get_running_loop().time() + within_seconds
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        if asyncio.get_running_loop().time() > deadline:
            message = f"{what} did not come true within {within_seconds} s"
            raise AssertionError(message)
        await asyncio.sleep(0.01)


def chat_body(text: str, *, model: str = "fake", stream: bool = False, **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": model, "messages": [{"role": "user", "content": text}], "stream": stream, **fields}


class Server:
    """A running server. `log` is everything that it has printed so far."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path, log_file: Path) -> None:
        self.process = process
        self.folder = folder
        self.url = ""
        self.key = ADMIN_KEY
        self._log_file = log_file
        self.session = self._connect()
        self._clients: list[openai.AsyncOpenAI] = []

    def _connect(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_SECONDS))

    async def reconnect(self) -> None:
        """Close every connection of the tests to it; the next request opens a new one."""
        await self.session.close()
        self.session = self._connect()

    @property
    def log(self) -> str:
        """Standard output and standard error."""
        return self._log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def headers(self) -> dict[str, str]:
        """Headers of an administrator."""
        return {"Authorization": f"Bearer {self.key}"}

    @property
    def pid(self) -> int:
        """Process id of the server itself."""
        return self.process.pid

    def rss(self) -> int:
        """Resident bytes of the server process, without its engines."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def client(self, **options: Any) -> openai.AsyncOpenAI:
        """The official client, without retries of its own.

        It is closed with the server and no earlier: one that is collected as garbage closes descriptors late, when they
        belong to other connections already, which then hang.
        """
        given = {"base_url": f"{self.url}/v1", "api_key": self.key, "max_retries": 0, **options}
        self._clients.append(openai.AsyncOpenAI(**given))
        return self._clients[-1]

    async def disconnect(self) -> None:
        """Close every connection of the tests to it, for good."""
        await self.session.close()
        for client in self._clients:
            await client.close()

    def engine_pids(self, program: str = "forebay.engines.") -> list[int]:
        """Process ids of the engines themselves, not of their guards."""
        found = []
        for child in family(self.pid):
            line = command_line(child)
            if program in line and "guard.py " not in line:
                found.append(child.pid)
        return found

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events that it has logged so far; needs FOREBAY_LOG_FORMAT=json."""
        lines = [line for line in self.log.splitlines() if line.startswith("{") and line.endswith("}")]
        return [json.loads(line) for line in lines]

    def named(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The logged events by that name with these fields."""
        return [
            found
            for found in self.events
            if found["event"] == event and all(found.get(key) == value for key, value in fields.items())
        ]

    def guard_pid(self, model: str = "fake") -> int:
        """Process id of the guard of the engine of `model` that was started last; needs the JSON log."""
        return int(self.named("engine.starting", model=model)[-1]["pid"])

    def engine_pid(self, model: str = "fake") -> int:
        """Process id of the engine of `model` that was started last; needs the JSON log."""
        return int(psutil.Process(self.guard_pid(model)).children()[0].pid)

    def family(self) -> list[psutil.Process]:
        """Every process that it has started, directly or not."""
        return family(self.pid)

    async def create_key(self, project: str, role: str = "member", *options: str) -> str:
        """A new key of `project`, made by the command line with further options beside the running server."""
        command = (sys.executable, "-m", "forebay.cli", "keys", "create", "--project", project, "--role", role)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("FOREBAY_")}
        process = await asyncio.create_subprocess_exec(
            *command, *options, "--data-dir", str(self.folder / "data"),
            env=inherited, cwd=self.folder, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        plain, _ = await process.communicate()
        assert process.returncode == 0
        return plain.decode().strip()

    async def post(self, path: str, key: str | None = None) -> tuple[int, dict[str, Any]]:
        """POST nothing to `path` as administrator, or with another key; status and JSON."""
        headers = {"Authorization": f"Bearer {key or self.key}"}
        async with self.session.post(self.url + path, headers=headers) as response:
            return response.status, await response.json()

    async def chat(self, text: str, *, model: str = "fake", stream: bool = False, **fields: Any) -> Any:
        """POST /v1/chat/completions; the response, to be used as a context manager."""
        return await self.send(chat_body(text, model=model, stream=stream, **fields))

    async def send(self, body: dict[str, Any], **headers: str) -> Any:
        """POST `body` to /v1/chat/completions with further headers."""
        url = f"{self.url}/v1/chat/completions"
        return await self.session.post(url, json=body, headers={**self.headers, **headers})

    async def get(self, path: str) -> Any:
        """GET `path` as administrator; the parsed JSON."""
        async with self.session.get(self.url + path, headers=self.headers) as response:
            return await response.json()

    async def model(self, name: str = "fake") -> dict[str, Any]:
        """What the admin API says of a model."""
        found: dict[str, Any] = await self.get(f"/admin/models/{name}")
        return found

    async def load(self, model: str = "fake") -> tuple[int, int]:
        """Places in use and requests in line."""
        found = await self.model(model)
        return found["running"], found["waiting"]

    async def until_load(self, running: int, waiting: int, model: str = "fake", within_seconds: float = 10) -> None:
        """Wait until just so many run and wait."""

        async def reached() -> bool:
            return await self.load(model) == (running, waiting)

        await eventually(reached, within_seconds=within_seconds, what=f"{running} running and {waiting} waiting")

    async def metric(self, name: str, **labels: str) -> float:
        """The value of one sample of /metrics; 0 if there is none."""
        async with self.session.get(f"{self.url}/metrics", headers=self.headers) as response:
            text = await response.text()
        for line in text.splitlines():
            match = re.fullmatch(rf"{re.escape(name)}(?:\{{(.*)\}})? (\S+)", line)
            if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
                return float(match[2])
        return 0.0

    async def ready(self) -> bool:
        """Whether /ready says so."""
        try:
            async with self.session.get(f"{self.url}/ready") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    async def stop(self, number: int = signal.SIGTERM, within_seconds: float = 35.0) -> int:
        """Send a signal and wait for the end; the exit status."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(within_seconds):
            return await self.process.wait()


@asynccontextmanager
async def serving(
    config: str = FAKE,
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    wait: bool = True,
) -> AsyncIterator[Server]:
    """A server on a free port with `config`, ready unless `wait` is false; it is gone after the block."""
    with tempfile.TemporaryDirectory() as scratch:
        home = folder or Path(scratch)
        (home / "forebay.toml").write_text(config, encoding="utf-8")
        log_file = home / "server.log"
        server = await _start(home, log_file, environment or {})
        try:
            await eventually(lambda: _address(server), within_seconds=DEADLINE_SECONDS, what="the server's address")
            if wait:
                await eventually(server.ready, within_seconds=DEADLINE_SECONDS, what=f"readiness of {server.url}")
            yield server
        finally:
            await server.disconnect()
            if server.process.returncode is None:
                server.process.kill()
            await server.process.wait()


@asynccontextmanager
async def serving_well(config: str) -> AsyncIterator[Server]:
    """The same, and the log has no word of a bug of ours in the end."""
    async with serving(config) as server:
        yield server
        assert "request.bug" not in server.log
        assert "Traceback" not in server.log


async def _start(home: Path, log_file: Path, environment: Mapping[str, str]) -> Server:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("FOREBAY_")}
    settings = {"FOREBAY_PORT": "0", "FOREBAY_DATA_DIR": str(home / "data"), "FOREBAY_ADMIN_KEY": ADMIN_KEY}
    with log_file.open("wb") as log:  # one log for each start: the address in it is that of this one
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "forebay.cli", "serve", "--config", str(home / "forebay.toml")),
            env={**inherited, "PYTHONUNBUFFERED": "1", **settings, **environment},
            stdout=log,
            stderr=log,
        )
    return Server(process, home, log_file)


def _address(server: Server) -> bool:
    match = re.search(r"Forebay listens on (\S+)", server.log)
    if match:
        server.url = match[1]
    if server.process.returncode is not None:
        message = f"the server ended with {server.process.returncode}:\n{server.log}"
        raise AssertionError(message)
    return bool(match)
