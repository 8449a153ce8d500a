"""The bodies of requests about recordings: transcriptions, translations, alignments, diarizations.

It refuses what it cannot check: every number has bounds, and options that do not go together are named.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from forebay.dialects.languages import code_of
from forebay.dialects.openai.audio_events import SpeechShape
from forebay.dialects.openai.audio_formats import Look
from forebay.dialects.openai.call import Call, Context, Wire
from forebay.dialects.speech import Align, AudioRef, Diarize, Interpolation, SpeechTask
from forebay.errors import InvalidRequest
from forebay.inference import Capability, Request
from forebay.speech import Segment

TRANSCRIPTIONS = "/v1/audio/transcriptions"
TRANSLATIONS = "/v1/audio/translations"
ALIGNMENTS = "/v1/audio/alignments"
DIARIZATIONS = "/v1/audio/diarizations"

KNOWN_SPEAKERS_MAX = 4
SPEAKERS_MAX = 64
CLIP_CHARS_MAX = 4 * 2**20  # of a `data:` URL: ten seconds of studio quality
TEXT_CHARS_MAX = 2**20
SEGMENTS_MAX = 20_000
_SECONDS_MAX = 172_800
_COMMAS = ", "
_LADDER_STEP = 0.2  # to the next temperature, which is taken where a text looks like none
_VAD_GAP = 0.137  # between the levels at which speech begins and ends


def _known_language(written: str) -> str:
    code = code_of(written)
    if code is None:
        raise ValueError("write a language as in ISO 639-1, such as `en`")
    return code


def _printable(name: str) -> str:
    if not name.isprintable() or name.strip() != name:
        raise ValueError("a name has printable characters alone, and no space around it")
    return name


def _data_url(url: str) -> str:
    if url[:5].lower() != "data:":
        raise ValueError("send the clip itself as a `data:` URL")
    return url


Name = Annotated[str, Field(min_length=1, max_length=256)]
Hint = Annotated[str, Field(max_length=8192)]
Keyword = Annotated[str, Field(min_length=1, max_length=128)]
Language = Annotated[str, Field(max_length=32), AfterValidator(_known_language)]
SpeakerName = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_printable)]
Clip = Annotated[str, Field(max_length=CLIP_CHARS_MAX), AfterValidator(_data_url)]
Temperature = Annotated[float, Field(ge=0, le=1)]
Milliseconds = Annotated[int, Field(ge=0, le=60_000)]
Beams = Annotated[int, Field(ge=1, le=16)]
Count = Annotated[int, Field(ge=1, le=SPEAKERS_MAX)]
Seconds = Annotated[float, Field(ge=0, le=_SECONDS_MAX)]
Granularity = Literal["word", "segment"]


class ServerVad(Wire):
    """How silence is found, in OpenAI's words."""

    type: Literal["server_vad"]
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    prefix_padding_ms: Milliseconds | None = None
    silence_duration_ms: Milliseconds | None = None


Strategy = Annotated[
    Annotated[Literal["auto"], Tag("auto")] | Annotated[ServerVad, Tag("server_vad")],
    Discriminator(lambda value: "auto" if isinstance(value, str) else "server_vad"),
]


class Recorded(Wire):
    """What every request about a recording has. The recording comes with it, or lies at one of `file_id` and `url`."""

    model: Name
    file_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    url: Annotated[str, Field(min_length=1)] | None = None
    background: bool = False
    webhook_url: Annotated[str, Field(max_length=2048)] | None = None


