"""`forebay doctor`: what would keep the server from starting or make it slow, each with its remedy.

It refuses to mend anything, and looks at model libraries only through a child process.
"""

import asyncio
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from rich.filesize import decimal

from forebay.cli.options import EXIT_FAILED, ConfigFile, DataFolder, load_settings, look_into
from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.errors import SetupError
from forebay.model_config import AlignerModel, DiffusionModel, LlamaCppModel, Model, VllmModel
from forebay.replicas import gguf
from forebay.replicas.catalog import Catalog
from forebay.store.database import Database

_DESCRIBE_SECONDS = 60
_PYTHON_MIN = (3, 11)
_YEAR_2025 = 1_735_689_600  # seconds since 1970; a clock before it is not set
_SPARE_DESCRIPTORS = 128


class Mark(Enum):
    """How well it is: fine, worth knowing, or in the way of `forebay serve`."""

    GOOD = "✔"
    NOTE = "!"
    BAD = "✘"


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence, with the remedy in it if there is something to do."""

    mark: Mark
    sentence: str


def doctor(config_file: ConfigFile = None, data_dir: DataFolder = None) -> None:
    """Look at this machine and the configuration; status 1 if something would stop `forebay serve`."""
    failed = False
    for finding in _examine(config_file, data_dir):
        failed = failed or finding.mark is Mark.BAD
        _show(finding)
    if failed:
        raise typer.Exit(EXIT_FAILED)


def _show(finding: Finding) -> None:
    colors = {Mark.GOOD: typer.colors.GREEN, Mark.NOTE: typer.colors.YELLOW, Mark.BAD: typer.colors.RED}
    plain = not sys.stdout.isatty()
    mark = {Mark.GOOD: "ok", Mark.NOTE: "note", Mark.BAD: "BAD"}[finding.mark] if plain else finding.mark.value
    shown = f"{mark:<5}" if plain else typer.style(f"{mark} ", fg=colors[finding.mark])
    typer.echo(shown + finding.sentence)


def _examine(config_file: Path | None, data_dir: Path | None) -> Iterator[Finding]:
    yield from _system()
    try:
        settings = load_settings(config_file, data_dir=data_dir)
        catalog = Catalog(settings)
    except SetupError as error:
        yield Finding(Mark.BAD, str(error))
        return
    yield Finding(Mark.GOOD, f"The configuration is valid; the catalogue has {len(catalog.names())} models.")
    checks: tuple[Callable[[Settings, Catalog], Iterator[Finding]], ...] = (
        _folders, _database, _port, _llama_cpp, _vllm, _extras, _models, _descriptors,
    )  # fmt: skip
    for check in checks:
        yield from check(settings, catalog)


def _system() -> Iterator[Finding]:
    python, system = platform.python_version(), f"{platform.system()} {platform.machine()}"
    if sys.version_info < _PYTHON_MIN:
        yield Finding(Mark.BAD, f"Python {python} is too old. Install Python 3.11 or newer.")
    elif sys.platform == "win32":
        yield Finding(Mark.BAD, "Windows is not supported. Use Linux, macOS or WSL.")
    else:
        yield Finding(Mark.GOOD, f"Python {python} on {system}, {os.cpu_count()} cores.")
    if SystemClock().now() < _YEAR_2025:
        yield Finding(Mark.NOTE, "The clock is years behind, so expiry of keys and TLS go wrong. Set it (NTP).")


def _folders(settings: Settings, _catalog: Catalog) -> Iterator[Finding]:
    for noun, folder in (("data", settings.data_dir), ("models", settings.models_folder)):
        place = _nearest(folder)
        if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
            remedy = f"Give it to the user that runs the server, or set FOREBAY_{noun.upper()}_DIR."
            yield Finding(Mark.BAD, f"The {noun} folder {folder} cannot be written. {remedy}")
            continue
        free = shutil.disk_usage(place).free
        state = "is writable" if place == folder else "will be made at the first start"
        yield Finding(Mark.GOOD, f"The {noun} folder {folder} {state}; {decimal(free)} are free.")


def _nearest(folder: Path) -> Path:
    """The folder or, where none can be seen, the next one above it."""
    while not os.path.exists(folder) and folder != folder.parent:  # unlike pathlib, it says no where it may not look
        folder = folder.parent
    return folder


def _database(settings: Settings, _catalog: Catalog) -> Iterator[Finding]:
    try:
        if settings.database_url is None:
            look_into(settings.data_dir)
            if not os.path.exists(settings.data_dir / "forebay.db"):
                yield Finding(Mark.GOOD, "There is no database yet; the first start makes one.")
                return
        asyncio.run(_open(settings))
    except SetupError as error:
        yield Finding(Mark.BAD, str(error))
        return
    yield Finding(Mark.GOOD, "The database opens, and its schema is this version's.")


async def _open(settings: Settings) -> None:
    database = await Database.open(settings)
    await database.close()


def _port(settings: Settings, _catalog: Catalog) -> Iterator[Finding]:
    where = f"{settings.host}:{settings.port}"
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.host, settings.port))
            probe.listen(1)
    except OSError as error:
        owner = _owner(settings.port)
        taken = f"It is taken by {owner}. Stop that" if owner else f"{error.strerror or error}. Free it"
        yield Finding(Mark.BAD, f"The server cannot listen on {where}: {taken}, or choose another with --port.")
        return
    yield Finding(Mark.GOOD, f"{where} is free.")


def _owner(port: int) -> str | None:
    """The process that listens on `port`, as far as this user may see; Linux only."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in _lines(Path(table))[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*") if inodes else ():
        try:
            if not inodes & {os.readlink(descriptor) for descriptor in (process / "fd").iterdir()}:
                continue
            said = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # another user's, or it has ended meanwhile
            continue
        return f"process {process.name} ({said[:80]})"
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _llama_cpp(_settings: Settings, catalog: Catalog) -> Iterator[Finding]:
    """Which devices the installed llama.cpp has, beside those that the machine has."""
    wanted = any(isinstance(catalog.get(name), LlamaCppModel) for name in catalog.names())
    said = _describe()
    if said is None:
        mark = Mark.BAD if wanted else Mark.NOTE
        yield Finding(
            mark, "llama.cpp (xllamacpp) cannot be loaded here. Install it again: `pip install -U xllamacpp`."
        )
        return
    devices = [device for device in said["devices"] if device["type"] != "CPU"]
    listing = ", ".join(f"{device['name']} ({device['description']}, {_memory(device)})" for device in said["devices"])
    yield Finding(Mark.GOOD, f"llama.cpp (xllamacpp {said['version']}) has {listing or 'the CPU'}.")
    gpu = _gpu()
    if gpu is not None and not devices:
        kind, variant = gpu
        yield Finding(
            Mark.NOTE,
            f"This machine has {kind}, but the installed xllamacpp is its CPU build. Install its {variant} build in the "
            "place of this one; the project page of xllamacpp says from where.",
        )
    elif gpu is None and not devices:
        yield Finding(Mark.NOTE, "No GPU was found, so models run on the CPU. Choose small ones.")


