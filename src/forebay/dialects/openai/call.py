"""What every generation endpoint shares on the wire: sampling fields with closed bounds, tiers, and the parsed call.

It refuses unknown fields, as OpenAI does, and never passes on a field that is not listed here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from forebay.dialects.answer import Shape
from forebay.dialects.imaging import ImageRules, ImageTask
from forebay.dialects.items import ItemRules, Items
from forebay.errors import ForebayError, InvalidRequest
from forebay.inference import Priority, Request

if TYPE_CHECKING:
    from forebay.dialects.speech import SpeechTask

CHOICES_MAX = 8
STOPS_MAX = 4
LOGPROBS_MAX = 20
TOKENS_MAX = 4_194_304
FIELDS_MAX = 50_000  # each costs microseconds on the event loop, and every stream waits meanwhile
_LARGE_BODY_BYTES = 262_144
_FIELD = re.compile(rb'(?<!\\)(?:\\\\)*"[ \t\r\n]*:')  # a quote that ends a name; not one inside a text
_REASON_CHARS_MAX = 300
_BYTES_PER_TOKEN = 4  # of a text in English
_PARAM_CHARS_MAX = 64  # of a part of the name of a field, which its caller has made up

Tier = Literal["auto", "default", "flex", "scale", "priority", "fast"]
Extensions = Literal["llama.cpp", "vllm"]
Stop = Annotated[str, Field(max_length=256)]
_TIERS: dict[Tier, tuple[str, Priority]] = {
    "auto": ("default", Priority.DEFAULT),
    "default": ("default", Priority.DEFAULT),
    "flex": ("flex", Priority.LOW),
    "scale": ("scale", Priority.HIGH),
    "priority": ("priority", Priority.HIGH),
    "fast": ("priority", Priority.HIGH),
}


class Wire(BaseModel):
    """A body or a part of one: strict types, no unknown fields, finite numbers."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )


class StreamOptions(Wire):
    """How a stream is to be sent. `include_obfuscation` changes nothing here: nothing is padded."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampling(Wire):
    """The fields that chat and completions share."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES_MAX)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Annotated[tuple[Stop, ...], Field(max_length=STOPS_MAX, fail_fast=True)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=300)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=TOKENS_MAX)] | None = None
    service_tier: Tier | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    # Ours: what local engines offer beyond OpenAI.
    top_k: Annotated[int, Field(ge=0, le=1000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0, le=2)] | None = None


PASSED_ON = (
    *("seed", "stop", "temperature", "top_p", "frequency_penalty", "presence_penalty", "logit_bias"),
    *("top_k", "min_p", "repeat_penalty"),
)


@dataclass(frozen=True, slots=True)
class Call:
    """A parsed request and how its answer is to be written.

    `shape` writes the answer; `kind` is what the engine writes; `legacy_logprobs` is that of /v1/completions. With `forced_tool` the engine was
    made to write one tool call as plain JSON, which becomes a tool call on the way out. `otherwise` gives the same call for
    another model, where the error that it is told is one for which another model stands in. `speech` is the work on a
    recording, `picture` that on an image: of both the request's own body says nothing yet. `image_chars` is how much of the
    request's body are images, which are no tokens.
    """

    request: Request
    kind: Literal["chat", "completion", "items", "speech", "picture"]
    stream: bool
    include_usage: bool
    tier: str
    shape: Shape
    legacy_logprobs: bool = False
    forced_tool: bool = False
    items: Items | None = None
    image_chars: int = 0
    speech: "SpeechTask | None" = None
    picture: ImageTask | None = None
    otherwise: "Otherwise | None" = None

    @property
    def tokens_estimate(self) -> int:
        """About how many tokens it reads."""
        return (len(self.request.body) - self.image_chars) // _BYTES_PER_TOKEN


# The call for another model, where `error` is one for which another model stands in.
Otherwise = Callable[[ForebayError], Call | None]


