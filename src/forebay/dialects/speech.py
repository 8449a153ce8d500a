"""What a request about a recording asks for, whoever asks: transcribe, translate, align, tell speakers apart.

It holds values and the form of an engine's records alone, and refuses to know how an answer is written.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic_core import from_json, to_json

from forebay.dialects.answer import Progress
from forebay.dialects.openai.call import Call
from forebay.dialects.openai.errors import from_engine
from forebay.dialects.openai.events import Generation
from forebay.errors import EngineGarbled
from forebay.speech import Segment

_RECORD_BYTES_MAX = 8 * 2**20  # the voices of a stretch are the largest

Task = Literal["transcribe", "translate", "align", "diarize"]
Interpolation = Literal["nearest", "linear", "ignore"]


@dataclass(frozen=True, slots=True)
class AudioRef:
    """Where the recording of a request is, if it did not come with it: an uploaded file, or a `url` (`data:`, http, https)."""

    file_id: str | None = None
    url: str | None = None


@dataclass(frozen=True, slots=True)
class Align:
    """Word times by an aligner of its own instead of the model's attention."""

    model: str
    interpolate: Interpolation = "nearest"
    characters: bool = False


@dataclass(frozen=True, slots=True)
class Diarize:
    """Who spoke when. `clips` are `data:` URLs of short recordings of `names`, in the same order."""

    model: str
    speakers: int | None = None
    speakers_min: int | None = None
    speakers_max: int | None = None
    names: tuple[str, ...] = ()
    clips: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SpeechTask:
    """The work on one recording.

    `options` are those of the whisper engine, checked; `words` that word times are wanted; `transcript` is what was said,
    where somebody knows it and only asks when. `source` is none where the recording came with the request.
    """

    task: Task
    options: Mapping[str, Any] = field(default_factory=dict)
    words: bool = False
    align: Align | None = None
    diarize: Diarize | None = None
    transcript: tuple[Segment, ...] = ()
    source: AudioRef | None = None
    background: bool = False

    @property
    def further_models(self) -> tuple[str, ...]:
        """The models that it takes beside that of its request."""
        return tuple(each.model for each in (self.align, self.diarize) if each is not None)


def part_body(header: Mapping[str, Any], samples: bytes) -> bytes:
    """The body of a request to a speech engine: a line of JSON, and what it is about."""
    return b"%b\n%b" % (to_json(header), samples)


class Records(Generation):
    """The shape of answers that are one JSON object on each line; each is handed on when it comes."""

    def __init__(self, on_record: Callable[[dict[str, Any]], None]) -> None:
        self._on_record = on_record

    def gatherer(self, call: Call) -> "RecordGatherer":  # type: ignore[override]  # nothing is put together
        """For an answer whose records are handed on."""
        return RecordGatherer(self._on_record)


class RecordGatherer:
    """Hands on each record; the answer is whole when one of the type `done` has come."""

    def __init__(self, on_record: Callable[[dict[str, Any]], None]) -> None:
        self.progress = Progress()
        self._on_record = on_record
        self._rest = bytearray()
        self._done = False

    def feed(self, data: bytes) -> None:
        """Take in `data`. Raises EngineGarbled, or what an error record means."""
        *lines, rest = data.split(b"\n")
        for line in lines:
            self._rest += line
            whole, self._rest = bytes(self._rest).strip(), bytearray()
            if whole:
                self._take(whole)
        self._rest += rest  # a record may be many of what is read at once
        if len(self._rest) > _RECORD_BYTES_MAX:
            raise EngineGarbled

    def _take(self, line: bytes) -> None:
        try:
            record = from_json(line)
        except ValueError:
            raise EngineGarbled from None
        if not isinstance(record, dict) or self._done:
            raise EngineGarbled
        if "error" in record:
            code = record["error"].get("code") if isinstance(record["error"], dict) else None
            raise from_engine(code if isinstance(code, int) and 400 <= code < 600 else 500, line)
        self._done = record.get("type") == "done"
        self.progress.content_seen = True
        try:
            self._on_record(record)
        except (KeyError, TypeError, ValueError):
            raise EngineGarbled from None

    def body(self) -> bytes:
        """Nothing: the records were handed on. Raises EngineGarbled if the last one has not come."""
        if not self._done:
            raise EngineGarbled
        return b""