def _memory(device: dict[str, Any]) -> str:
    return f"{decimal(int(device['memory_free']))} of {decimal(int(device['memory_total']))} free"


def _describe() -> dict[str, Any] | None:
    """What the engine's own program says of its library; None if it cannot be loaded."""
    command = (sys.executable, "-P", "-m", "forebay.engines.llama_cpp", "--describe")
    try:
        answer = subprocess.run(command, capture_output=True, timeout=_DESCRIBE_SECONDS, check=True)
        said: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError):
        return None
    return said


def _gpu() -> tuple[str, str] | None:
    """A GPU of this machine in words, and the build that uses it."""
    if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
        return "an NVIDIA GPU", "CUDA"
    if Path("/dev/kfd").exists():
        return "an AMD GPU", "ROCm (or Vulkan)"
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "Apple's GPU", "Metal"
    if any(Path("/dev/dri").glob("renderD*")):
        return "a GPU", "Vulkan"
    return None


def _vllm(_settings: Settings, catalog: Catalog) -> Iterator[Finding]:
    users = [name for name in catalog.names() if isinstance(catalog.get(name), VllmModel)]
    if shutil.which("vllm") is not None or importlib.util.find_spec("vllm") is not None:
        yield Finding(Mark.GOOD, "vLLM is installed.")
    elif users:
        mark = Mark.BAD if any(catalog.get(name).preload for name in users) else Mark.NOTE
        yield Finding(mark, f"vLLM is not installed, and {', '.join(users)} needs it: `pip install 'forebay[vllm]'`.")
    else:
        yield Finding(Mark.GOOD, "vLLM is not installed; no model needs it.")


