"""POST /v1/messages and its count_tokens: the bodies that we accept, and the chat that each of them is.

It has no way of its own to a model: a body becomes that of a chat, and its answer is written from what a chat streams. It
refuses unknown fields of a body, and blocks in the mouth of a role that cannot have said them.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_core import to_json

from forebay.dialects.anthropic.blocks import (
    Block,
    ImageBlock,
    Message,
    Metadata,
    OutputConfig,
    OutputFormat,
    System,
    TextBlock,
    Thinking,
    ThinkingBlock,
    Tool,
    ToolChoice,
    ToolResultBlock,
    Tools,
    ToolUseBlock,
)
from forebay.dialects.anthropic.events import CountedTokens, Messages
from forebay.dialects.images import ImageRef
from forebay.dialects.openai.call import STOPS_MAX, TOKENS_MAX, Call, Context, Stop, Wire, parse
from forebay.dialects.openai.chat import MESSAGES_MAX, ChatBody, chat_call
from forebay.dialects.tokens import count_path
from forebay.errors import InvalidRequest

_LOOKED_AT = "data:,"  # stands for an image, which is large; the one of `Context.images` takes its place
PATH = "/v1/messages"
COUNT_PATH = "/v1/messages/count_tokens"
_SPOKEN = {
    "user": frozenset({"text", "image", "tool_result"}),
    "assistant": frozenset({"text", "thinking", "redacted_thinking", "tool_use"}),
    "system": frozenset({"text"}),
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class CountBody(Wire):
    """The body of POST /v1/messages/count_tokens.

    Accepted and without effect: `cache_control`, `context_management`, `thinking.budget_tokens`, `output_config.effort`.
    """

    model: Annotated[str, Field(min_length=1, max_length=256)]
    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=MESSAGES_MAX, fail_fast=True)]
    system: System | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    cache_control: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None
    speed: Literal["standard", "fast"] | None = None


class MessagesBody(CountBody):
    """The body of POST /v1/messages. Without effect as well: `diagnostics`, `inference_geo`."""

    max_tokens: Annotated[int, Field(ge=1, le=TOKENS_MAX)]
    stream: bool | None = None
    stop_sequences: Annotated[tuple[Stop, ...], Field(max_length=STOPS_MAX, fail_fast=True)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1000)] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    diagnostics: dict[str, Any] | None = None
    inference_geo: Annotated[str, Field(max_length=64)] | None = None


def messages_call(body: MessagesBody, context: Context) -> Call:
    """The call that `body` asks for. Raises InvalidRequest."""
    fields = {
        **_conversation(body),
        "max_tokens": body.max_tokens,
        "stop": [stop for stop in body.stop_sequences or () if stop],
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "user": body.metadata.user_id if body.metadata else None,
        "service_tier": "fast" if body.speed == "fast" else None,
    }
    call = _chat_call(fields, context)
    request = call.request
    if context.extensions == "llama.cpp" and fields["stop"]:
        # The only way to hear which of them it met.
        request = replace(request, body=request.body[:-1] + b',"verbose":true}')
    shape = Messages(context.request_id, shows_thinking=_shows_thinking(body.thinking))
    return replace(call, request=request, stream=bool(body.stream), shape=shape)


def count_call(body: CountBody, context: Context) -> Call:
    """The call that counts the tokens of `body`: the same chat, which is only read. Raises InvalidRequest."""
    path = count_path(context)
    call = _chat_call({**_conversation(body), "max_tokens": 1}, context)
    return replace(call, request=replace(call.request, path=path), shape=CountedTokens(context.request_id))


def message_images(body: CountBody) -> tuple[ImageRef, ...]:
    """Its images, in the order in which they come in the chat that it becomes: `Context.images` gives them back in it."""
    found = []
    for number, message in enumerate(body.messages):
        if message.role == "user" and isinstance(message.content, tuple):
            places = [(f"messages[{number}].content[{index}]", block) for index, block in enumerate(message.content)]
            found += [
                ref for place, block in places if isinstance(block, ToolResultBlock) for ref in _refs(place, block)
            ]
            found += [
                ImageRef(f"{place}.source", url=block.url) for place, block in places if isinstance(block, ImageBlock)
            ]
    return tuple(found)


def _refs(place: str, result: ToolResultBlock) -> Iterator[ImageRef]:
    for index, block in enumerate(result.content if isinstance(result.content, tuple) else ()):
        if isinstance(block, ImageBlock):
            yield ImageRef(f"{place}.content[{index}].source", url=block.url)


def _shows_thinking(thinking: Thinking | None) -> bool:
    return thinking is None or (thinking.type != "disabled" and thinking.display != "omitted")


def _chat_call(fields: dict[str, Any], context: Context) -> Call:
    return chat_call(_chat_body(fields), context)


def _chat_body(fields: dict[str, Any]) -> ChatBody:
    return parse(ChatBody, to_json({name: value for name, value in fields.items() if value not in (None, [])}))


def _conversation(body: CountBody) -> dict[str, Any]:
    """The fields of a chat that say what it is about."""
    messages = [_system_message(body.system)] if body.system else []
    for index, message in enumerate(body.messages):
        messages += _chat_messages(message, f"messages[{index}]")
    if not messages:
        raise InvalidRequest("The messages are empty.", param="messages")
    choice = body.tool_choice
    wanted = (body.output_config.format if body.output_config else None) or body.output_format
    return {
        "model": body.model,
        "messages": messages,
        "tools": [_chat_tool(tool) for tool in body.tools or ()],
        "tool_choice": _chat_choice(choice),
        "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
        "response_format": _chat_format(wanted) if wanted else None,
        "reasoning_effort": "none" if body.thinking and body.thinking.type == "disabled" else None,
    }


def _system_message(system: str | tuple[TextBlock, ...]) -> dict[str, Any]:
    return {"role": "system", "content": system if isinstance(system, str) else _joined(system)}


def _chat_messages(message: Message, place: str) -> Iterator[dict[str, Any]]:
    """One turn as the messages of a chat: what tools answered first, then the rest."""
    content = message.content
    if isinstance(content, str):
        yield {"role": message.role, "content": content}
        return
    for index, block in enumerate(content):
        if block.type not in _SPOKEN[message.role]:
            raise InvalidRequest(
                f"A message of the role {message.role} has no `{block.type}` block.", param=f"{place}.content[{index}]"
            )
    if message.role == "assistant":
        yield _assistant_message(content)
        return
    results = [block for block in content if isinstance(block, ToolResultBlock)]
    yield from (_tool_message(result) for result in results)
    shown = [block for result in results for block in _images_of(result)]
    said = [*shown, *(block for block in content if isinstance(block, TextBlock | ImageBlock))]
    if said or not results:
        yield {"role": message.role, "content": _chat_content(said)}


def _assistant_message(content: tuple[Block, ...]) -> dict[str, Any]:
    calls = [_chat_tool_call(block) for block in content if isinstance(block, ToolUseBlock)]
    thoughts = "\n".join(block.thinking for block in content if isinstance(block, ThinkingBlock))
    return {
        "role": "assistant",
        "content": _joined(block for block in content if isinstance(block, TextBlock)),
        **({"tool_calls": calls} if calls else {}),
        **({"reasoning_content": thoughts} if thoughts else {}),
    }


def _chat_tool_call(block: ToolUseBlock) -> dict[str, Any]:
    function = {"name": block.name, "arguments": to_json(block.input).decode()}
    return {"id": block.id, "type": "function", "function": function}


def _tool_message(result: ToolResultBlock) -> dict[str, Any]:
    content = result.content or ""
    if not isinstance(content, str):
        content = _joined(block for block in content if isinstance(block, TextBlock))
    if result.is_error:
        content = f"Error: {content}"  # a chat has no other way to say so
    return {"role": "tool", "tool_call_id": result.tool_use_id, "content": content}


def _images_of(result: ToolResultBlock) -> list[ImageBlock]:
    """The images among what a tool answered; in a chat the user shows them."""
    content = result.content if isinstance(result.content, tuple) else ()
    return [block for block in content if isinstance(block, ImageBlock)]


def _chat_content(blocks: list[TextBlock | ImageBlock]) -> Any:
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    if len(texts) == len(blocks):
        return _joined(texts)
    return [
        {"type": "text", "text": block.text}
        if isinstance(block, TextBlock)
        else {"type": "image_url", "image_url": {"url": _LOOKED_AT}}
        for block in blocks
    ]


def _joined(blocks: Any) -> str:
    return "\n".join(block.text for block in blocks)


def _chat_tool(tool: Tool) -> dict[str, Any]:
    if tool.input_schema is None or tool.type not in {None, "custom"}:
        raise InvalidRequest(
            f"The tool {tool.name} is one that a provider runs. Send tools of your own, with an `input_schema`.",
            param="tools",
            code="capability_not_supported",
        )
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _chat_choice(choice: ToolChoice | None) -> Any:
    if choice is None or choice.type != "tool":
        return _CHOICES[choice.type] if choice else None
    if choice.name is None:
        raise InvalidRequest("`tool_choice` of the type `tool` needs a `name`.", param="tool_choice.name")
    return {"type": "function", "function": {"name": choice.name}}


def _chat_format(wanted: OutputFormat) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted.schema_, "strict": True}}