class Listening(Wire):
    """How a model is to listen: the options of Whisper, and those that OpenAI has names of its own for."""

    language: Language | None = None
    prompt: Hint | None = None
    temperature: Temperature | None = None
    keywords: Annotated[tuple[Keyword, ...], Field(max_length=100, fail_fast=True)] | None = None
    chunking_strategy: Strategy | None = None
    # Ours: Whisper's own options by their names.
    initial_prompt: Hint | None = None
    hotwords: Hint | None = None
    temperatures: Annotated[tuple[Temperature, ...], Field(min_length=1, max_length=11, fail_fast=True)] | None = None
    beam_size: Beams | None = None
    best_of: Beams | None = None
    patience: Annotated[float, Field(gt=0, le=5)] | None = None
    length_penalty: Annotated[float, Field(ge=0, le=5)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=5)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=32)] | None = None
    compression_ratio_threshold: Annotated[float, Field(ge=0, le=100)] | None = None
    log_prob_threshold: Annotated[float, Field(ge=-100, le=0)] | None = None
    no_speech_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    suppress_tokens: (
        Annotated[tuple[Annotated[int, Field(ge=-1, le=65_535)], ...], Field(max_length=1024, fail_fast=True)] | None
    ) = None
    suppress_numerals: bool | None = None
    vad: bool | None = None
    vad_onset: Annotated[float, Field(gt=0, lt=1)] | None = None
    vad_offset: Annotated[float, Field(gt=0, lt=1)] | None = None
    vad_min_speech_ms: Milliseconds | None = None
    vad_min_silence_ms: Milliseconds | None = None
    vad_pad_ms: Annotated[int, Field(ge=0, le=10_000)] | None = None
    chunk_seconds: Annotated[int, Field(ge=1, le=30)] | None = None


_PASSED_ON = (
    *("language", "initial_prompt", "hotwords", "temperatures", "beam_size", "best_of", "patience", "length_penalty"),
    *("repetition_penalty", "no_repeat_ngram_size", "compression_ratio_threshold", "log_prob_threshold"),
    *("no_speech_threshold", "suppress_tokens", "suppress_numerals", "vad", "vad_onset", "vad_offset"),
    *("vad_min_speech_ms", "vad_min_silence_ms", "vad_pad_ms", "chunk_seconds"),
)


class Speakers(Wire):
    """How many speakers there are, and who they may be."""

    speakers: Count | None = None
    speakers_min: Count | None = None
    speakers_max: Count | None = None
    # The same by the names that others have for it.
    num_speakers: Count | None = None
    min_speakers: Count | None = None
    max_speakers: Count | None = None
    known_speaker_names: (
        Annotated[tuple[SpeakerName, ...], Field(max_length=KNOWN_SPEAKERS_MAX, fail_fast=True)] | None
    ) = None
    known_speaker_references: (
        Annotated[tuple[Clip, ...], Field(max_length=KNOWN_SPEAKERS_MAX, fail_fast=True)] | None
    ) = None


class Aligning(Wire):
    """How words get their times from an aligner."""

    interpolate: Interpolation | None = None
    character_alignments: bool | None = None


class Spoken(Recorded, Listening, Speakers, Aligning):
    """What transcriptions and translations share."""

    diarize: bool | None = None
    diarization_model: Name | None = None


class TranscriptionBody(Spoken):
    """The body of POST /v1/audio/transcriptions."""

    languages: Annotated[tuple[Language, ...], Field(min_length=1, max_length=16, fail_fast=True)] | None = None
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt", "diarized_json"] = "json"
    timestamp_granularities: Annotated[tuple[Granularity, ...], Field(max_length=2, fail_fast=True)] | None = None
    include: Annotated[tuple[Literal["logprobs"], ...], Field(max_length=1, fail_fast=True)] | None = None
    stream: bool | None = None
    align_model: Name | None = None


class TranslationBody(Spoken):
    """The body of POST /v1/audio/translations. What is aligned is the text that was said, so nothing is here."""

    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"


class Said(Wire):
    """A piece of a transcript, and about when it was said."""

    start: Seconds
    end: Seconds
    text: Annotated[str, Field(max_length=65_536)]


