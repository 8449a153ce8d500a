"""The nouns that cross every wall: Capability, Priority, Request, Usage.

This room holds values only. It refuses to know HTTP frameworks, engines and stores.
"""

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum


class Capability(StrEnum):
    """What a model can be asked for."""

    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"
    RERANK = "rerank"
    TRANSCRIPTION = "transcription"
    TRANSLATION = "translation"
    ALIGNMENT = "alignment"
    DIARIZATION = "diarization"
    IMAGE_EDIT = "image_edit"
    IMAGE_GENERATION = "image_generation"


class Priority(IntEnum):
    """Who goes first: the lower value. Online tiers come from `service_tier`; batch work is below all of them."""

    HIGH = 0
    DEFAULT = 1
    LOW = 2
    BATCH = 3


@dataclass(frozen=True, slots=True)
class Request:
    """One piece of work for a model, checked and ready for an engine.

    `body` is the engine's JSON (UTF-8), built from allow-listed fields alone; for a generation it always asks for a stream.
    `places` is how many of the replica's slots it fills at once (choices times prompts); `tools` that it needs a chat
    template with tools; `caller_key` is the caller's own key for an upstream, and shows nowhere.
    """

    id: str
    project: str
    model: str
    capability: Capability
    path: str
    body: bytes
    priority: Priority = Priority.DEFAULT
    places: int = 1
    tools: bool = False
    traceparent: str | None = None
    caller_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request used."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens
