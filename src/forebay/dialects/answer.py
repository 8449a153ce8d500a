"""What every dialect offers for writing an answer: a relay for streams, a gatherer for whole bodies, an error in its shape.

It holds the protocols alone, and refuses to know any dialect.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from forebay.errors import ForebayError
from forebay.inference import Usage

if TYPE_CHECKING:
    from forebay.dialects.openai.call import Call


@dataclass(slots=True)
class Progress:
    """What is known of an answer while it comes. `prompt_estimate` is for an engine that does not say what it has read."""

    usage: Usage | None = None
    events: int = 0
    content_seen: bool = False
    prompt_estimate: int = 0

    @property
    def used(self) -> Usage:
        """The tokens so far, as every door charges them.

        Where the engine has counted none, the prompt is estimated and each event is one; before its first there are none.
        """
        return self.usage or Usage(self.prompt_estimate if self.events else 0, self.events)

    def note_usage(self, event: dict[str, Any]) -> None:
        """Take the usage out of `event`, if it has one."""
        usage = event.get("usage")
        if isinstance(usage, dict):
            details = usage.get("prompt_tokens_details")
            cached = details.get("cached_tokens") if isinstance(details, dict) else 0
            self.usage = Usage(count(usage.get("prompt_tokens")), count(usage.get("completion_tokens")), count(cached))


class Relay(Protocol):
    """Turns an engine's stream into the client's."""

    progress: Progress

    @property
    def done(self) -> bool:
        """Whether the engine has said that its stream is whole."""

    def feed(self, data: bytes) -> bytes:
        """The bytes to send on for `data`; may be empty. Raises EngineGarbled, or what an error event means."""


class Gatherer(Protocol):
    """Puts an engine's answer together into one body."""

    progress: Progress

    def feed(self, data: bytes) -> None:
        """Take in `data`. Raises EngineGarbled, or what an error event means."""

    def body(self) -> bytes:
        """The whole answer as JSON. Raises EngineGarbled if there is none."""


class Shape(Protocol):
    """How the answers of one endpoint are written; made with the call, and asked when its answer begins."""

    def relay(self, call: "Call", *, rename: bool) -> Relay:
        """For a stream; with `rename` the engine calls the model by another name."""

    def gatherer(self, call: "Call") -> Gatherer:
        """For a whole body."""

    def error_event(self, error: ForebayError) -> bytes:
        """The last event of a stream that went wrong, in the form that the dialect's own client raises."""

    def error_body(self, error: ForebayError) -> Any:
        """The JSON of an answer that is an error."""


def count(value: Any) -> int:
    """A count that an engine has sent; 0 for what is none."""
    return value if isinstance(value, int) and 0 <= value < 2**53 else 0
