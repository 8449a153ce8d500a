"""The items of /v1/responses: what a conversation is made of there, and the chat messages that it becomes.

It refuses items of tools that run at OpenAI, files but images, references to items, and the answer to a call that was not made.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from forebay.dialects.openai.call import Wire
from forebay.dialects.openai.chat import (
    MESSAGES_MAX,
    TOOLS_MAX,
    AssistantMessage,
    FileId,
    FilePart,
    FunctionCall,
    ImagePart,
    ImageUrl,
    InputMessage,
    Message,
    RefusalPart,
    TextPart,
    ToolCall,
    ToolMessage,
)
from forebay.errors import InvalidRequest

ITEMS_MAX = MESSAGES_MAX
_Id = Annotated[str, Field(max_length=256)]
_Status = Literal["in_progress", "completed", "incomplete"]
_Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]


class InputText(Wire):
    """What somebody says."""

    type: Literal["input_text"]
    text: str


class OutputText(Wire):
    """What the model said in an earlier turn; what only answers have is taken back and dropped."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[tuple[Any, ...], Field(max_length=1_024)] = ()
    logprobs: tuple[Any, ...] | None = None


class Refusal(Wire):
    """What the model refused to do in an earlier turn."""

    type: Literal["refusal"]
    refusal: str


class InputImage(Wire):
    """An image, in a `data:` URL, at an address or uploaded."""

    type: Literal["input_image"]
    image_url: str | None = None
    file_id: _Id | None = None
    detail: Literal["auto", "low", "high"] | None = None


class SummaryText(Wire):
    """A part of a summary."""

    type: Literal["summary_text"]
    text: str


class ReasoningText(Wire):
    """A part of what the model thought."""

    type: Literal["reasoning_text", "text"]
    text: str


Part = Annotated[InputText | OutputText | Refusal | InputImage, Field(discriminator="type")]
_Parts = Annotated[tuple[Part, ...], Field(max_length=1_024, fail_fast=True)]


def _form_of(content: Any) -> str:
    """What is wrong is told of the form that was meant."""
    return "tuple" if isinstance(content, list | tuple) else "str"


_Content = Annotated[Annotated[str, Tag("str")] | Annotated[_Parts, Tag("tuple")], Discriminator(_form_of)]


