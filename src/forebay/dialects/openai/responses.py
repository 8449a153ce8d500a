"""POST /v1/responses: the body that we accept, and the call made from it by way of a chat.

It refuses what would be ignored in silence: tools that run at OpenAI, conversations and prompts that are kept there,
truncation, moderation; and in a line of a batch whatever needs a response that is kept.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_core import from_json, to_json

from forebay.dialects.images import ImageRef
from forebay.dialects.openai.call import (
    LOGPROBS_MAX,
    TOKENS_MAX,
    Call,
    Context,
    Tier,
    Wire,
)
from forebay.dialects.openai.chat import (
    TOOLS_MAX,
    ChatBody,
    Function,
    InputMessage,
    JsonSchema,
    NamedFunction,
    NamedTool,
    ObjectFormat,
    ResponseFormat,
    SchemaFormat,
    TextFormat,
    Tool,
    chat_call,
    images_of,
)
from forebay.dialects.openai.responses_events import ResponseShape
from forebay.dialects.openai.responses_items import Input, items_of, messages_of
from forebay.errors import InvalidRequest

_Text512 = Annotated[str, Field(max_length=512)]
_Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
LOGPROBS = "message.output_text.logprobs"


class StreamOptions(Wire):
    """`include_obfuscation` changes nothing here: nothing is padded."""

    include_obfuscation: bool | None = None


class FunctionTool(Wire):
    """A function that the model may call; the only kind of tool."""

    type: Literal["function"]
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenFunction(Wire):
    """A function by its name."""

    type: Literal["function"]
    name: _Name


class AllowedTools(Wire):
    """Some of the tools, of which one may or must be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[tuple[ChosenFunction, ...], Field(min_length=1, max_length=TOOLS_MAX)]