def _extras(_settings: Settings, catalog: Catalog) -> Iterator[Finding]:
    """The engines that are installed only where somebody asks for them."""
    models = {name: catalog.get(name) for name in catalog.names()}
    for extra, package in {"pocketsphinx": "pocketsphinx", "diffusion": "diffusers"}.items():
        users = [name for name, model in models.items() if _extra_of(model) == extra]
        if users and importlib.util.find_spec(package) is None:
            mark = Mark.BAD if any(models[name].preload for name in users) else Mark.NOTE
            remedy = f"`pip install 'forebay[{extra}]'`"
            yield Finding(mark, f"{package} is not installed, and {', '.join(users)} needs it: {remedy}.")


def _extra_of(model: Model) -> str | None:
    match model:
        case AlignerModel(options=aligner) if aligner.backend == "pocketsphinx":
            return "pocketsphinx"
        case DiffusionModel():
            return "diffusion"
        case _:
            return None


def _models(settings: Settings, catalog: Catalog) -> Iterator[Finding]:
    try:
        look_into(settings.models_folder)
    except SetupError as error:
        yield Finding(Mark.BAD, str(error))
        return
    names = [name for name in catalog.names() if catalog.needs_file(name)]
    here = [name for name in names if catalog.present(name)]
    for name in here:
        yield from _file(catalog, name)
    missing = [name for name in names if catalog.get(name).preload and name not in here]
    for name in missing:
        if settings.pull.auto:
            sentence = (
                f"{name} is loaded at start and not here, so the start pulls it. `forebay models pull` does it now."
            )
            yield Finding(Mark.NOTE, sentence)
        else:
            yield Finding(Mark.BAD, f"{name} is loaded at start and not here. Run `forebay models pull {name}`.")
    needed = sum(catalog.size_bytes(name) or 0 for name in missing) + settings.pull.free_bytes_min
    if missing and shutil.disk_usage(_nearest(settings.models_folder)).free < needed:
        sentence = f"The models folder needs {decimal(needed)} of free space for {', '.join(missing)}. Make room there."
        yield Finding(Mark.BAD, sentence)
    if not here and not missing and names:
        yield Finding(Mark.NOTE, "No model file is here yet. `forebay models list` shows what there is to pull.")


def _file(catalog: Catalog, name: str) -> Iterator[Finding]:
    """A model file, as far as a look at its size and its header tells."""
    model, path = catalog.get(name), catalog.path(name)
    mark = Mark.BAD if model.preload else Mark.NOTE
    remedy = f"Run `forebay models remove {name}` and pull it again."
    size = path.stat().st_size if os.path.isfile(path) else None
    if size is not None and model.size_bytes is not None and size != model.size_bytes:
        yield Finding(mark, f"{name} has {size} bytes instead of {model.size_bytes}. {remedy}")
        return
    try:
        if catalog.is_gguf(name):
            gguf.check(path)
    except SetupError as error:
        yield Finding(mark, f"{name} is damaged. {error} {remedy}")
        return
    shown = "" if size is None else f" ({decimal(size)})"
    yield Finding(Mark.GOOD, f"{name} is here{shown}. `forebay models verify` compares its checksum.")


def _descriptors(settings: Settings, catalog: Catalog) -> Iterator[Finding]:
    import resource  # noqa: PLC0415  # there is none on Windows

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    models = [catalog.get(name) for name in catalog.names()]
    needed = settings.http.connections_max + sum(model.slots for model in models) + _SPARE_DESCRIPTORS
    if limit == resource.RLIM_INFINITY or limit >= needed:
        yield Finding(Mark.GOOD, f"{settings.http.connections_max} connections fit into the limit of open files.")
    else:
        yield Finding(
            Mark.NOTE,
            f"The limit of open files is {limit}, and {settings.http.connections_max} connections and their engines take "
            f"up to {needed}. Raise it (`ulimit -n {needed}`), or lower http.connections_max.",
        )