class AlignmentBody(Recorded, Aligning):
    """The body of POST /v1/audio/alignments: what was said, as one text or in pieces with rough times."""

    transcript: Annotated[str, Field(min_length=1, max_length=65_536)] | None = None
    segments: Annotated[tuple[Said, ...], Field(min_length=1, max_length=SEGMENTS_MAX, fail_fast=True)] | None = None
    language: Language | None = None
    response_format: Literal["json", "srt", "vtt"] = "json"


class DiarizationBody(Recorded, Speakers):
    """The body of POST /v1/audio/diarizations."""

    response_format: Literal["json", "verbose_json", "rttm"] = "json"


def transcription_call(body: TranscriptionBody, context: Context) -> Call:
    """The call that `body` asks for. Raises InvalidRequest."""
    form = body.response_format
    _check_transcription(body)
    diarize = _diarize_of(body, context, implied=form == "diarized_json")
    align = _align_of(body)
    times, logprobs = body.timestamp_granularities or ("segment",), bool(body.include)
    cut = form in {"srt", "vtt"}  # between words
    speech = SpeechTask(
        "transcribe",
        options=_options(body),
        words="word" in times or cut or logprobs or align is not None or diarize is not None,
        align=align,
        diarize=diarize,
        source=_source(body, context),
        background=body.background,
    )
    look = Look(words="word" in times or align is not None, segments="segment" in times, logprobs=logprobs)
    shape = SpeechShape(form, look)
    return _call(body, context, Capability.TRANSCRIPTION, TRANSCRIPTIONS, speech, shape, stream=bool(body.stream))


def translation_call(body: TranslationBody, context: Context) -> Call:
    """The call that `body` asks for. Raises InvalidRequest."""
    for field in ("interpolate", "character_alignments"):
        if getattr(body, field) is not None:
            raise _refusal(f"A translation has no words of the recording to align. Leave `{field}` out.", field)
    diarize = _diarize_of(body, context, implied=False)
    speech = SpeechTask(
        "translate",
        options=_options(body),
        words=diarize is not None,
        diarize=diarize,
        source=_source(body, context),
        background=body.background,
    )
    shape = SpeechShape(body.response_format, Look())
    return _call(body, context, Capability.TRANSLATION, TRANSLATIONS, speech, shape)


def alignment_call(body: AlignmentBody, context: Context) -> Call:
    """The call that `body` asks for. Raises InvalidRequest."""
    speech = SpeechTask(
        "align",
        options={} if body.language is None else {"language": body.language},
        words=True,
        align=Align(body.model, body.interpolate or "nearest", bool(body.character_alignments)),
        transcript=_transcript(body),
        source=_source(body, context),
        background=body.background,
    )
    shape = SpeechShape(body.response_format, Look(words=True))
    return _call(body, context, Capability.ALIGNMENT, ALIGNMENTS, speech, shape)


def diarization_call(body: DiarizationBody, context: Context) -> Call:
    """The call that `body` asks for. Raises InvalidRequest."""
    speech = SpeechTask(
        "diarize",
        diarize=_speakers(body, body.model),
        source=_source(body, context),
        background=body.background,
    )
    shape = SpeechShape(body.response_format, Look())
    return _call(body, context, Capability.DIARIZATION, DIARIZATIONS, speech, shape)


def other_models(body: Spoken, diarization_model: str) -> Sequence[tuple[str, str, Capability]]:
    """The further models that a body needs: the field that names each, its name, and what it has to serve."""
    found = []
    if isinstance(body, TranscriptionBody) and body.align_model is not None:
        found.append(("align_model", body.align_model, Capability.ALIGNMENT))
    if body.diarize or getattr(body, "response_format", "") == "diarized_json":
        found.append(("diarization_model", body.diarization_model or diarization_model, Capability.DIARIZATION))
    return found