@dataclass(frozen=True, slots=True)
class Thread:
    """A response that may be kept: its id, and when it was made. `now` tells when it has ended."""

    id: str
    created_at: float
    now: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Context:
    """What the front door knows beside the body.

    `remote_model` is the engine's own name for the model; `enforces_tool_choice` whether it obeys `tool_choice`;
    `extensions` whose additions to the dialect it understands. `images` are `data:` URLs of checked pictures, one for each image of
    the body in its order. `thread` is for a response alone, and none in a line of a batch. `with_recording` tells
    whether a recording came beside the body, and `diarization_model` who tells speakers apart where it names nobody.
    `pictures` is how many images came beside it, `with_mask` whether a mask did, and `picture_rules` what the model can do.
    """

    request_id: str
    project: str
    traceparent: str | None
    max_tokens: int
    slots: int
    remote_model: str | None = None
    enforces_tool_choice: bool = True
    extensions: Extensions | None = None
    items: ItemRules = field(default_factory=ItemRules)
    images: tuple[str, ...] = ()
    thread: Thread | None = None
    with_recording: bool = False
    diarization_model: str = ""
    pictures: int = 0
    with_mask: bool = False
    picture_rules: ImageRules = field(default_factory=ImageRules)


WireT = TypeVar("WireT", bound=Wire)


def parse(kind: type[WireT], raw: bytes) -> WireT:
    """Parse `raw` as `kind`; raises InvalidRequest that names the field."""
    if len(raw) > _LARGE_BODY_BYTES and _has_too_many_fields(raw):
        raise InvalidRequest(f"The body has more than {FIELDS_MAX} fields.", code="invalid_value")
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise _explain(error) from None


def _has_too_many_fields(raw: bytes) -> bool:
    """Counted only where there are quotes enough for it: the pattern takes half a second for the megabytes of an image."""
    return raw.count(b'"') > FIELDS_MAX < sum(1 for _ in islice(_FIELD.finditer(raw), FIELDS_MAX + 1))


def tier_of(body: Sampling) -> tuple[str, Priority]:
    """The tier that is used and echoed, and what it means in line."""
    return _TIERS[body.service_tier or "auto"]


def engine_fields(body: Sampling, context: Context) -> dict[str, Any]:
    """The fields for the engine that all endpoints share; the engine is always asked for a stream."""
    fields = body.model_dump(include=set(PASSED_ON), exclude_none=True)
    if body.n is not None and body.n > 1:
        fields["n"] = body.n
    fields["model"] = context.remote_model or body.model
    fields["max_tokens"] = body.max_tokens or context.max_tokens
    fields["stream"] = True
    fields["stream_options"] = {"include_usage": True}
    return fields


def check_places(places: int, context: Context, param: str) -> None:
    """Refuse a request that needs more places at once than the model has."""
    if places > context.slots:
        raise InvalidRequest(
            f"This request asks for {places} answers at once, and the model has {context.slots} slots.", param=param
        )


def _explain(error: ValidationError) -> InvalidRequest:
    """The first mistake, in OpenAI's words where it has some."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = _param(first["loc"])
    if first["type"] == "json_invalid":
        return InvalidRequest("We could not parse the JSON body of your request.", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"Unrecognized request argument supplied: {param}", param=param)
    if first["type"] == "missing":
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    reason = first["msg"].removeprefix("Value error, ")[:_REASON_CHARS_MAX]  # a wrong tag is quoted in it, whole
    return InvalidRequest(f"Invalid value for '{param}': {reason}.", param=param, code="invalid_value")


def _param(location: tuple[int | str, ...]) -> str:
    """`('messages', 0, 'user', 'content')` -> `messages[0].content`: tags of unions are ours, not the caller's."""
    text = ""
    before: int | str = ""
    for part in location:
        tagged, before = isinstance(before, int) or before == "response_format", part
        if isinstance(part, int):
            text += f"[{part}]"
        elif part in _UNION_TAGS or (tagged and part in _DISCRIMINATORS):
            continue
        elif part.isidentifier() or "[" not in part:
            shown = part[:_PARAM_CHARS_MAX]
            text += f".{shown}" if text else shown
    return text


_UNION_TAGS = frozenset(
    {
        "str",
        "tuple",
        "int",
        "float",
        "bool",
        "list",
        "constrained-str",
        "texts",
        "tokens",
        "token_lists",
        "content_parts",
        *("auto", "server_vad"),
    }
)
_DISCRIMINATORS = frozenset(
    {
        "system",
        "developer",
        "user",
        "assistant",
        "tool",
        "text",
        "image_url",
        "file",
        "refusal",
        "tool_use",
        "tool_result",
        "image",
        "thinking",
        "redacted_thinking",
        "json_object",
        "json_schema",
        *("message", "reasoning", "function_call", "function_call_output", "input_text", "output_text", "input_image"),
    }
)
