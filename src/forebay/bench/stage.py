"""The two sides of a measurement: a server of its own, and an engine driven directly.

It refuses to measure anything that it has not started itself.
"""

import asyncio
import itertools
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import aiohttp
from pydantic_core import to_json

import forebay
from forebay import config
from forebay.bench.processes import ended
from forebay.bench.wire import Target
from forebay.clock import new_token
from forebay.config import Settings
from forebay.dialects.openai.call import Context, parse
from forebay.dialects.openai.chat import ChatBody, chat_call
from forebay.errors import SetupError
from forebay.model_config import Model, ModelSettings
from forebay.replicas.catalog import Catalog
from forebay.replicas.commands import command_for, traits_of
from forebay.replicas.local_launcher import LocalLauncher

_GUARD = Path(forebay.__file__).parent / "engines" / "guard.py"
_START_SECONDS = 120.0
_STOP_SECONDS = 40.0
_POLL_SECONDS = 0.05
_LOG_LINES = 50
_SHOWN_LINES = 10
_TICKS_PER_SECOND = 100  # of /proc, on every Linux

ModelT = TypeVar("ModelT", bound=ModelSettings)
ToBody = Callable[[str, int, bool], bytes]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What is asked of both sides: where, which field of the usage counts, and the body of a prompt on each."""

    path: str
    counted: str
    for_server: Callable[[str], ToBody]
    for_engine: Callable[[str, Model], ToBody]


@dataclass(frozen=True, slots=True)
class Stage:
    """Both sides, ready."""

    server: Target
    engine: Target
    url: str  # of the server
    key: str
    server_pid: int
    engine_pids: tuple[int, ...]
    engine_url: str  # of the engine that is driven directly
    engine_key: str


@asynccontextmanager
async def staged(
    name: str, model: Model, path: Path | None, settings: str, endpoint: Endpoint | None = None
) -> AsyncIterator[Stage]:
    """Start a server with `settings` (TOML) and, beside it, an engine as the server would; stop both at the end.

    Both are asked for chat unless `endpoint` says otherwise.
    """
    asked = endpoint or CHAT
    async with AsyncExitStack() as stack:
        engine_url, engine_key, engine_pid = await stack.enter_async_context(_engine(name, model, path))
        server_url, server_key, server_pid = await stack.enter_async_context(served(settings))
        server = Target(
            "through", server_url, server_key, asked.for_server(name), path=asked.path, counted=asked.counted
        )
        alive = traits_of(model).reuses_connections
        to_engine = asked.for_engine(name, model)
        said = "direct", engine_url, engine_key, to_engine
        engine = Target(*said, keeps_alive=alive, path=asked.path, counted=asked.counted)
        stack.callback(server.close)
        stack.callback(engine.close)
        pids = (engine_pid, _child_of(_child_of(server_pid)))
        yield Stage(server, engine, server_url, server_key, server_pid, pids, engine_url, engine_key)


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used, without its children."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        raise SetupError("CPU time of a process can be read on Linux only. Leave P3 to a Linux machine.") from None
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


@asynccontextmanager
async def _engine(name: str, model: Model, path: Path | None) -> AsyncIterator[tuple[str, str, int]]:
    key = new_token(32)
    launcher = LocalLauncher(config.environment(), _LOG_LINES, 2048)
    process = await launcher.launch(command_for(name, model, model.slots, path, key, 0), lambda _line: None)
    try:
        async with asyncio.timeout(_START_SECONDS):
            address = await process.address()
            await _until_ok(f"{address}/health")
        yield address, key, _child_of(process.pid)
    finally:
        process.kill()
        await process.wait()


def _child_of(pid: int) -> int:
    """The child that a process has (a server its guard, a guard its engine); itself where that cannot be seen."""
    try:
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()[0])
    except (OSError, IndexError):
        return pid


def of_engine(settings: Settings, name: str, kind: type[ModelT]) -> tuple[ModelT, Path]:
    """A model that is to be of this kind, and where it is. Raises SetupError."""
    model = Catalog(settings).get(name)
    if not isinstance(model, kind):
        (engine,) = get_args(kind.model_fields["engine"].annotation)
        raise SetupError(f"{name} has another engine than {engine}. Name a model of that engine.")
    return model, place_of(settings, name)


def place_of(settings: Settings, name: str) -> Path:
    """Where the files of a model are. Raises SetupError where they are not."""
    catalog = Catalog(settings)
    if not catalog.present(name):
        raise SetupError(f"{name} is not here. Pull it with `forebay models pull {name}`.")
    return catalog.path(name)


def config_of(models: Mapping[str, Model], *more: str) -> str:
    """The settings of a server (TOML) that has these models alone, loaded; `more` are lines in front of them."""
    return "\n".join(["default_models = false", *more, *itertools.starmap(_table, models.items())]) + "\n"


def _table(name: str, model: Model) -> str:
    lines = [
        f"[models.{literal(name)}]",
        f"engine = {literal(model.engine)}",
        *([] if model.source is None else [f"source = {literal(model.source)}"]),
        "preload = true",
        f"slots = {model.slots}",
        f"batch_replicas = {model.batch_replicas}",
        f"queue_places = {model.queue_places}",
        f"[models.{literal(name)}.options]",
        *(
            f"{key} = {literal(value)}"
            for key, value in model.options.model_dump(mode="json", exclude_none=True).items()
        ),
    ]
    return "\n".join(lines)


def literal(value: Any) -> str:
    """A value in TOML, which writes texts, numbers, truths and lists as JSON does, and tables nearly so."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)} = {literal(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return to_json(value).decode()


