"""Embeddings of the default model: beside sentence-transformers, beside a large request, and as lines of a batch (P11).

It refuses to let anything be remembered: the server keeps no vectors, so that every text is computed.
"""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from pydantic_core import to_json

from forebay.bench.caller import ENDED, Caller, calling
from forebay.bench.reference import Reference, referring
from forebay.bench.report import Measure, Report, percentile
from forebay.bench.stage import Endpoint, Stage, config_of, cpu_seconds, literal, of_engine, staged
from forebay.bench.wire import Reply, Target, now
from forebay.clock import Random, seeded
from forebay.config import Settings
from forebay.dialects.openai.embeddings import PATH
from forebay.model_config import OnnxModel

_MODEL = "all-minilm-l6-v2"
_CLIENTS = 64
_TEXT_WORDS = (8, 200)
_PASSAGE_WORDS = (8, 64)  # of a large request and of the lines of a batch
_SHORT = "How do I set a new password?"
_WARM_UP_TEXTS = 128
_OUTLIERS = 0.99
_HEADROOM_SECONDS = 1.0
_VOCABULARY = (
    "a and as at because before but by for from if in is it not of on or so than that the their then this to was when "
    "which while will with account agreement aluminium answer apartment approximately autumn balance bicycle bridge "
    "budget calendar cathedral climate committee concert contract customer deadline delivery department diagnosis "
    "electricity engine evidence experiment family forecast garden government harbour holiday hospital insurance invoice "
    "island journal kitchen laboratory language lighthouse machine market measurement medicine mountain museum "
    "neighbourhood newspaper orchestra password patient permission photograph physics postcode president quarter railway "
    "receipt refund region reservation river satellite schedule semiconductor signature storm subscription summary "
    "teacher temperature ticket translation university vegetable village warehouse weather window writer arrived asked "
    "built carried changed described explained found growing heavier known later measured opened paid quickly read "
    "replaced returned seldom slowly spoken twelve usually visited warmer written 7 19 42 1984 2,500 3.5"
)


@dataclass(frozen=True, slots=True)
class Size:
    """How much to measure for each seed: texts in each of the rounds, of a large request, short ones alone, lines."""

    rounds: int
    texts: int
    inputs: int
    shorts: int
    lines: int


FULL = Size(2, 384, 2048, 400, 10_000)
QUICK = Size(2, 16, 64, 10, 40)


def measures(size: Size) -> dict[str, Measure]:
    """What a run fills in."""
    found = [
        Measure("P11", "tokens per second, through / sentence-transformers", "", [], 1, 2, more_is_better=True),
        Measure("P11", f"tokens per second through, {_CLIENTS} clients", "/s"),
        Measure("P11", "tokens per second by sentence-transformers", "/s"),
        Measure("P11", f"tokens per second direct, {_CLIENTS} clients", "/s"),
        Measure("P11", "tokens per second, through / direct", ""),
        Measure("P11", f"p50 through, {_CLIENTS} clients", "ms"),
        Measure("P11", f"p99 through, {_CLIENTS} clients", "ms"),
        Measure("P11", "CPU of the server for a text", "ms"),
        Measure("P11", "texts in a batch of the engine", ""),
        Measure("P11", "share of padding in the engine's batches", ""),
        Measure("P11", f"a short text beside {size.inputs} inputs / alone, p99", "", floor=5),
        Measure("P11", f"a short text beside {size.inputs} inputs / alone, p50", ""),
        *(Measure("P11", f"a short text {where}, {share}", "ms") for where in _WHERE for share in ("p50", "p99")),
        Measure("P11", "lines per second, batch / online", "", floor=0.9, more_is_better=True),
        Measure("P11", "lines per second in a batch", "/s"),
        Measure("P11", f"lines per second online, {_CLIENTS} clients", "/s"),
        Measure("P11", "CPU of the server for a line of a batch", "ms"),
        Measure("P11", "CPU of the server for a line online", "ms"),
    ]
    return {measure.name: measure for measure in found}


