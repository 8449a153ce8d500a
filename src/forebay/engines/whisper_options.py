"""What a request to the whisper engine asks for, checked: the line of JSON before its samples.

It refuses every value outside of its bounds, naming the parameter, and it knows no model.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from forebay.engines.connection import Refused
from forebay.engines.parted import Check, flag, number, parted, whole, yes_or_no
from forebay.engines.vad import VadOptions
from forebay.speech import SAMPLE_BYTES, SAMPLE_RATE

SECONDS_MAX = 600
_HEAD_BYTES_MAX = 256 * 1024
_TEXT_CHARS_MAX = 16_384
_TOKENS_MAX = 1024
_TEMPERATURES_MAX = 11


@dataclass(frozen=True, slots=True)
class Options:
    """How to listen. Those of the decoder go to the compute process as they are."""

    beam_size: int = 5
    best_of: int = 5
    patience: float = 1.0
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    compression_ratio_threshold: float | None = 2.4
    log_prob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    initial_prompt: str | None = None
    hotwords: str | None = None
    suppress_tokens: tuple[int, ...] = (-1,)
    suppress_numerals: bool = False
    vad: bool = True
    vad_onset: float = 0.5
    vad_offset: float = 0.363
    vad_min_speech_ms: int = 0
    vad_min_silence_ms: int = 160
    vad_pad_ms: int = 400
    chunk_seconds: int = 30
    logprobs: bool = False

    def regions(self) -> VadOptions:
        """Those that say where there is speech."""
        return VadOptions(
            self.vad_onset,
            self.vad_offset,
            self.vad_min_speech_ms,
            self.vad_min_silence_ms,
            min(self.vad_pad_ms, self.chunk_seconds * 250),  # padding is at most half of a chunk
            self.chunk_seconds,
        )


@dataclass(frozen=True, slots=True)
class Model:
    """What a loaded model can: `languages` are those it knows, `tokens` how many there are."""

    multilingual: bool
    languages: tuple[str, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Request:
    """One request: a stretch of a recording and what to do with it. `language` is none where it is to be found out."""

    task: str
    language: str | None
    words: bool
    last: bool
    options: Options
    samples: memoryview

    def decoding(self, *, first: bool) -> dict[str, Any]:
        """What the compute process has to know for a chunk of it; the prompt is for the first one alone."""
        options = asdict(self.options)
        return {**options, "initial_prompt": options["initial_prompt"] if first else None}


def read(body: bytes, model: Model) -> Request:
    """The request in `body`. Raises Refused."""
    header, samples = parted(body, _HEAD_BYTES_MAX)
    if not isinstance(header.get("options", {}), dict):
        raise Refused(400, "`options` has to be a JSON object.", param="options")
    if len(samples) % SAMPLE_BYTES:
        raise Refused(400, "The samples have to be whole: signed, 16 bits each.")
    if len(samples) > SECONDS_MAX * SAMPLE_RATE * SAMPLE_BYTES:
        raise Refused(413, f"Send at most {SECONDS_MAX} seconds at once.")
    options = _options(header.get("options", {}), model)
    task = _task(header, model)
    language = _language(header.get("language") or header.get("options", {}).get("language"), model)
    return Request(task, language, flag(header, "words"), flag(header, "last"), options, samples)


def _task(header: dict[str, Any], model: Model) -> str:
    task = header.get("task", "transcribe")
    if task not in ("transcribe", "translate"):
        raise Refused(400, "`task` has to be `transcribe` or `translate`.", param="task")
    if task == "translate" and not model.multilingual:
        raise Refused(400, "This model knows English alone and cannot translate. Use another one.", param="model")
    return str(task)


def _language(wanted: Any, model: Model) -> str | None:
    if wanted is None:
        return None if model.multilingual else "en"
    if wanted in model.languages:
        return str(wanted)
    if not model.multilingual:
        raise Refused(
            400, "This model knows English alone. Use another one, or leave `language` out.", param="language"
        )
    raise Refused(400, "This model does not know that `language`. Send a code such as `en`.", param="language")


def _options(given: dict[str, Any], model: Model) -> Options:
    known = {field.name for field in fields(Options)}
    unknown = sorted(set(given) - known - {"language"})
    if unknown:
        raise Refused(400, f"`{unknown[0][:64]}` is no option of this engine.", param=unknown[0][:64])
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name in known and (value is not None or name in _MAY_BE_NONE):
            values[name] = value if value is None else _CHECKS[name](name, value)
    options = Options(**values)
    if options.vad_offset > options.vad_onset:
        raise Refused(400, "`vad_offset` may not be above `vad_onset`.", param="vad_offset")
    if max(options.suppress_tokens, default=-1) >= model.tokens:
        raise Refused(400, "`suppress_tokens` names a token that this model does not have.", param="suppress_tokens")
    return options


def _several(check_one: Check, least: int, most: int) -> Check:
    def check(name: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, Sequence) or isinstance(value, str) or not least <= len(value) <= most:
            raise Refused(400, f"`{name}` has to be a list of {least} to {most} numbers.", param=name)
        return tuple(check_one(name, each) for each in value)

    return check


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > _TEXT_CHARS_MAX:
        raise Refused(400, f"`{name}` has to be a text of at most {_TEXT_CHARS_MAX} characters.", param=name)
    return value


_MAY_BE_NONE = frozenset({"compression_ratio_threshold", "log_prob_threshold", "no_speech_threshold"})
_CHECKS: dict[str, Check] = {
    "beam_size": whole(1, 16),
    "best_of": whole(1, 16),
    "patience": number(0.1, 5),
    "length_penalty": number(0, 5),
    "repetition_penalty": number(0.1, 5),
    "no_repeat_ngram_size": whole(0, 32),
    "temperatures": _several(number(0, 1), 1, _TEMPERATURES_MAX),
    "compression_ratio_threshold": number(0, 100),
    "log_prob_threshold": number(-100, 0),
    "no_speech_threshold": number(0, 1),
    "initial_prompt": _text,
    "hotwords": _text,
    "suppress_tokens": _several(whole(-1, 65_535), 0, _TOKENS_MAX),
    "suppress_numerals": yes_or_no,
    "vad": yes_or_no,
    "vad_onset": number(0.001, 1),
    "vad_offset": number(0, 1),
    "vad_min_speech_ms": whole(0, 60_000),
    "vad_min_silence_ms": whole(0, 60_000),
    "vad_pad_ms": whole(0, 10_000),
    "chunk_seconds": whole(1, 30),
    "logprobs": yes_or_no,
}