class MessageItem(Wire):
    """What somebody said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: _Content
    id: _Id | None = None
    status: _Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class ReasoningItem(Wire):
    """What the model thought in an earlier turn; it goes with what it said next."""

    type: Literal["reasoning"]
    id: _Id | None = None
    summary: Annotated[tuple[SummaryText, ...], Field(max_length=1_024)] = ()
    content: Annotated[tuple[ReasoningText, ...], Field(max_length=1_024)] | None = None
    encrypted_content: None = None
    status: _Status | None = None


class FunctionCallItem(Wire):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: _Id
    name: _Name
    arguments: str
    id: _Id | None = None
    status: _Status | None = None


class FunctionOutputItem(Wire):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: _Id
    output: _Content
    id: _Id | None = None
    status: _Status | None = None


def _type_of(item: Any) -> str:
    if isinstance(item, dict):
        found = item.get("type", "message")
        return found if isinstance(found, str) else ""
    return str(getattr(item, "type", ""))


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")],
    Discriminator(_type_of),
]
_Items = Annotated[tuple[Item, ...], Field(max_length=ITEMS_MAX, fail_fast=True)]
Input = Annotated[Annotated[str, Tag("str")] | Annotated[_Items, Tag("tuple")], Discriminator(_form_of)]
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}


def items_of(given: str | tuple[Item, ...]) -> tuple[Item, ...]:
    """The input as items; a text is what the user says."""
    return (MessageItem(role="user", content=given),) if isinstance(given, str) else given


def listed(items: Sequence[Item], response_id: str) -> list[dict[str, Any]]:
    """The input of a response as it is kept and listed: every item with an id, every text as a part."""
    own = response_id.removeprefix("resp_")
    shown = []
    for number, item in enumerate(items):
        fields = item.model_dump(exclude_none=True, mode="json")
        fields["id"] = f"{_PREFIXES[item.type]}_{own}_in{number}"
        fields["type"] = item.type
        if isinstance(item, MessageItem):
            fields["status"] = "completed"
            if isinstance(item.content, str):
                kind = "output_text" if item.role == "assistant" else "input_text"
                extra: dict[str, Any] = {"annotations": []} if item.role == "assistant" else {}
                fields["content"] = [{"type": kind, "text": item.content, **extra}]
        shown.append(fields)
    return shown


def messages_of(items: Sequence[Item]) -> Iterator[Message]:
    """The chat messages that `items` are. Raises InvalidRequest."""
    said = _Turn()
    called: set[str] = set()
    for item in items:
        match item:
            case ReasoningItem():
                if said.text is not None or said.calls:
                    yield from said.end()
                said.reasoning += "".join(part.text for part in item.content or ())
            case MessageItem(role="assistant"):
                if said.text is not None or said.calls:
                    yield from said.end()
                said.text = _text_of(item.content)
            case FunctionCallItem():
                called.add(item.call_id)
                said.add_call(item)
            case MessageItem():
                yield from said.end()
                yield InputMessage(role=item.role, content=_content(item.content))  # type: ignore[arg-type]  # no assistant
            case FunctionOutputItem():
                yield from said.end()
                if item.call_id not in called:
                    raise InvalidRequest(
                        "A function_call_output has the call_id of no function_call before it.", param="input"
                    )
                yield ToolMessage(role="tool", content=_content(item.output), tool_call_id=item.call_id)
    yield from said.end()


class _Turn:
    """What the model said in one turn, which items tell one by one and a chat message at once."""

    def __init__(self) -> None:
        self.text: str | None = None
        self.reasoning = ""
        self.calls: list[ToolCall] = []

    def add_call(self, item: FunctionCallItem) -> None:
        if len(self.calls) == TOOLS_MAX:
            raise InvalidRequest(f"There are more than {TOOLS_MAX} function calls in one turn.", param="input")
        function = FunctionCall(name=item.name, arguments=item.arguments)
        self.calls.append(ToolCall(id=item.call_id, type="function", function=function))

    def end(self) -> Iterator[Message]:
        """The message, if anything was said; the next turn begins."""
        if self.text is not None or self.calls:
            yield AssistantMessage(
                role="assistant",
                content=self.text,
                tool_calls=tuple(self.calls) or None,
                reasoning_content=self.reasoning or None,
            )
        self.text, self.reasoning, self.calls = None, "", []


def _text_of(content: str | tuple[Part, ...]) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        match part:
            case InputText(text=text) | OutputText(text=text) | Refusal(refusal=text):
                texts.append(text)
            case InputImage():
                raise InvalidRequest("A message of the assistant has no images.", param="input")
    return "".join(texts)


def _image(part: InputImage) -> ImagePart | FilePart:
    if part.image_url is not None and part.file_id is None:
        return ImagePart(type="image_url", image_url=ImageUrl(url=part.image_url, detail=part.detail))
    if part.file_id and part.image_url is None:
        return FilePart(type="file", file=FileId(file_id=part.file_id))
    raise InvalidRequest("An `input_image` has either `image_url` or `file_id`.", param="input")


def _content(content: str | tuple[Part, ...]) -> str | tuple[TextPart | ImagePart | FilePart | RefusalPart, ...]:
    if isinstance(content, str):
        return content
    parts: list[TextPart | ImagePart | FilePart | RefusalPart] = []
    for part in content:
        match part:
            case InputText(text=text) | OutputText(text=text) | Refusal(refusal=text):
                parts.append(TextPart(type="text", text=text))
            case InputImage():
                parts.append(_image(part))
    return tuple(parts)
