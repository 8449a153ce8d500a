"""What a call may use at most, before anybody has counted: pure.

No tokenizer makes more tokens of a text than it has bytes, and no engine writes more than it is allowed to. It refuses to be
clever: an estimate that is too low would let a project go beyond its quota.
"""

from pydantic_core import from_json, to_json

from forebay.dialects.items import Contents
from forebay.dialects.openai.call import Call
from forebay.quotas import Amounts

_TOKENS_OF_IMAGE = 4096
_TOKENS_OF_ITEM = 8  # what stands around a text that is read for itself
_IMAGE = b"data:image/"


def at_most(call: Call) -> Amounts:
    """A request, and its tokens. How long a recording is and how large pictures are is known only later."""
    if call.items is not None:
        return Amounts(requests=1, tokens=_of_items(call.items.contents))
    if call.kind in {"chat", "completion"}:
        return Amounts(requests=1, tokens=_of_text(call))
    return Amounts(requests=1)


def _of_text(call: Call) -> int:
    request = call.request
    written = from_json(request.body).get("max_tokens")
    if written is None:  # it asks how many tokens there are, and for none
        return 0
    read = len(request.body) - call.image_chars
    if call.image_chars:
        read += _TOKENS_OF_IMAGE * request.body.count(_IMAGE)
    return (read + int(written)) * request.places


def _of_items(contents: Contents) -> int:
    around = _TOKENS_OF_ITEM + len(to_json(contents.fields))  # the query of a score is read with each document
    sizes = sum(len(each.encode()) if isinstance(each, str) else len(each) for each in contents.all)
    return sizes + around * len(contents.all)
