"""Answers that are put together from items, each computed for itself: the vector of an input, the score of a document.

It refuses to know who computes an item, and who keeps it.
"""

import hashlib
import math
import re
from array import array
from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic_core import from_json, to_json

from forebay.dialects.answer import count
from forebay.dialects.openai.errors import from_engine
from forebay.errors import EngineGarbled, InvalidRequest
from forebay.inference import Usage

PART_ITEMS_MAX = 2048
DIMENSIONS_MAX = 65_536
CHARS_PER_TOKEN_MAX = 16  # what is longer than all tokens could be is refused before an engine counts
_DIGEST_BYTES = 24
_FLOAT_BYTES = 4
_LIST = re.compile(rb'"embedding"[ \t\r\n]*:[ \t\r\n]*\[')

Content = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ItemRules:
    """What the front door knows of a model that computes items.

    `fingerprint` changes with whatever its answers depend on. `counted`: its engine tells the tokens of each item.
    `truncation` is the engine's field that allows it to cut what is too long. `logits`: its scores are not yet between 0
    and 1. `input_types`: it reads queries and documents in different ways, and is told which is which.
    """

    fingerprint: str = ""
    counted: bool = False
    truncation: tuple[str, Any] | None = None
    logits: bool = False
    inputs_max: int = PART_ITEMS_MAX
    input_tokens_max: int = 300_000
    documents_max: int = 10_000
    input_types: bool = False

    def truncating(self, truncate: bool | None) -> dict[str, Any]:
        """The engine's field for `truncate`. Raises InvalidRequest where it has none."""
        if not truncate:
            return {}
        if self.truncation is None:
            raise InvalidRequest(
                "The engine of this model cuts nothing. Leave `truncate` out, and send shorter texts.",
                param="truncate",
                code="capability_not_supported",
            )
        return dict([self.truncation])

    def check_size(self, contents: Sequence[Content], param: str) -> None:
        """Refuse more than could be within the limit of tokens; the engine counts them one by one."""
        most = self.input_tokens_max
        texts = sum(len(each) for each in contents if isinstance(each, str))
        tokens = sum(len(each) for each in contents if not isinstance(each, str))
        if tokens + texts // CHARS_PER_TOKEN_MAX > most:
            raise InvalidRequest(
                f"`{param}` has more than {most} tokens in all. Send it in several requests.",
                param=param,
                code="invalid_value",
            )


@dataclass(frozen=True, slots=True)
class Item:
    """What a model made of one content: little-endian numbers, and the tokens that it read if the engine tells."""

    value: bytes
    tokens: int | None


@dataclass(frozen=True, slots=True)
class Part:
    """An engine's answer for some of the contents, in their order."""

    items: Iterator[Item]
    usage: Usage | None


class Items(Protocol):
    """The items of one call. Iterators are work for the event loop, to be done in slices."""

    @property
    def contents(self) -> "Contents":
        """What is to be computed."""

    def param_of(self, place: int | None) -> str:
        """The field of the request that holds the content at `place`, or all of them."""

    def read(self, raw: bytes, places: int) -> Part:
        """The engine's answer for so many contents. Raises EngineGarbled."""

    def render(self, items: Sequence[Item], usage: Usage) -> Iterator[bytes]:
        """The body of the answer, bit by bit. Raises EngineGarbled, InvalidRequest."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What is to be computed, and how: `fields` is the engine's body without `field`, which holds the contents.

    `first` is the same for the first content, where the engine reads that in another way.
    """

    project: str
    model: str
    rules: ItemRules
    field: str
    fields: Mapping[str, Any]
    all: tuple[Content, ...]
    first: Mapping[str, Any] | None = None

    def digests(self) -> Iterator[bytes]:
        """One for each content in order; equal only where the same project would get the same of the same model."""
        base = self._base(self.fields)
        for place, content in enumerate(self.all):
            digest = base.copy() if self.first is None or place else self._base(self.first)
            if isinstance(content, str):
                digest.update(b"s" + content.encode())
            else:
                digest.update(b"t" + array("q", content).tobytes())
            yield digest.digest()

    def body_for(self, places: Sequence[int] | None = None) -> bytes:
        """The engine's body for some of the contents, which are of one group, or for all."""
        wanted = self.all if places is None else [self.all[place] for place in places]
        fields = self.first if self.first is not None and places and places[0] == 0 else self.fields
        return to_json({**fields, self.field: wanted})

    def group(self, place: int) -> int:
        """Which contents the engine can be asked for together: one that has fields of its own is for itself."""
        return int(self.first is not None and place == 0)

    def param_of(self, place: int | None) -> str:
        """The engine's field for the content at `place`, or for all of them; of a single one there is no number."""
        return self.field if place is None or len(self.all) == 1 else f"{self.field}[{place}]"

    def _base(self, fields: Mapping[str, Any]) -> "hashlib.blake2b":
        said = to_json([self.project, self.model, self.rules.fingerprint, self.field, fields])
        return hashlib.blake2b(said + b"\n", digest_size=_DIGEST_BYTES)