_WHERE = ("alone", "beside the large request")


async def run(
    settings: Settings,
    reference_python: Path | None,
    database_url: str | None,
    seeds: int,
    size: Size,
    say: Callable[[str], None],
) -> Report:
    """Measure everything once for each seed on one server, with SQLite or `database_url`."""
    report = Report("embed-sqlite" if database_url is None else "embed-postgres", seeds, measures(size))
    model, path = _model(settings)
    async with (
        _reference(settings, reference_python, report, say) as reference,
        staged(_MODEL, model, path, _toml(model, database_url), _ENDPOINT) as stage,
        calling(stage.url, stage.key, PATH) as caller,
    ):
        await _online(stage.engine, _texts(0, _WARM_UP_TEXTS, _TEXT_WORDS))
        await _online(stage.server, _texts(0, _WARM_UP_TEXTS, _TEXT_WORDS))
        for seed in range(1, seeds + 1):
            say(f"seed {seed}: {size.rounds} rounds of {size.texts} texts")
            await _throughput(stage, reference, seed, size, report)
            say(f"seed {seed}: a short text beside {size.inputs} inputs")
            await _beside(stage, seed, size, report)
            say(f"seed {seed}: {size.lines} lines")
            await _lines(stage, caller, seed, size.lines, report)
    report.notes += [
        f"{_MODEL} with the settings of the catalogue, and no vectors kept. No text comes twice in one part.",
        "Texts of {} to {} words, in a large request and in lines {} to {}.".format(*_TEXT_WORDS, *_PASSAGE_WORDS),
        "Client, server, engines and sentence-transformers share the machine's cores; only one side works at a time.",
        f"Before a batch nobody is online for {_HEADROOM_SECONDS:g} s, after which no places are left free for them.",
        "The clock of a batch runs from its creation to its end: with the check of its file and the joining of its results.",
        "Batches and their padding are counted by the engine that is driven directly.",
    ]
    return report


def _model(settings: Settings) -> tuple[OnnxModel, Path]:
    """The model as it is run here. Raises SetupError."""
    model, path = of_engine(settings, _MODEL, OnnxModel)
    return model.model_copy(update={"source": f"file:{path}", "files": {}}), path


def _toml(model: OnnxModel, database_url: str | None) -> str:
    where = [] if database_url is None else [f"database_url = {literal(database_url)}"]
    nothing_kept = ["[embeddings]", "cache_bytes = 0", "[scheduler]", f"headroom_seconds = {_HEADROOM_SECONDS}"]
    return config_of({_MODEL: model}, *where, *nothing_kept)


@asynccontextmanager
async def _reference(
    settings: Settings, python: Path | None, report: Report, say: Callable[[str], None]
) -> AsyncIterator[Reference | None]:
    if python is None:
        report.notes.append("Not measured beside sentence-transformers: no `--reference-python` has it.")
        yield None
        return
    say("sentence-transformers: load, and find its fastest size of batch")
    async with referring(python, settings, _texts(0, _WARM_UP_TEXTS, _TEXT_WORDS)) as reference:
        report.notes.append(
            f"sentence-transformers runs the same model in 32-bit floats ({reference.versions}): it has all texts of a "
            f"round at once and sorts them, in batches of {reference.batch_size}, the fastest size here."
        )
        yield reference


def _texts(seed: int, count: int, words: tuple[int, int]) -> list[str]:
    chance = seeded(seed)
    return [text_of(chance, words) for _ in range(count)]


def text_of(chance: Random, words: tuple[int, int]) -> str:
    """Any text of so many words."""
    return " ".join(chance.choices(_VOCABULARY.split(), k=chance.randint(*words)))


def _body_for(name: str) -> Callable[[str, int, bool], bytes]:
    return lambda text, _tokens, _stream: _body(name, text)


def _body(name: str, content: str | Sequence[str]) -> bytes:
    return to_json({"model": name, "input": content, "encoding_format": "base64"})


_ENDPOINT = Endpoint(PATH, "prompt_tokens", _body_for, lambda name, _model: _body_for(name))