@asynccontextmanager
async def served(settings: str) -> AsyncIterator[tuple[str, str, int]]:
    """Start a server with `settings` (TOML) in a folder of its own: its address, its key and its process."""
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as name:
        folder = Path(name)
        (folder / "forebay.toml").write_text(settings, encoding="utf-8")
        async with _server(folder) as server:
            yield server


@asynccontextmanager
async def _server(folder: Path) -> AsyncIterator[tuple[str, str, int]]:
    key = new_token(32)
    kept = {name: value for name, value in config.environment().items() if not name.startswith("FOREBAY_")}
    environment = {"FOREBAY_PORT": "0", "FOREBAY_DATA_DIR": str(folder / "data"), "FOREBAY_ADMIN_KEY": key}
    log = folder / "server.log"
    with log.open("wb") as lines:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(_GUARD), "--"),
            *(sys.executable, "-m", "forebay.cli", "serve", "--config", str(folder / "forebay.toml")),
            env={**kept, **environment, "PYTHONUNBUFFERED": "1"},
            stdin=asyncio.subprocess.PIPE,  # the guard's leash: the server ends with this program, however that ends
            stdout=lines,
            stderr=lines,
            start_new_session=True,
        )
    try:
        async with asyncio.timeout(_START_SECONDS):
            url = await _address(process, log)
            await _until_ok(f"{url}/ready")
        yield url, key, _child_of(process.pid)
    except TimeoutError:
        raise SetupError(f"The server was not ready in time:\n{_last_lines(log)}") from None
    finally:
        if process.returncode is None:
            process.terminate()
        await ended(process, _STOP_SECONDS)


async def _address(process: asyncio.subprocess.Process, log: Path) -> str:
    while True:
        said = re.search(r"Forebay listens on (\S+)", _text(log))
        if said:
            return said[1]
        if process.returncode is not None:
            raise SetupError(f"The server ended with status {process.returncode}:\n{_last_lines(log)}")
        await asyncio.sleep(_POLL_SECONDS)


def _last_lines(log: Path) -> str:
    return "\n".join(_text(log).splitlines()[-_SHOWN_LINES:])


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


async def _until_ok(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(_POLL_SECONDS)


def _chat_body(name: str, prompt: str, tokens: int, *, stream: bool) -> bytes:
    body = {"model": name, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0.0}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return to_json(body)


def _for_server(name: str) -> ToBody:
    return lambda prompt, tokens, stream: _chat_body(name, prompt, tokens, stream=stream)


def _for_engine(name: str, model: Model) -> ToBody:
    """What the server makes of the same body: the engine is asked in the same bytes either way."""
    context = Context("req_bench", "bench", None, model.max_tokens, model.slots)

    def body(prompt: str, tokens: int, stream: bool) -> bytes:
        asked = parse(ChatBody, _chat_body(name, prompt, tokens, stream=stream))
        return chat_call(asked, context).request.body

    return body


CHAT = Endpoint("/v1/chat/completions", "completion_tokens", _for_server, _for_engine)