class SchemaText(Wire):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    name: _Name
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class TextConfig(Wire):
    """The form of the text. `verbosity` has no effect."""

    format: Annotated[TextFormat | ObjectFormat | SchemaText, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Wire):
    """Whether the model is to think: not with the effort `none`. Other efforts have no effect, and no summary is made."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto"] | None = None


class ResponseBody(Wire):
    """The body of POST /v1/responses.

    Accepted and without effect: `user`, `metadata`, `safety_identifier`, `prompt_cache_key`, `prompt_cache_retention`,
    `max_tool_calls`, `text.verbosity`, `include` of encrypted reasoning (it comes in plain text).
    """

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Input
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(max_length=64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    background: bool | None = None
    store: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=TOKENS_MAX)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=LOGPROBS_MAX)] | None = None
    tools: Annotated[tuple[FunctionTool, ...], Field(max_length=TOOLS_MAX, fail_fast=True)] | None = None
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[ChosenFunction | AllowedTools, Field(discriminator="type")]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["disabled"] | None = None
    include: (
        Annotated[
            tuple[Literal["message.output_text.logprobs", "reasoning.encrypted_content"], ...], Field(max_length=8)
        ]
        | None
    ) = None
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], _Text512], Field(max_length=16)] | None = None
    service_tier: Tier | None = None
    user: _Text512 | None = None
    safety_identifier: _Text512 | None = None
    prompt_cache_key: _Text512 | None = None
    prompt_cache_retention: Annotated[str, Field(max_length=64)] | None = None

    @property
    def kept(self) -> bool:
        """Whether the response can be read again later, as it can unless the caller says otherwise."""
        return self.store is not False


def continued(raw: bytes, before: Sequence[dict[str, Any]]) -> bytes:
    """The body `raw`, which is a good one, with the items of the conversation so far in front of its own."""
    fields = from_json(raw)
    own = fields["input"]
    fields["input"] = [*before, *([{"role": "user", "content": own}] if isinstance(own, str) else own)]
    return to_json(fields)


def response_images(body: ResponseBody) -> tuple[ImageRef, ...]:
    """Its images, in the order in which `response_call` wants to have them back. Raises InvalidRequest."""
    return tuple(replace(ref, param="input") for ref in images_of(_chat(body)))


def response_call(body: ResponseBody, context: Context) -> Call:
    """The call that `body` asks for. Raises InvalidRequest."""
    _check(body, context)
    try:
        call = chat_call(_chat(body), context)
    except InvalidRequest as error:
        raise _in_own_words(error) from None
    shape = ResponseShape(_head(body, context, call.tier), context.thread, logprobs=_wants_logprobs(body))
    return Call(
        call.request,
        "chat",
        bool(body.stream),
        include_usage=True,
        tier=call.tier,
        shape=shape,
        forced_tool=call.forced_tool,
        image_chars=call.image_chars,
    )


def _check(body: ResponseBody, context: Context) -> None:
    if context.thread is None:
        for name in ("background", "previous_response_id"):
            if getattr(body, name):
                raise InvalidRequest(f"A line of a batch has no `{name}`: nothing is kept there.", param=name)
    if body.background and not body.kept:
        raise InvalidRequest("`background` needs `store`: the answer is read later.", param="store")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("`stream_options` needs `stream` to be true.", param="stream_options")


def _chat(body: ResponseBody) -> ChatBody:
    """The same request as a chat."""
    messages = list(messages_of(items_of(body.input)))
    if body.instructions:
        messages.insert(0, InputMessage(role="system", content=body.instructions))
    if not messages:
        raise InvalidRequest("`input` says nothing.", param="input")
    tools, choice = _tools(body)
    return ChatBody(
        model=body.model,
        messages=tuple(messages),
        stream=body.stream,
        temperature=body.temperature,
        top_p=body.top_p,
        max_completion_tokens=body.max_output_tokens,
        logprobs=True if _wants_logprobs(body) else None,
        top_logprobs=(body.top_logprobs or 0) if _wants_logprobs(body) else None,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls if tools else None,
        response_format=_format(body),
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        verbosity=body.text.verbosity if body.text else None,
        service_tier=body.service_tier,
    )


def _tools(body: ResponseBody) -> tuple[tuple[Tool, ...] | None, Any]:
    """The tools and the choice among them, in the words of a chat."""
    tools = tuple(
        Tool(type="function", function=Function(**tool.model_dump(exclude={"type"}))) for tool in body.tools or ()
    )
    match body.tool_choice:
        case AllowedTools(mode=mode, tools=allowed):
            names = {tool.name for tool in allowed}
            chosen = tuple(tool for tool in tools if tool.function.name in names)
            if len(chosen) != len(names):
                raise InvalidRequest("`tool_choice` names a function that is not in `tools`.", param="tool_choice")
            return chosen, mode
        case ChosenFunction(name=name):
            return tools or None, NamedTool(type="function", function=NamedFunction(name=name))
        case choice:
            return tools or None, choice if tools or choice == "required" else None


def _format(body: ResponseBody) -> ResponseFormat | None:
    match body.text.format if body.text else None:
        case SchemaText() as own:
            inner = JsonSchema.model_validate(own.model_dump(exclude={"type"}, by_alias=True))
            return SchemaFormat(type="json_schema", json_schema=inner)
        case other:
            return other


def _wants_logprobs(body: ResponseBody) -> bool:
    return body.top_logprobs is not None or LOGPROBS in (body.include or ())


_OWN_WORDS = (
    ("response_format.json_schema.schema", "text.format.schema"),
    (".function.parameters", ".parameters"),
    ("max_completion_tokens", "max_output_tokens"),
    ("response_format", "text.format"),
    ("messages", "input"),
)


def _in_own_words(error: InvalidRequest) -> InvalidRequest:
    """What is wrong with the chat, told of the fields that the caller has sent."""
    param, message = error.param or "", str(error)
    for theirs, own in _OWN_WORDS:
        param, message = param.replace(theirs, own), message.replace(f"`{theirs}`", f"`{own}`")
    return InvalidRequest(message, param=param or None, code=error.code)


def _head(body: ResponseBody, context: Context, tier: str) -> dict[str, Any]:
    """What a response says of its request."""
    tool_choice = body.tool_choice or "auto"
    text = body.text or TextConfig()
    shown: Any = (text.format or TextFormat(type="text")).model_dump(by_alias=True, exclude_none=True, mode="json")
    return {
        "background": bool(body.background),
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": body.model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": tier,
        "store": body.kept and context.thread is not None,
        "temperature": body.temperature,
        "text": {"format": shown, "verbosity": text.verbosity or "medium"},
        "tool_choice": tool_choice if isinstance(tool_choice, str) else tool_choice.model_dump(mode="json"),
        "tools": [_shown_tool(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _shown_tool(tool: FunctionTool) -> dict[str, Any]:
    """A tool with every field, null where it was not sent: the official types require them."""
    return tool.model_dump(mode="json")
