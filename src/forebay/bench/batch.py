"""What a batch costs: handing in the largest one (P9), and running one beside the engine driven directly (P6).

It refuses to count a line before its batch has ended, and to start one clock before the other side is at rest.
"""

import asyncio
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic_core import to_json

from forebay.bench.caller import ENDED, Caller, calling
from forebay.bench.report import Measure, Report
from forebay.bench.stage import Stage, cpu_seconds, literal, staged
from forebay.bench.wire import now
from forebay.clock import seeded
from forebay.errors import SetupError
from forebay.model_config import FakeModel

_MODEL = "fake"
_SLOTS = 32
_TOKENS = (4, 28)
_TOKENS_PER_SECOND = 100
_TRIVIAL = "[[fake tokens=1]]"
_ENDPOINT = "/v1/chat/completions"
_FILE_BYTES_MAX = 200 * 2**20
_LINE_BYTES = 4194  # as long as 50,000 lines of one file may be
_MEMORY = re.compile(r"^(VmHWM|VmRSS):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Size:
    """How much to measure for each seed."""

    lines_handed_in: int
    lines_run: int


def measures() -> dict[str, Measure]:
    """What a run fills in."""
    found = [
        Measure("P9", "accepted: upload and create", "s", floor=10, goal=3),
        Measure("P9", "from created to in progress: checked and cut into chunks", "s"),
        Measure("P9", "memory that the server took for it at most", "MB", floor=100),
        Measure("P9", "memory of the server before", "MB"),
        Measure("P6", "lines per second, batch / direct", "", floor=0.95, goal=1.2, more_is_better=True),
        Measure("P6", "lines per second in a batch", "/s"),
        Measure("P6", "lines per second straight to the engine", "/s"),
        Measure("P6", "lines of one token per second in a batch", "/s"),
        Measure("P6", "CPU of the server for such a line", "ms"),
    ]
    return {measure.name: measure for measure in found}


async def run(database_url: str | None, seeds: int, size: Size, say: Callable[[str], None]) -> Report:
    """Measure everything once for each seed, each with a new server, on SQLite or on `database_url`."""
    report = Report("batch-sqlite" if database_url is None else "batch-postgres", seeds, measures())
    model = FakeModel(engine="fake", slots=_SLOTS)
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        large = Path(folder) / "large.jsonl"
        await asyncio.to_thread(_write_lines, large, _large(size.lines_handed_in))
        for seed in range(1, seeds + 1):
            async with (
                staged(_MODEL, model, None, _settings(database_url)) as stage,
                calling(stage.url, stage.key, _ENDPOINT) as caller,
            ):
                say(f"seed {seed}: hand in {size.lines_handed_in} lines, {_bytes(large) / 1e6:.0f} MB")
                await _hand_in(stage, caller, large, report)
                say(f"seed {seed}: run {size.lines_run} lines")
                await _run_both(stage, caller, Path(folder), size, seed, report)
                await _run_trivial(stage, caller, Path(folder), size, report)
    report.notes += [
        "The clock of a batch runs from its creation to its end: with the check of its file and the joining of its results.",
        f"The engine has {_SLOTS} slots of {_TOKENS_PER_SECOND} tokens/s, and lines of {_TOKENS[0]} to {_TOKENS[1]} tokens.",
        f"Directly it is driven with {_SLOTS} connections. It has no prompt cache to win with.",
        "Memory is the highest that the kernel has seen (VmHWM) less what was resident before, without the engine.",
        "Client, server and engines share the machine's cores.",
    ]
    return report


def _settings(database_url: str | None) -> str:
    where = "" if database_url is None else f"database_url = {literal(database_url)}\n"
    return f"""
default_models = false
{where}
[models.{_MODEL}]
engine = "fake"
preload = true
slots = {_SLOTS}
"""


# Handing in.


async def _hand_in(stage: Stage, caller: Caller, path: Path, report: Report) -> None:
    before = _memory(stage.server_pid)["VmRSS"]
    began = now()
    file_id = await caller.upload(path)
    batch_id = await caller.create(file_id)
    accepted = now()
    batch = await caller.until(batch_id, ENDED | {"in_progress"})
    checked = now()
    most = _memory(stage.server_pid)["VmHWM"]
    await caller.cancel(batch_id)
    await caller.until(batch_id, ENDED)
    report.count(["" if batch["status"] == "in_progress" else f"a large batch was {batch['status']}"])
    report.add("accepted: upload and create", accepted - began)
    report.add("from created to in progress: checked and cut into chunks", checked - accepted)
    report.add("memory that the server took for it at most", (most - before) / 1e6)
    report.add("memory of the server before", before / 1e6)


def _memory(pid: int) -> dict[str, int]:
    """Bytes that a process has in memory, now and at most."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        raise SetupError("Memory of a process can be read on Linux only. Leave P9 to a Linux machine.") from None
    return {name: int(kilobytes) * 1024 for name, kilobytes in _MEMORY.findall(status)}


def _large(count: int) -> Iterator[bytes]:
    for number in range(count):
        empty = _line(number, f"{number} {_TRIVIAL} ")
        yield _line(number, f"{number} {_TRIVIAL} " + "x" * (_LINE_BYTES - len(empty)))


# Running.


async def _run_both(stage: Stage, caller: Caller, folder: Path, size: Size, seed: int, report: Report) -> None:
    chance = seeded(seed)
    texts = [
        f"{seed} {number} [[fake tokens={chance.randint(*_TOKENS)} rate={_TOKENS_PER_SECOND}]]"
        for number in range(size.lines_run)
    ]
    half = len(texts) // 2  # the engine by itself before and after the batch: both see the same machine on average
    direct = await _run_direct(stage, texts[:half], report)
    through = await _run_batch(caller, folder, texts, report)
    direct += await _run_direct(stage, texts[half:], report)
    report.add("lines per second, batch / direct", direct / through)
    report.add("lines per second in a batch", len(texts) / through)
    report.add("lines per second straight to the engine", len(texts) / direct)


async def _run_trivial(stage: Stage, caller: Caller, folder: Path, size: Size, report: Report) -> None:
    cpu = cpu_seconds(stage.server_pid)
    texts = [f"{number} {_TRIVIAL}" for number in range(size.lines_run)]
    seconds = await _run_batch(caller, folder, texts, report)
    report.add("lines of one token per second in a batch", len(texts) / seconds)
    report.add("CPU of the server for such a line", 1000 * (cpu_seconds(stage.server_pid) - cpu) / len(texts))


async def _run_direct(stage: Stage, texts: list[str], report: Report) -> float:
    """Seconds that the engine alone takes with all its slots in use."""
    requests = [stage.engine.request(text, 64, stream=True) for text in texts]
    troubles: list[str] = []

    async def connection() -> None:
        while requests:
            troubles.append((await stage.engine.ask(requests.pop())).trouble)

    began = now()
    await asyncio.gather(*(connection() for _ in range(_SLOTS)))
    report.count(troubles)
    return now() - began


async def _run_batch(caller: Caller, folder: Path, texts: list[str], report: Report) -> float:
    """Seconds that a batch takes from its creation to its end."""
    path = folder / "lines.jsonl"
    await asyncio.to_thread(_write_lines, path, (_line(number, text) for number, text in enumerate(texts)))
    file_id = await caller.upload(path)
    began = now()
    batch = await caller.until(await caller.create(file_id), ENDED)
    seconds = now() - began
    done: int = batch["request_counts"]["completed"]
    report.count([""] * done + [f"a line of a batch that was {batch['status']}"] * (len(texts) - done))
    return seconds


def _line(number: int, text: str) -> bytes:
    body = {"model": _MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 64}
    return to_json({"custom_id": f"line-{number}", "method": "POST", "url": _ENDPOINT, "body": body}) + b"\n"


def _write_lines(path: Path, lines: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(lines)
    if _bytes(path) > _FILE_BYTES_MAX:
        raise SetupError("The input file would be larger than a server accepts. Measure with fewer lines.")


def _bytes(path: Path) -> int:
    return path.stat().st_size
