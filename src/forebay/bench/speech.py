"""Recordings through the server beside faster-whisper driven directly: one file, and eight at once (P12).

It refuses to compare what is not alike: both get the same files, decode them, and search with the same options.
"""

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from forebay.bench.processes import Memory, spent_seconds, watched
from forebay.bench.program import Program, running
from forebay.bench.recordings import LEAD_SECONDS, Recording, cut, seconds_of, telephone_call, words_of
from forebay.bench.report import Measure, Report
from forebay.bench.stage import config_of, of_engine, served
from forebay.bench.wire import now
from forebay.clock import seeded
from forebay.config import Settings
from forebay.dialects.openai.audio import TRANSCRIPTIONS
from forebay.model_config import WhisperModel

_AT_ONCE = 8
_ANSWER_SECONDS = 900.0
_LANGUAGE = "en"
_OPTIONS = {"beam_size": 5, "language": _LANGUAGE, "vad_filter": True, "word_timestamps": True}
_REMEDY = "Look at what it said."


@dataclass(frozen=True, slots=True)
class Size:
    """How much to measure for each seed: rounds of one file, rounds of several files, and how many these are."""

    ones: int
    rounds: int
    files: int


FULL = Size(4, 2, _AT_ONCE)
QUICK = Size(1, 1, 2)


def measures(size: Size) -> dict[str, Measure]:
    """What a run fills in."""
    many = f"{size.files} files"
    found = [
        Measure("P12", "one file, through / faster-whisper", "", [], 0.95, 0.98, more_is_better=True),
        Measure("P12", f"{many} at once through / one after another by faster-whisper", "", [], 1.3, 1.5, True),
        Measure("P12", "one file through", "x real time"),
        Measure("P12", "one file by faster-whisper", "x real time"),
        Measure("P12", f"{many} at once through", "x real time"),
        Measure("P12", f"{many} one after another by faster-whisper", "x real time"),
        Measure("P12", "wrong words through, more than by faster-whisper, in points", "", floor=0.5),
        Measure("P12", "wrong words through", "%"),
        Measure("P12", "wrong words by faster-whisper", "%"),
        Measure("P12", f"wrong words of {many} at once through", "%"),
        Measure("P12", f"wrong words of {many} by faster-whisper", "%"),
        Measure("P12", "CPU time of one file, through / faster-whisper", ""),
        Measure("P12", f"CPU time of {many}, through / faster-whisper", ""),
        Measure("P12", "peak memory of the server and its processes", "MiB"),
        Measure("P12", "peak memory of faster-whisper", "MiB"),
    ]
    return {measure.name: measure for measure in found}


async def run(settings: Settings, name: str, seeds: int, size: Size, say: Callable[[str], None]) -> Report:
    """Measure everything once for each seed, with the model of that name."""
    report = Report(f"speech-{name}", seeds, measures(size))
    model, folder = model_of(settings, name)
    sample = await telephone_call(settings)
    async with (
        served(config_of({name: model})) as (url, key, pid),
        _directly(model, folder) as program,
        _asking(name, url, key) as through,
        watched(pid) as of_server,
        watched(program.pid) as of_program,
    ):
        bench = _Bench(sample, through, program, report, pid, of_server, of_program)
        say("load both")
        await bench.warm_up()
        for seed in range(1, seeds + 1):
            say(f"seed {seed}: one file, {size.ones} times; {size.files} files, {size.rounds} times")
            await bench.measure(_anywhere(seed), size, seed)
    report.notes += [
        f"{name}, {model.options.compute_type} on {model.options.device}, with the settings of the catalogue.",
        f"faster-whisper {bench.version} in a process of its own, as many threads, the same weights; its own search.",
        "Both decode the file and search with 5 beams, voice activity detection, word times and the language given.",
        "A telephone call of two people, 30 s. Each file begins elsewhere in the silence before the first word.",
        "Client, server, engine and faster-whisper share the machine's cores; only one side works at a time.",
        "Memory is the sum over the processes of a side, and counts libraries that they share more than once.",
    ]
    return report


