"""What requests bring beside words: images, masks and recordings, each with its name and how it is refused.

It holds words alone, and refuses to judge.
"""

from dataclasses import dataclass

from forebay.errors import InvalidRequest, PayloadTooLarge


@dataclass(frozen=True, slots=True)
class Medium:
    """One of them. `types` are the first halves of the media types that a `data:` URL of it may have."""

    name: str
    types: tuple[str, ...]
    example: str

    def invalid(self, message: str) -> InvalidRequest:
        """The refusal of what is none."""
        return InvalidRequest(f"The {self.name} cannot be used. {message}", code="media_invalid")

    def too_large(self, message: str) -> PayloadTooLarge:
        """The refusal of one above a limit."""
        return PayloadTooLarge(f"The {self.name} is too large. {message}", code="media_too_large")


IMAGE = Medium("image", ("image",), "data:image/png;base64,…")
MASK = Medium("mask", ("image",), "data:image/png;base64,…")
RECORDING = Medium("recording", ("audio", "video"), "data:audio/wav;base64,…")
