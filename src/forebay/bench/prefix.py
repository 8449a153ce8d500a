"""Lines of a batch that share the beginning of their prompts, beside the engine driven directly in the order of the file (P6).

Each mix of lines is run as a batch, and by as many connections as the engine has slots, each taking the next line of the
file. It refuses to let one side see a prompt twice, or both sides work at once, and to count a mix during which others
had much of the machine, unless they always have.
"""

import asyncio
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from forebay.bench.caller import ENDED, Caller, calling
from forebay.bench.processes import spent_seconds, stolen_seconds
from forebay.bench.report import Measure, Report
from forebay.bench.stage import Stage, config_of, cpu_seconds, of_engine, staged
from forebay.bench.wire import Reply, now
from forebay.clock import seeded
from forebay.config import Settings
from forebay.dialects.openai.call import Context, parse
from forebay.dialects.openai.chat import ChatBody, chat_call
from forebay.errors import SetupError
from forebay.model_config import LlamaCppModel

_ENDPOINT = "/v1/chat/completions"
_WORDS = (  # each of them is one token in most vocabularies, with the space before it
    "river stone window garden letter summer winter yellow number person answer market bridge island forest silver mother "
    "father school doctor animal street nature planet castle engine paper water house light table world story"
)
_QUESTION_WORDS = 12
_BRIEF_WORDS = 3
_STOLEN_MAX = 0.03  # of the machine, during a mix; it is measured again otherwise
_TRIES_MAX = 3
_TRY = 1_000  # as many seeds on

Message = dict[str, str]
Mix = Callable[["Lines"], list[list[Message]]]