# Throughput.


@dataclass(slots=True)
class _Side:
    """What one side has done in all rounds."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


async def _throughput(stage: Stage, reference: Reference | None, seed: int, size: Size, report: Report) -> None:
    """Rounds on all sides in turns; each round gives all of them the same texts."""
    every, waits, cpu = _texts(seed, size.rounds * size.texts, _TEXT_WORDS), list[float](), 0.0
    before = await _figures(stage)
    sides = {"through": _Side(), "direct": _Side(), "reference": _Side()}
    for number in range(size.rounds):
        texts = every[number * size.texts : (number + 1) * size.texts]
        order = list(sides) if (number + seed) % 2 else list(reversed(sides))
        for name in order:
            side, started = sides[name], cpu_seconds(stage.server_pid)
            if name != "reference":
                tokens, seconds, replies = await _counted(getattr(stage, _TARGETS[name]), texts, report)
                waits += [reply.seconds for reply in replies] if name == "through" else []
                cpu += cpu_seconds(stage.server_pid) - started if name == "through" else 0.0
            elif reference is not None:
                tokens, seconds = await reference.encode(texts)
            else:
                continue
            side.tokens, side.seconds = side.tokens + tokens, side.seconds + seconds
    _add_rates(sides, report)
    report.add(f"p50 through, {_CLIENTS} clients", 1000 * percentile(waits, 0.5))
    report.add(f"p99 through, {_CLIENTS} clients", 1000 * percentile(waits, _OUTLIERS))
    report.add("CPU of the server for a text", 1000 * cpu / (size.rounds * size.texts))
    _add_batches(before, await _figures(stage), report)


_TARGETS = {"through": "server", "direct": "engine"}


def _add_rates(sides: dict[str, _Side], report: Report) -> None:
    through, direct, reference = sides["through"], sides["direct"], sides["reference"]
    report.add(f"tokens per second through, {_CLIENTS} clients", through.rate)
    report.add(f"tokens per second direct, {_CLIENTS} clients", direct.rate)
    report.add("tokens per second, through / direct", through.rate / direct.rate)
    if reference.tokens:
        report.count(["" if reference.tokens == through.tokens else "sentence-transformers read other tokens"])
        report.add("tokens per second by sentence-transformers", reference.rate)
        report.add("tokens per second, through / sentence-transformers", through.rate / reference.rate)


async def _figures(stage: Stage) -> dict[str, float]:
    """The metrics of the engine that is driven directly."""
    headers = {"Authorization": f"Bearer {stage.engine_key}"}
    async with (
        aiohttp.ClientSession(stage.engine_url, headers=headers) as session,
        session.get("/metrics") as answer,
    ):
        pairs = (line.split() for line in (await answer.text()).splitlines())
        return {name.removeprefix("forebay_engine_"): float(value) for name, value in pairs}


def _add_batches(before: dict[str, float], after: dict[str, float], report: Report) -> None:
    batches, items, tokens, padded = (
        after[name] - before[name] for name in ("batches_total", "items_total", "tokens_total", "padded_tokens_total")
    )
    report.add("texts in a batch of the engine", items / batches)
    report.add("share of padding in the engine's batches", 1 - tokens / padded)


async def _counted(target: Target, texts: Sequence[str], report: Report) -> tuple[int, float, list[Reply]]:
    replies, seconds = await _online(target, texts)
    report.count(reply.trouble for reply in replies)
    return sum(reply.tokens for reply in replies), seconds, replies


async def _online(target: Target, texts: Sequence[str]) -> tuple[list[Reply], float]:
    """All texts, one for each request, by so many clients; each sends its next when it has its answer."""
    requests, replies = [target.request(text, 0, stream=False) for text in texts], list[Reply]()

    async def client() -> None:
        while requests:
            replies.append(await target.ask(requests.pop()))

    began = now()
    await asyncio.gather(*(client() for _ in range(_CLIENTS)))
    return replies, now() - began


# A short text beside a large request.


async def _beside(stage: Stage, seed: int, size: Size, report: Report) -> None:
    request = stage.server.post(_body(_MODEL, _texts(seed, size.inputs, _PASSAGE_WORDS)))
    alone = await _shorts(stage.server, _awaited(size.shorts // 2))
    large = asyncio.create_task(stage.server.ask(request))
    beside = await _shorts(stage.server, large.done)
    alone += await _shorts(stage.server, _awaited(size.shorts - len(alone)))
    report.count(reply.trouble for reply in (*alone, *beside, await large))
    found = {}
    for where, replies in zip(_WHERE, (alone, beside), strict=True):
        for name, share in (("p50", 0.5), ("p99", _OUTLIERS)):
            found[where, name] = percentile([reply.seconds for reply in replies], share)
            report.add(f"a short text {where}, {name}", 1000 * found[where, name])
    for name in ("p50", "p99"):
        ratio = found[_WHERE[1], name] / found[_WHERE[0], name]
        report.add(f"a short text beside {size.inputs} inputs / alone, {name}", ratio)


def _awaited(count: int) -> Callable[[], bool]:
    """Whether it was asked so often."""
    left = iter(range(count - 1))
    return lambda: next(left, None) is None


async def _shorts(target: Target, enough: Callable[[], bool]) -> list[Reply]:
    """The short text again and again, at least once, until it is enough."""
    request, replies = target.request(_SHORT, 0, stream=False), list[Reply]()
    while True:
        replies.append(await target.ask(request))
        if enough():
            return replies


# Lines of a batch.


async def _lines(stage: Stage, caller: Caller, seed: int, count: int, report: Report) -> None:
    texts = _texts(seed, count, _PASSAGE_WORDS)
    half = count // 2  # online before and after the batch: both see the same machine on average

    async def online(part: Sequence[str]) -> float:
        return (await _counted(stage.server, part, report))[1]

    first, first_cpu = await _with_cpu(stage, online(texts[:half]))
    batch, batch_cpu = await _with_cpu(stage, _batch(caller, texts, report))
    last, last_cpu = await _with_cpu(stage, online(texts[half:]))
    report.add("lines per second, batch / online", (first + last) / batch)
    report.add("lines per second in a batch", count / batch)
    report.add(f"lines per second online, {_CLIENTS} clients", count / (first + last))
    report.add("CPU of the server for a line of a batch", 1000 * batch_cpu / count)
    report.add("CPU of the server for a line online", 1000 * (first_cpu + last_cpu) / count)


async def _with_cpu(stage: Stage, work: Coroutine[Any, Any, float]) -> tuple[float, float]:
    """What `work` brings, and the CPU time that the server used meanwhile."""
    before = cpu_seconds(stage.server_pid)
    return await work, cpu_seconds(stage.server_pid) - before


async def _batch(caller: Caller, texts: Sequence[str], report: Report) -> float:
    """Seconds that a batch takes from its creation to its end."""
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        path = Path(folder) / "lines.jsonl"
        await asyncio.to_thread(path.write_bytes, b"".join(map(_line, range(len(texts)), texts)))
        file_id = await caller.upload(path)
    await asyncio.sleep(_HEADROOM_SECONDS)  # batch work leaves places free for those who were online just now
    began = now()
    batch = await caller.until(await caller.create(file_id), ENDED)
    seconds = now() - began
    answers = await caller.lines(batch["output_file_id"]) if batch["output_file_id"] else []
    found = sorted(json.loads(line)["custom_id"] for line in answers)
    wanted = sorted(f"line-{number}" for number in range(len(texts)))
    report.count([""] * batch["request_counts"]["completed"])
    report.count([] if found == wanted else [f"a batch that was {batch['status']} has not every line once"])
    return seconds


def _line(number: int, text: str) -> bytes:
    body = {"model": _MODEL, "input": text, "encoding_format": "base64"}
    return to_json({"custom_id": f"line-{number}", "method": "POST", "url": PATH, "body": body}) + b"\n"
