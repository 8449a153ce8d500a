"""Dead letters on the wire: what a requeue asks for, and the line that it makes.

It refuses an edit of anything but the body: who asked and where it went stay as they were.
"""

from typing import Annotated, Any, TypeVar

from pydantic import Field
from pydantic_core import to_json

from forebay.dialects.openai.call import Wire, parse

WireT = TypeVar("WireT", bound=Wire)


class RequeueBody(Wire):
    """The body that requeues one dead letter. `body` takes the place of that of its line."""

    body: dict[str, Any] | None = None
    again: bool = False


class RequeueFilter(Wire):
    """The body that requeues all dead letters that fit."""

    kind: Annotated[str, Field(max_length=32)] | None = None
    job: Annotated[str, Field(max_length=64)] | None = None
    code: Annotated[str, Field(max_length=64)] | None = None


def parse_or_default(body: type[WireT], raw: bytes) -> WireT:
    """The body that `raw` holds; nothing at all asks for nothing special. Raises InvalidRequest."""
    return parse(body, raw or b"{}")


def request_line(custom_id: str, endpoint: str, body: dict[str, Any]) -> bytes:
    """One line of an input file."""
    return to_json({"custom_id": custom_id, "method": "POST", "url": endpoint, "body": body})