@dataclass(frozen=True, slots=True)
class Size:
    """How much to measure for each seed: how many prompts of how many words share their beginning with how many others."""

    prefixes: int
    lines_each: int
    prefix_words: int
    tokens: int

    @property
    def lines(self) -> int:
        """Of one mix."""
        return self.prefixes * self.lines_each

    def of(self, mix: str) -> "Size":
        """Half as many lines where most of them are long prompts that no slot has, which take an engine minutes."""
        return replace(self, lines_each=self.lines_each // 2) if mix in _LONG else self


FULL = Size(prefixes=20, lines_each=8, prefix_words=390, tokens=16)
QUICK = Size(prefixes=2, lines_each=2, prefix_words=40, tokens=2)


class Lines:
    """Makes the lines of one seed; no two texts of it begin alike unless they are meant to."""

    def __init__(self, size: Size, seed: int, mix: str) -> None:
        self.size = size
        self._chance = seeded(seed * len(MIXES) + list(MIXES).index(mix))

    def text(self, words: int) -> str:
        """So many words by chance."""
        return " ".join(self._chance.choices(_WORDS.split(), k=words)).capitalize() + "."

    def asked(self, *system: str) -> list[Message]:
        """A question after what the system says."""
        said = [{"role": "system", "content": " ".join(system)}] if system else []
        return [*said, {"role": "user", "content": self.text(_QUESTION_WORDS)}]

    def families(self, *common: str, words: int) -> list[list[Message]]:
        """Lines in blocks that share so many words, after what all lines have in common."""
        prefixes = [self.text(words) for _ in range(self.size.prefixes)]
        return [self.asked(*common, prefix) for prefix in prefixes for _ in range(self.size.lines_each)]

    def shuffled(self, lines: list[list[Message]]) -> list[list[Message]]:
        """The same lines in an order by chance."""
        self._chance.shuffle(lines)
        return lines


def _in_blocks(lines: Lines) -> list[list[Message]]:
    return lines.families(words=lines.size.prefix_words)


def _shuffled(lines: Lines) -> list[list[Message]]:
    return lines.shuffled(_in_blocks(lines))


def _two_levels(lines: Lines) -> list[list[Message]]:
    half = lines.size.prefix_words // 2
    return lines.shuffled(lines.families(lines.text(half), words=half))


def _one_for_all(lines: Lines) -> list[list[Message]]:
    prefix = lines.text(lines.size.prefix_words)
    return [lines.asked(prefix) for _ in range(lines.size.lines)]


def _half_of_them(lines: Lines) -> list[list[Message]]:
    shared = _in_blocks(lines)[::2]
    return lines.shuffled(shared + [lines.asked(lines.text(lines.size.prefix_words)) for _ in shared])


def _none(lines: Lines) -> list[list[Message]]:
    return [lines.asked(lines.text(lines.size.prefix_words)) for _ in range(lines.size.lines)]


def _very_short(lines: Lines) -> list[list[Message]]:
    return [[{"role": "user", "content": lines.text(_BRIEF_WORDS)}] for _ in range(lines.size.lines)]


_SHUFFLED = "shuffled"
MIXES: Mapping[str, Mix] = {
    _SHUFFLED: _shuffled,
    "in blocks": _in_blocks,
    "shuffled, of two levels": _two_levels,
    "one for all": _one_for_all,
    "half of them shared, shuffled": _half_of_them,
    "none shared": _none,
    "very short": _very_short,
}


_SIDES = "in a batch", "in file order"
_SPEED, _WORK = "lines per second", "lines per second of CPU time"
_READ = "tokens of prompts that the engine had to read"

_LONG = {"in blocks", "shuffled, of two levels", "half of them shared, shuffled", "none shared"}


def measures(mixes: Collection[str]) -> dict[str, Measure]:
    """What a run of `mixes` fills in."""
    found = [
        Measure(
            "P6",
            _ratio(_SPEED, mix),
            "",
            floor=1.15 if mix == _SHUFFLED else 1.0,
            goal=1.4 if mix == _SHUFFLED else None,
            more_is_better=True,
        )
        for mix in mixes
    ]
    found += [Measure("P6", _ratio(_READ, mix), "", floor=1.0) for mix in mixes]
    for mix in mixes:
        found += [Measure("P6", f"lines per second {side}, prompts: {mix}", "/s") for side in _SIDES]
        found += [Measure("P6", _ratio(_WORK, mix), ""), Measure("P6", _stolen(mix), "%")]
    return {measure.name: measure for measure in found}


def _ratio(of: str, mix: str) -> str:
    return f"{of}, batch / file order, prompts: {mix}"


def _stolen(mix: str) -> str:
    return f"of the machine others had, prompts: {mix}"


def chosen(names: Sequence[str] | None) -> list[str]:
    """The mixes of these names, or all of them. Raises SetupError."""
    for name in names or ():
        if name not in MIXES:
            raise SetupError(f"There is no mix {name!r}. Choose of {', '.join(map(repr, MIXES))}.")
    return [mix for mix in MIXES if not names or mix in names]


async def run(
    settings: Settings, name: str, mixes: Collection[str], seeds: int, size: Size, say: Callable[[str], None]
) -> Report:
    """Measure each of `mixes` once for each seed, on one server and one engine. Raises SetupError."""
    model, path = of_engine(settings, name, LlamaCppModel)
    sized = model.model_copy(update={"source": f"file:{path}"})
    report = Report("prefix", seeds, measures(mixes))
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        async with (
            staged(name, sized, path, config_of({name: sized})) as stage,
            calling(stage.url, stage.key, _ENDPOINT) as caller,
        ):
            bench = _Bench(stage, caller, name, sized, Path(folder), size, report)
            for mix in mixes:
                # The seeds of one follow each other: a machine that grows slower meanwhile is even to both sides.
                for seed in range(1, seeds + 1):
                    say(f"seed {seed}: {size.of(mix).lines} lines, prompts: {mix}")
                    say(f"    {await bench.measure(seed, mix):.2f} times as many lines per second as in file order")
    report.notes += [
        f"{name}, {sized.slots} slots, {size.lines} lines of a mix, answers of {size.tokens} tokens.",
        f"Shared are {size.prefixes} beginnings of {size.prefix_words} words, each by {size.lines_each} lines.",
        *([f"Half as many lines each: {', '.join(long)}."] if (long := sorted(_LONG.intersection(mixes))) else []),
        f"In file order: {sized.slots} connections straight to an engine of its own, each taking the next line of the file.",
        "The clock of a batch runs from its creation to its end: with the check of its file and the joining of its results.",
        "What an engine had to read is what it says itself: the tokens of the prompts less those it had kept.",
        "CPU time is that of the server and its engine, and of the engine that is driven directly.",
        f"A mix is measured again, with other lines, while others had more than {_STOLEN_MAX:.0%} of the machine: {_TRIES_MAX} times at most. The one counts in which they had least.",
        "Both sides get the same lines; which goes first changes from seed to seed, and the seeds of a mix follow each other. One is idle while the other works.",
    ]
    return report


@dataclass(frozen=True, slots=True)
class _Bench:
    """Both sides of the measurement."""

    stage: Stage
    caller: Caller
    name: str
    model: LlamaCppModel
    folder: Path
    size: Size
    report: Report

    async def measure(self, seed: int, mix: str) -> float:
        """One mix on both sides; how many times as fast the batch is."""
        tries: list[dict[str, _Side]] = []
        while not tries or (_disturbed(tries[-1]) > _STOLEN_MAX and len(tries) < _TRIES_MAX):
            lines = MIXES[mix](Lines(self.size.of(mix), seed + _TRY * len(tries), mix))
            tries.append(await self._both([self._body(messages) for messages in lines], batch_first=bool(seed % 2)))
        sides = min(tries, key=_disturbed)
        batch, file_order = (sides[side] for side in _SIDES)
        for name, side in sides.items():
            self.report.add(f"lines per second {name}, prompts: {mix}", side.lines / side.done.seconds)
        self.report.add(_stolen(mix), 100 * _disturbed(sides))
        self.report.add(_ratio(_READ, mix), batch.done.read_tokens / file_order.done.read_tokens)
        self.report.add(_ratio(_WORK, mix), file_order.cpu_seconds / batch.cpu_seconds)
        ratio = file_order.done.seconds / batch.done.seconds
        self.report.add(_ratio(_SPEED, mix), ratio)
        return ratio

    async def _both(self, lines: list[dict[str, Any]], *, batch_first: bool) -> dict[str, "_Side"]:
        run = dict(zip(_SIDES, (self._in_a_batch, self._in_file_order), strict=True))
        engine = self.stage.engine_pids[0]
        spent = dict(
            zip(_SIDES, (lambda: spent_seconds(self.stage.server_pid), lambda: cpu_seconds(engine)), strict=True)
        )
        found: dict[str, _Side] = {}
        for side in _SIDES if batch_first else reversed(_SIDES):
            before, stolen = spent[side](), stolen_seconds()
            done = await run[side](lines)
            share = (stolen_seconds() - stolen) / done.seconds / (os.cpu_count() or 1)
            found[side] = _Side(len(lines), done, spent[side]() - before, share)
        return found

    def _body(self, messages: list[Message]) -> dict[str, Any]:
        return {"model": self.name, "messages": messages, "max_tokens": self.size.tokens, "temperature": 0}

    async def _in_file_order(self, lines: list[dict[str, Any]]) -> "_Done":
        context = Context("req_bench", "bench", None, self.model.max_tokens, self.model.slots)
        calls = [chat_call(parse(ChatBody, to_json(line)), context) for line in reversed(lines)]
        requests = [self.stage.engine.post(call.request.body) for call in calls]
        replies: list[Reply] = []

        async def connection() -> None:
            while requests:
                replies.append(await self.stage.engine.ask(requests.pop()))

        began = now()
        await asyncio.gather(*(connection() for _ in range(self.model.slots)))
        seconds = now() - began
        self.report.count(reply.trouble for reply in replies)
        return _Done(seconds, sum(reply.read_tokens for reply in replies))

    async def _in_a_batch(self, lines: list[dict[str, Any]]) -> "_Done":
        path = self.folder / "lines.jsonl"
        data = b"".join(_line(number, line) for number, line in enumerate(lines))
        await asyncio.to_thread(path.write_bytes, data)
        file_id = await self.caller.upload(path)
        began = now()
        batch = await self.caller.until(await self.caller.create(file_id), ENDED)
        seconds = now() - began
        done: int = batch["request_counts"]["completed"]
        self.report.count([""] * done + [f"a line of a batch that was {batch['status']}"] * (len(lines) - done))
        usage = batch["usage"]
        return _Done(seconds, usage["input_tokens"] - usage["input_tokens_details"]["cached_tokens"])


@dataclass(frozen=True, slots=True)
class _Done:
    """How long all lines took, and how many tokens of their prompts the engine had to read."""

    seconds: float
    read_tokens: int


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of a mix: what was done, the time of its processes, and the share of the machine that others had meanwhile."""

    lines: int
    done: _Done
    cpu_seconds: float
    stolen: float


def _disturbed(sides: Mapping[str, _Side]) -> float:
    return max(side.stolen for side in sides.values())


def _line(number: int, body: dict[str, Any]) -> bytes:
    return to_json({"custom_id": f"line-{number}", "method": "POST", "url": _ENDPOINT, "body": body}) + b"\n"
