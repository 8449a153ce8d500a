"""POST /v1/chat/completions: the body that we accept, and the engine's body made from it.

It refuses what would be ignored in silence: audio, images without a vision model, web search. No address of an image goes
into the engine's body: what stands there was checked and written by this server.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag
from pydantic_core import to_json

from forebay.dialects.images import ImageRef
from forebay.dialects.openai.call import (
    LOGPROBS_MAX,
    TOKENS_MAX,
    Call,
    Context,
    Sampling,
    Wire,
    check_places,
    engine_fields,
    tier_of,
)
from forebay.dialects.openai.events import GENERATION
from forebay.dialects.openai.schema import check_schema
from forebay.errors import InvalidRequest
from forebay.inference import Capability, Request

MESSAGES_MAX = 4_096
TOOLS_MAX = 128
_Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]


class TextPart(Wire):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageUrl(Wire):
    """Where an image is."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Wire):
    """An image, in a `data:` URL or at an address."""

    type: Literal["image_url"]
    image_url: ImageUrl


class FileId(Wire):
    """Which file."""

    file_id: Annotated[str, Field(min_length=1, max_length=256)]


class FilePart(Wire):
    """An image that was uploaded."""

    type: Literal["file"]
    file: FileId


class RefusalPart(Wire):
    """What a model refused to do, in an earlier turn."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | ImagePart | FilePart | RefusalPart, Field(discriminator="type")]
_Parts = Annotated[tuple[Part, ...], Field(max_length=1_024, fail_fast=True)]


def _form_of(content: Any) -> str:
    return "content_parts" if isinstance(content, list | tuple) else "str"


Content = Annotated[
    Annotated[str, Tag("str")] | Annotated[_Parts, Tag("content_parts")], Discriminator(_form_of)
]  # by its form, so that a mistake in a part is told as such


class FunctionCall(Wire):
    """A function's name and its arguments as JSON text."""

    name: _Name
    arguments: str


class ToolCall(Wire):
    """A call that the model made in an earlier turn."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"]
    function: FunctionCall


class InputMessage(Wire):
    """What the system, the developer or the user says."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: Annotated[str, Field(max_length=64)] | None = None


class AssistantMessage(Wire):
    """What the model said in an earlier turn. Fields that only answers have are taken back and dropped."""

    role: Literal["assistant"]
    content: Content | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    tool_calls: Annotated[tuple[ToolCall, ...], Field(max_length=TOOLS_MAX, fail_fast=True)] | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: tuple[Any, ...] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Wire):
    """What a tool answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Annotated[str, Field(max_length=256)]


Message = Annotated[InputMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Wire):
    """A function that the model may call."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Wire):
    """A tool; functions are the only ones."""

    type: Literal["function"]
    function: Function


class NamedFunction(Wire):
    """The name of a function."""

    name: _Name


class NamedTool(Wire):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Wire):
    """The schema that an answer must satisfy."""

    name: _Name
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    strict: bool | None = None


