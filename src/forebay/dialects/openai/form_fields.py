"""Forms as the JSON that a batch line or a plain request has for the same.

It refuses nothing by itself: what is no number or no word of truth stays a text, and is refused as one by name.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json, to_json

from forebay.dialects.openai.call import Wire

_TRUTH = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, slots=True)
class FormFields:
    """What the fields of one kind of form mean, by their names; those that are not named here are texts.

    `lists` may be there several times, `large` have megabytes, `structured` be JSON themselves. Of `nested` fields the
    parts have names of their own, as in `outer[inner]`. `left_out` are those of the body that no form has.
    """

    numbers: frozenset[str] = frozenset()
    flags: frozenset[str] = frozenset()
    lists: frozenset[str] = frozenset()
    large: frozenset[str] = frozenset()
    structured: frozenset[str] = frozenset()
    nested: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()

    def names(self, body: type[Wire]) -> frozenset[str]:
        """The names that the fields of a form for `body` may have."""
        plain = frozenset(body.model_fields) - self.left_out
        nested = {f"{outer}[{inner}]" for outer, inners in self.nested.items() if outer in plain for inner in inners}
        return plain | {f"{name}[]" for name in plain & self.lists} | nested

    def json_of(self, fields: Iterable[tuple[str, str]]) -> bytes:
        """The body that the fields of a form stand for. An empty field is as if it were not there."""
        body: dict[str, Any] = {}
        for name, text in fields:
            plain, _, inner = name.removesuffix("[]").partition("[")
            if not text:
                continue
            if inner:
                nested = body.setdefault(plain, {})
                if isinstance(nested, dict):
                    nested[inner.removesuffix("]")] = self._value(inner.removesuffix("]"), text)
            elif plain in self.lists:
                body.setdefault(plain, []).append(self._value(plain, text))
            else:
                body[plain] = self._value(plain, text)
        return to_json(body)

    def _value(self, name: str, text: str) -> Any:
        if name in self.numbers:
            return _number(text)
        if name in self.flags:
            return _TRUTH.get(text.lower(), text)
        if name in self.structured and text.lstrip()[:1] in {"{", "["}:
            try:
                return from_json(text)
            except ValueError:
                return text
        return text


def _number(text: str) -> int | float | str:
    try:
        number = float(text)
        return int(text) if text.strip().lstrip("+-").isdecimal() else number if math.isfinite(number) else text
    except ValueError:
        return text