def _call(
    body: Recorded,
    context: Context,
    capability: Capability,
    path: str,
    speech: SpeechTask,
    shape: SpeechShape,
    *,
    stream: bool = False,
) -> Call:
    if body.webhook_url is not None and not body.background:
        raise _refusal("`webhook_url` needs `background` to be true.", "webhook_url")
    request = Request(
        id=context.request_id,
        project=context.project,
        model=body.model,
        capability=capability,
        path=path,
        body=b"",  # written for each stretch of the recording
        traceparent=context.traceparent,
    )
    return Call(request, "speech", stream=stream, include_usage=False, tier="default", shape=shape, speech=speech)


def _check_transcription(body: TranscriptionBody) -> None:
    """Refuse what does not go together, as OpenAI does."""
    form = body.response_format
    if body.timestamp_granularities and form != "verbose_json":
        raise _refusal(
            "`timestamp_granularities` needs `response_format` to be `verbose_json`.", "timestamp_granularities"
        )
    if body.include and form != "json":
        raise _refusal("`include` with `logprobs` needs `response_format` to be `json`.", "include")
    if body.stream and form not in {"json", "text", "diarized_json"}:
        raise _refusal(f"`stream` does not go with the response format `{form}`: it is written at the end.", "stream")
    if body.stream and body.background:
        raise _refusal("A transcription in the background is not streamed; its job has events.", "stream")
    if body.languages is not None and body.language is not None:
        raise _refusal("Send one of `language` and `languages`.", "languages")


def _source(body: Recorded, context: Context) -> AudioRef | None:
    """Where the recording is; none where it came with the request."""
    given = [field for field in ("file_id", "url") if getattr(body, field) is not None]
    if len(given) + context.with_recording > 1:
        raise _refusal("Send one recording: as `file`, or by one of `file_id` and `url`.", given[-1])
    if context.with_recording:
        return None
    if not given:
        raise InvalidRequest(
            "Missing required parameter: 'file'. Send the recording in a form, or name it with `file_id` or `url`.",
            param="file",
            code="missing_required_parameter",
        )
    return AudioRef(body.file_id, body.url)


def _options(body: Spoken) -> dict[str, Any]:
    """What the engine is told, under its own names."""
    options = body.model_dump(include=set(_PASSED_ON), exclude_none=True)
    languages: tuple[str, ...] = getattr(body, "languages", None) or ()
    if len(languages) == 1:  # of several, the model finds out which it is
        options["language"] = languages[0]
    _rename(body, options, "prompt", "initial_prompt", lambda prompt: prompt)
    _rename(body, options, "keywords", "hotwords", _COMMAS.join)
    _rename(body, options, "temperature", "temperatures", _ladder)
    if body.chunking_strategy is not None:
        _add_vad(body.chunking_strategy, options)
    if "vad_onset" in options and "vad_offset" not in options:
        options["vad_offset"] = max(0.01, round(options["vad_onset"] - _VAD_GAP, 3))
    if options.get("vad_offset", 0) > options.get("vad_onset", 0.5):
        raise _refusal("`vad_offset` is above `vad_onset`: speech would end before it begins.", "vad_offset")
    return options


def _rename(body: Spoken, options: dict[str, Any], theirs: str, ours: str, written: Callable[[Any], Any]) -> None:
    """Take OpenAI's name for an option; both at once are refused."""
    value = getattr(body, theirs)
    if value is None:
        return
    if ours in options:
        raise _refusal(f"Send one of `{theirs}` and `{ours}`: they mean the same.", ours)
    options[ours] = written(value)


def _ladder(temperature: float) -> tuple[float, ...]:
    """The temperature that is asked for, and the higher ones for where its text looks like none."""
    steps = int((1 - temperature) / _LADDER_STEP + 1e-6)
    return tuple(round(temperature + step * _LADDER_STEP, 3) for step in range(steps + 1))