class TextFormat(Wire):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Wire):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Wire):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class ChatBody(Sampling):
    """The body of POST /v1/chat/completions.

    Accepted and without effect: `user`, `metadata`, `store` (nothing is stored), `safety_identifier`,
    `prompt_cache_key`, `prompt_cache_retention`, `verbosity`, `reasoning_effort` but `none`.
    """

    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=MESSAGES_MAX, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=TOKENS_MAX)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=LOGPROBS_MAX)] | None = None
    tools: Annotated[tuple[Tool, ...], Field(max_length=TOOLS_MAX, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[tuple[Literal["text"], ...], Field(max_length=1, fail_fast=True)] | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    store: bool | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_retention: Annotated[str, Field(max_length=64)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


def images_of(body: ChatBody) -> tuple[ImageRef, ...]:
    """Its images, in the order in which `chat_call` wants to have them back as `Context.images`."""
    found = []
    for number, message in enumerate(body.messages):
        for index, part in enumerate(message.content if isinstance(message.content, tuple) else ()):
            place = f"messages[{number}].content[{index}]"
            if isinstance(part, ImagePart):
                image = part.image_url
                found.append(ImageRef(f"{place}.image_url.url", url=image.url, low=image.detail == "low"))
            elif isinstance(part, FilePart):
                found.append(ImageRef(f"{place}.file.file_id", file_id=part.file.file_id))
    return tuple(found)


def chat_call(body: ChatBody, context: Context) -> Call:
    """The call that `body` asks for. Raises InvalidRequest."""
    _check(body)
    places = body.n or 1
    check_places(places, context, "n")
    fields = engine_fields(body, context)
    images = iter(context.images)
    fields["messages"] = [_engine_message(message, images) for message in body.messages]
    if body.max_completion_tokens is not None:
        fields["max_tokens"] = body.max_completion_tokens
    if body.reasoning_effort == "none" and context.extensions:
        fields["chat_template_kwargs"] = {"enable_thinking": False}
    if body.logprobs:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    wants_tools = bool(body.tools) and body.tool_choice != "none"
    if body.response_format is not None:
        fields["response_format"] = body.response_format.model_dump(exclude_none=True, by_alias=True)
    forced = _forced_tools(body) if wants_tools and not context.enforces_tool_choice else ()
    if forced:
        fields |= {
            "tools": [tool.model_dump(exclude_none=True) for tool in forced],
            "response_format": _as_format(forced),
        }
    elif wants_tools:
        fields |= body.model_dump(include={"tools", "tool_choice", "parallel_tool_calls"}, exclude_none=True)
    tier, priority = tier_of(body)
    request = Request(
        id=context.request_id,
        project=context.project,
        model=body.model,
        capability=Capability.CHAT,
        path="/v1/chat/completions",
        body=to_json(fields),
        priority=priority,
        places=places,
        tools=wants_tools,
        traceparent=context.traceparent,
    )
    options = body.stream_options
    return Call(
        request,
        "chat",
        bool(body.stream),
        bool(options and options.include_usage),
        tier,
        GENERATION,
        forced_tool=bool(forced),
        image_chars=sum(map(len, context.images)),
    )


def _forced_tools(body: ChatBody) -> tuple[Tool, ...]:
    """The tools of which one must be called; none if the model may choose not to."""
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        return tuple(tool for tool in body.tools or () if tool.function.name == name)
    return (body.tools or ()) if body.tool_choice == "required" else ()


def _as_format(tools: tuple[Tool, ...]) -> dict[str, Any]:
    """A response format that one call of one of `tools` satisfies and nothing else does."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return {"type": "json_schema", "json_schema": {"name": "tool_call", "schema": {"anyOf": calls}}}


def _check(body: ChatBody) -> None:
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise InvalidRequest("Set `max_completion_tokens` or `max_tokens`, not both.", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs` to be true.", param="top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("`stream_options` needs `stream` to be true.", param="stream_options")
    _check_tools(body)
    if isinstance(body.response_format, SchemaFormat):
        check_schema(body.response_format.json_schema.schema_, "response_format.json_schema.schema")


def _check_tools(body: ChatBody) -> None:
    names = [tool.function.name for tool in body.tools or ()]
    if body.tool_choice not in {None, "none"} and not names:
        raise InvalidRequest("`tool_choice` needs `tools`.", param="tool_choice")
    if isinstance(body.tool_choice, NamedTool) and body.tool_choice.function.name not in names:
        raise InvalidRequest("`tool_choice` names a function that is not in `tools`.", param="tool_choice")
    for index, tool in enumerate(body.tools or ()):
        check_schema(tool.function.parameters or {}, f"tools[{index}].function.parameters")


def _engine_message(message: InputMessage | AssistantMessage | ToolMessage, images: Iterator[str]) -> dict[str, Any]:
    fields = message.model_dump(
        include={"role", "name", "tool_calls", "tool_call_id", "reasoning_content"}, exclude_none=True
    )
    if isinstance(message.content, tuple):
        fields["content"] = [_engine_part(part, images) for part in message.content]
    elif message.content is not None or message.role == "assistant":
        fields["content"] = message.content or ""
    if message.role == "developer":
        fields["role"] = "system"
    return fields


def _engine_part(part: TextPart | ImagePart | FilePart | RefusalPart, images: Iterator[str]) -> dict[str, Any]:
    match part:
        case TextPart(text=text) | RefusalPart(refusal=text):
            return {"type": "text", "text": text}
        case ImagePart() | FilePart():
            picture = next(images, None)
            if picture is None:
                raise InvalidRequest(
                    "This model does not take images.", param="messages", code="capability_not_supported"
                )
            return {"type": "image_url", "image_url": {"url": picture}}