@dataclass(slots=True)
class _Side:
    """What one side has done in all rounds of a part."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    of_audio: float = 0.0
    wrong: int = 0
    words: int = 0

    @property
    def speed(self) -> float:
        return self.of_audio / self.seconds

    @property
    def wrong_percent(self) -> float:
        return 100 * self.wrong / self.words


@dataclass(slots=True)
class _Part:
    """One part of the measurement, on both sides."""

    through: _Side = field(default_factory=_Side)
    direct: _Side = field(default_factory=_Side)


@dataclass(frozen=True, slots=True)
class _Heard:
    """What came of a file: its text, or what went wrong."""

    text: str
    trouble: str = ""


Ask = Callable[[Path], Awaitable[_Heard]]


@dataclass(slots=True)
class _Bench:
    sample: Recording
    through: Ask
    program: Program
    report: Report
    server_pid: int
    of_server: Memory
    of_program: Memory
    version: str = ""

    async def warm_up(self) -> None:
        """Everything is loaded and has worked once."""
        with _files(self.sample, _anywhere(0), 1) as files:
            await self.through(files[0])
            self.version = (await self._direct(files))["version"]

    async def measure(self, begin: Callable[[], float], size: Size, seed: int) -> None:
        """All parts once."""
        for memory in (self.of_server, self.of_program):
            memory.peak_bytes = 0
        one, many = _Part(), _Part()
        for turn in range(size.ones):
            await self._round(one, begin, 1, first=(turn + seed) % 2)
        for turn in range(size.rounds):
            await self._round(many, begin, size.files, first=(turn + seed) % 2)
        self._add(one, many, size)

    async def _round(self, part: _Part, begin: Callable[[], float], count: int, *, first: int) -> None:
        """The same files on both sides, in turns."""
        with _files(self.sample, begin, count) as files:
            seconds_of_audio = sum(map(seconds_of, files))
            for name in ("through", "direct") if first else ("direct", "through"):
                side: _Side = getattr(part, name)
                pid = self.server_pid if name == "through" else self.program.pid
                began, cpu = now(), spent_seconds(pid)
                if name == "through":
                    heard = await asyncio.gather(*map(self.through, files))
                    side.seconds += now() - began
                else:
                    answer = await self._direct(files)
                    heard = [_Heard(text) for text in answer["texts"]]
                    side.seconds += answer["seconds"]
                side.cpu_seconds += spent_seconds(pid) - cpu
                side.of_audio += seconds_of_audio
                self._judge(side, heard)

    async def _direct(self, files: Sequence[Path]) -> dict[str, Any]:
        return await self.program.ask({"paths": [str(path) for path in files], "options": _OPTIONS})

    def _judge(self, side: _Side, heard: Sequence[_Heard]) -> None:
        for each in heard:
            self.report.count([each.trouble])
            side.wrong += wrong_words(self.sample.words, words_of(each.text))
            side.words += len(self.sample.words)

    def _add(self, one: _Part, many: _Part, size: Size) -> None:
        add, files = self.report.add, f"{size.files} files"
        add("one file, through / faster-whisper", one.through.speed / one.direct.speed)
        ratio = many.through.speed / many.direct.speed
        add(f"{files} at once through / one after another by faster-whisper", ratio)
        add("one file through", one.through.speed)
        add("one file by faster-whisper", one.direct.speed)
        add(f"{files} at once through", many.through.speed)
        add(f"{files} one after another by faster-whisper", many.direct.speed)
        both = [_together(one.through, many.through), _together(one.direct, many.direct)]
        add("wrong words through, more than by faster-whisper, in points", both[0] - both[1])
        add("wrong words through", one.through.wrong_percent)
        add("wrong words by faster-whisper", one.direct.wrong_percent)
        add(f"wrong words of {files} at once through", many.through.wrong_percent)
        add(f"wrong words of {files} by faster-whisper", many.direct.wrong_percent)
        add("CPU time of one file, through / faster-whisper", one.through.cpu_seconds / one.direct.cpu_seconds)
        add(f"CPU time of {files}, through / faster-whisper", many.through.cpu_seconds / many.direct.cpu_seconds)
        add("peak memory of the server and its processes", self.of_server.peak_bytes / 2**20)
        add("peak memory of faster-whisper", self.of_program.peak_bytes / 2**20)


def _together(one: _Side, many: _Side) -> float:
    return 100 * (one.wrong + many.wrong) / (one.words + many.words)


# How many words of a text are wrong.


def wrong_words(reference: Sequence[str], heard: Sequence[str]) -> int:
    """How many words have to be changed, added or left out to come from one to the other."""
    row = list(range(len(heard) + 1))
    for number, word in enumerate(reference, 1):
        above, row[0] = row[0], number
        for place, other in enumerate(heard, 1):
            above, row[place] = row[place], min(above + (word != other), row[place] + 1, row[place - 1] + 1)
    return row[-1]


# Files.


@contextmanager
def _files(sample: Recording, begin: Callable[[], float], count: int) -> Iterator[list[Path]]:
    """So many files of the sample, each beginning elsewhere before its first word; gone at the end."""
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        yield [cut(sample, Path(folder) / f"{number}.wav", begin()) for number in range(count)]


def _anywhere(seed: int) -> Callable[[], float]:
    """Where the next file begins, in seconds."""
    chance = seeded(seed)
    return lambda: chance.uniform(0, LEAD_SECONDS)


# The two sides.


def model_of(settings: Settings, name: str) -> tuple[WhisperModel, Path]:
    """The model as it is run here, and its folder. Raises SetupError."""
    model, path = of_engine(settings, name, WhisperModel)
    folder = path if path.is_dir() else path.parent
    return model.model_copy(update={"source": f"file:{folder}", "files": {}}), folder


@asynccontextmanager
async def _directly(model: WhisperModel, folder: Path) -> AsyncIterator[Program]:
    options = model.options
    automatic = "int8" if options.device == "cpu" else "float16"
    settings = {
        "model": str(folder),
        "device": options.device,
        "device_index": options.device_index,
        "compute_type": automatic if options.compute_type == "auto" else options.compute_type,
        "cpu_threads": options.threads or os.cpu_count(),
    }
    command = (sys.executable, "-P", "-m", "forebay.bench.speech_program", json.dumps(settings))
    async with running(command, "faster-whisper", _REMEDY) as program:
        yield program


@asynccontextmanager
async def _asking(name: str, url: str, key: str) -> AsyncIterator[Ask]:
    timeout = aiohttp.ClientTimeout(total=_ANSWER_SECONDS)
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(url, headers=headers, timeout=timeout) as session:

        async def ask(path: Path) -> _Heard:
            form = aiohttp.FormData()
            said = {"model": name, "language": _LANGUAGE, "beam_size": "5", "response_format": "verbose_json"}
            for field_name, value in said.items():
                form.add_field(field_name, value)
            for granularity in ("word", "segment"):
                form.add_field("timestamp_granularities[]", granularity)
            content = await asyncio.to_thread(path.read_bytes)
            form.add_field("file", content, filename=path.name, content_type="audio/wav")
            async with session.post(TRANSCRIPTIONS, data=form) as answer:
                body = await answer.json()
            if answer.status != 200:
                return _Heard("", f"the server answered {answer.status}: {body['error']['message']}")
            return _Heard(str(body["text"]))

        yield ask