def answer_of(raw: bytes) -> dict[str, Any]:
    """An engine's answer as JSON. Raises EngineGarbled, or what an error in it means."""
    try:
        answer = from_json(raw)
    except ValueError:
        raise EngineGarbled from None
    if not isinstance(answer, dict):
        raise EngineGarbled
    if answer.get("error"):
        code = answer["error"].get("code") if isinstance(answer["error"], dict) else None
        raise from_engine(code if isinstance(code, int) and 400 <= code < 600 else 500, raw)
    return answer


def usage_of(answer: Mapping[str, Any]) -> Usage | None:
    """What an engine says that it read."""
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        return None
    return Usage(count(usage.get("prompt_tokens")) or count(usage.get("total_tokens")))


def tokens_of(answer: Mapping[str, Any], places: int, usage: Usage | None) -> list[int | None]:
    """The tokens of each item: as the engine says, or all of them for the only one. Raises EngineGarbled."""
    tokens = answer.get("tokens")
    if tokens is None:
        return [usage.prompt_tokens if usage is not None and places == 1 else None] * places
    if not isinstance(tokens, list) or len(tokens) != places:
        raise EngineGarbled
    return [count(each) for each in tokens]


def read_vectors(raw: bytes, places: int) -> Part:
    """The vectors of an answer in the shape of OpenAI, base64 or lists of numbers."""
    lists = _lists(raw, places)
    answer = answer_of(_without(raw, lists))
    data = answer.get("data")
    if not isinstance(data, list) or len(data) != places:
        raise EngineGarbled
    usage = usage_of(answer)
    tokens = tokens_of(answer, places, usage)
    by_place: list[Any] = [None] * places
    for position, entry in enumerate(data):
        place = entry.get("index", position) if isinstance(entry, dict) else None
        if not isinstance(place, int) or not 0 <= place < places or by_place[place] is not None:
            raise EngineGarbled
        by_place[place] = entry.get("embedding")
    wires = (raw[lists[wire]] if type(wire) is int and 0 <= wire < len(lists) else wire for wire in by_place)
    return Part(_vectors(wires, tokens), usage)


def _lists(raw: bytes, places: int) -> list[slice]:
    """Where lists of numbers are. All at once they would hold up the event loop for most of a second, so each waits."""
    found: list[slice] = []
    while len(found) < places:
        begin = _LIST.search(raw, found[-1].stop if found else 0)
        end = raw.find(b"]", begin.end()) if begin is not None else -1
        if begin is None or end < 0:
            break
        found.append(slice(begin.end() - 1, end + 1))
    return found


def _without(raw: bytes, lists: Sequence[slice]) -> bytes:
    """An answer with the number of each list in its place."""
    bits, done = [], 0
    for number, each in enumerate(lists):
        bits += [raw[done : each.start], b"%d" % number]
        done = each.stop
    return b"".join([*bits, raw[done:]])


def _vectors(wires: Iterable[Any], tokens: Sequence[int | None]) -> Iterator[Item]:
    """Vectors of one length. Raises EngineGarbled."""
    size = 0
    for wire, each in zip(wires, tokens, strict=True):
        value = _vector(wire)
        size = size or len(value)
        if len(value) != size:
            raise EngineGarbled
        yield Item(value, each)


def _vector(wire: Any) -> bytes:
    """Little-endian float32. Raises EngineGarbled for what is no vector."""
    try:
        if isinstance(wire, str):
            value = b64decode(wire, validate=True)
        else:
            value = array("f", from_json(wire) if isinstance(wire, bytes) else wire).tobytes()
    except (ValueError, TypeError, OverflowError):
        raise EngineGarbled from None
    size, rest = divmod(len(value), _FLOAT_BYTES)
    if not 0 < size <= DIMENSIONS_MAX or rest or not math.isfinite(sum(floats_of(value))):
        raise EngineGarbled
    return value


def floats_of(value: bytes) -> "array[float]":
    """The numbers of a vector."""
    floats = array("f")
    floats.frombytes(value)
    return floats