def _add_vad(strategy: Literal["auto"] | ServerVad, options: dict[str, Any]) -> None:
    if options.get("vad") is False:
        raise _refusal("`chunking_strategy` finds silence, and `vad` says not to.", "vad")
    options["vad"] = True
    if not isinstance(strategy, ServerVad):
        return
    named = {
        "vad_onset": strategy.threshold,
        "vad_pad_ms": strategy.prefix_padding_ms,
        "vad_min_silence_ms": strategy.silence_duration_ms,
    }
    for name, value in named.items():
        if value is not None and name in options:
            raise _refusal(f"Both `chunking_strategy` and `{name}` say the same thing. Send one of them.", name)
        if value is not None:
            options[name] = value


_OF_SPEAKERS = (
    *(
        "speakers",
        "speakers_min",
        "speakers_max",
        "num_speakers",
        "min_speakers",
        "max_speakers",
        "known_speaker_names",
        "known_speaker_references",
    ),
    "diarization_model",
)


def _diarize_of(body: Spoken, context: Context, *, implied: bool) -> Diarize | None:
    if implied and body.diarize is False:
        raise _refusal("`diarized_json` shows who spoke, and `diarize` says not to tell.", "diarize")
    if body.diarize or implied:
        return _speakers(body, body.diarization_model or context.diarization_model)
    for field in _OF_SPEAKERS:
        if getattr(body, field) is not None:
            raise _refusal(f"`{field}` needs `diarize` to be true, or the response format `diarized_json`.", field)
    return None


def _speakers(body: Speakers, model: str) -> Diarize:
    names, clips = body.known_speaker_names or (), body.known_speaker_references or ()
    if len(names) != len(clips):
        raise _refusal(
            "`known_speaker_names` and `known_speaker_references` have one entry for each speaker, in the same order.",
            "known_speaker_references",
        )
    if len(set(names)) < len(names):
        raise _refusal("Each of the `known_speaker_names` is there once.", "known_speaker_names")
    speakers = _either(body, "speakers", "num_speakers")
    least, most = _either(body, "speakers_min", "min_speakers"), _either(body, "speakers_max", "max_speakers")
    if (least or 1) > (most or SPEAKERS_MAX):
        raise _refusal("`speakers_min` is above `speakers_max`.", "speakers_min")
    if speakers is not None and not (least or 1) <= speakers <= (most or SPEAKERS_MAX):
        raise _refusal("`speakers` is not between `speakers_min` and `speakers_max`.", "speakers")
    return Diarize(model, speakers, least, most, names, clips)


def _either(body: Speakers, ours: str, theirs: str) -> int | None:
    """What is sent under one of two names."""
    found: list[int] = [value for value in (getattr(body, ours), getattr(body, theirs)) if value is not None]
    if len(found) > 1:
        raise _refusal(f"Send one of `{ours}` and `{theirs}`: they mean the same.", theirs)
    return found[0] if found else None


def _align_of(body: TranscriptionBody) -> Align | None:
    if body.align_model is not None:
        return Align(body.align_model, body.interpolate or "nearest", bool(body.character_alignments))
    for field in ("interpolate", "character_alignments"):
        if getattr(body, field) is not None:
            raise _refusal(f"`{field}` needs an `align_model`.", field)
    return None


def _transcript(body: AlignmentBody) -> tuple[Segment, ...]:
    """What was said; a text alone lasts as long as the recording."""
    if (body.transcript is None) == (body.segments is None):
        raise _refusal("Send what was said: one of `transcript` and `segments`.", "transcript")
    if body.segments is None:
        return (Segment(0.0, 0.0, body.transcript or ""),)
    if sum(len(each.text) for each in body.segments) > TEXT_CHARS_MAX:
        raise _refusal(f"The texts of `segments` have at most {TEXT_CHARS_MAX} characters in all.", "segments")
    before = 0.0
    for place, each in enumerate(body.segments):
        if each.end <= each.start or each.start < before:
            raise _refusal("Segments are in the order of time, and each ends after it begins.", f"segments[{place}]")
        before = each.start
    return tuple(Segment(each.start, each.end, each.text) for each in body.segments)


def _refusal(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_value")
