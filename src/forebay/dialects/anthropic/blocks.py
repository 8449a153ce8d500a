"""What a body of /v1/messages is made of: content blocks, tools and the choices between them.

Fields of a block or a tool that are not listed here are dropped: they are hints of newer clients, `cache_control` among
them. It refuses kinds of blocks that no engine here could be shown.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from forebay.dialects.openai.call import Wire
from forebay.dialects.openai.chat import TOOLS_MAX

BLOCKS_MAX = 1_024
_Id = Annotated[str, Field(min_length=1, max_length=256)]
_Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]


def _form_of(content: Any) -> str:
    """Texts and lists are told apart first, so that a mistake inside a list is named as what it is."""
    return "str" if isinstance(content, str) else "list"


_FORM = Discriminator(_form_of)
_Text = Annotated[str, Tag("str")]


class _Part(Wire):
    model_config = ConfigDict(extra="ignore")


class TextBlock(_Part):
    """A piece of text."""

    type: Literal["text"]
    text: str


class Base64Source(_Part):
    """An image that is in the body."""

    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: str


class UrlSource(_Part):
    """An image that is elsewhere."""

    type: Literal["url"]
    url: str


class ImageBlock(_Part):
    """An image."""

    type: Literal["image"]
    source: Annotated[Base64Source | UrlSource, Field(discriminator="type")]

    @property
    def url(self) -> str:
        """The image as an address."""
        source = self.source
        return source.url if isinstance(source, UrlSource) else f"data:{source.media_type};base64,{source.data}"


class ThinkingBlock(_Part):
    """What the model thought in an earlier turn. Its signature is of no use here: nothing is kept back from the caller."""

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(_Part):
    """Thoughts that were encrypted elsewhere; they are dropped."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(_Part):
    """A call that the model made in an earlier turn."""

    type: Literal["tool_use"]
    id: _Id
    name: _Name
    input: dict[str, Any]


_Shown = Annotated[TextBlock | ImageBlock, Field(discriminator="type")]
_Shows = Annotated[tuple[_Shown, ...], Field(max_length=BLOCKS_MAX, fail_fast=True)]


class ToolResultBlock(_Part):
    """What a tool answered."""

    type: Literal["tool_result"]
    tool_use_id: _Id
    content: Annotated[_Text | Annotated[_Shows, Tag("list")], _FORM] | None = None
    is_error: bool | None = None


Block = Annotated[
    TextBlock | ImageBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
]
_Blocks = Annotated[tuple[Block, ...], Field(max_length=BLOCKS_MAX, fail_fast=True)]
_Texts = Annotated[tuple[TextBlock, ...], Field(max_length=BLOCKS_MAX, fail_fast=True)]
System = Annotated[_Text | Annotated[_Texts, Tag("list")], _FORM]


class Message(_Part):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[_Text | Annotated[_Blocks, Tag("list")], _FORM]


class Tool(_Part):
    """A tool that the caller runs; those that a provider runs have no `input_schema`."""

    type: Annotated[str, Field(max_length=64)] | None = None
    name: _Name
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


Tools = Annotated[tuple[Tool, ...], Field(max_length=TOOLS_MAX, fail_fast=True)]


class ToolChoice(_Part):
    """Whether and which tools the model is to use."""

    type: Literal["auto", "any", "tool", "none"]
    name: _Name | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(_Part):
    """Whether the model is to think first. How long it may is its own affair: `budget_tokens` has no effect."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(_Part):
    """The schema that the answer must satisfy."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(_Part):
    """How the answer is to look; `effort` has no effect."""

    effort: Annotated[str, Field(max_length=32)] | None = None
    format: OutputFormat | None = None


class Metadata(_Part):
    """Whom the request is for."""

    user_id: Annotated[str, Field(max_length=512)] | None = None
