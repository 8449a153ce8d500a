"""Bounds on what a client may put into a JSON schema before an engine compiles it into a grammar.

It refuses size, depth and repetition that would make the engine spend its memory or time on the grammar; it does not
check that a schema is correct: the engine does.
"""

import re
from typing import Any

from pydantic_core import to_json

from forebay.errors import InvalidRequest

BYTES_MAX = 65_536
DEPTH_MAX = 32
NODES_MAX = 5_000
PATTERN_CHARS_MAX = 256
REPEAT_MAX = 1_000
ALTERNATIVES_MAX = 500
_ALTERNATIVES = ("enum", "anyOf", "oneOf", "properties")
_RANGES = (
    *(("minItems", "maxItems"), ("minLength", "maxLength"), ("minProperties", "maxProperties")),
    *(("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")),
)
_QUANTIFIER = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_REPEATS = frozenset({"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"})


def check_schema(schema: dict[str, Any], param: str) -> None:
    """Raise InvalidRequest if `schema` is too large, deep, wide or repetitive."""
    if len(to_json(schema)) > BYTES_MAX:
        raise InvalidRequest(f"The JSON schema is larger than {BYTES_MAX} bytes.", param=param)
    nodes = alternatives = 0
    stack: list[tuple[Any, int]] = [(schema, 1)]
    while stack:
        node, depth = stack.pop()
        nodes += 1
        if nodes > NODES_MAX or depth > DEPTH_MAX:
            raise InvalidRequest(f"The JSON schema has more than {NODES_MAX} nodes or {DEPTH_MAX} levels.", param=param)
        if isinstance(node, dict):
            _check_keywords(node, param)
            alternatives += sum(len(node[key]) for key in _ALTERNATIVES if isinstance(node.get(key), dict | list))
            if alternatives > ALTERNATIVES_MAX:
                raise InvalidRequest(
                    f"A JSON schema has at most {ALTERNATIVES_MAX} enum values, properties and alternatives.",
                    param=param,
                )
            stack += [(child, depth + 1) for child in node.values() if isinstance(child, dict | list)]
        elif isinstance(node, list):
            stack += [(child, depth + 1) for child in node if isinstance(child, dict | list)]


def _check_keywords(node: dict[str, Any], param: str) -> None:
    for key in _REPEATS & node.keys():
        value = node[key]
        if isinstance(value, int | float) and value > REPEAT_MAX:
            raise InvalidRequest(f"`{key}` in a JSON schema may be {REPEAT_MAX} at most.", param=param)
    for low, high in _RANGES:
        least, most = node.get(low), node.get(high)
        if isinstance(least, int | float) and isinstance(most, int | float) and least > most:
            # An engine may look for a value in an empty range for ever.
            raise InvalidRequest(f"`{low}` in a JSON schema is above its `{high}`.", param=param)
    pattern = node.get("pattern")
    if isinstance(pattern, str):
        if len(pattern) > PATTERN_CHARS_MAX:
            raise InvalidRequest(
                f"A `pattern` in a JSON schema has at most {PATTERN_CHARS_MAX} characters.", param=param
            )
        if most_repeats(pattern) > REPEAT_MAX:
            raise InvalidRequest(
                f"A `pattern` in a JSON schema repeats at most {REPEAT_MAX} times, nested repeats multiplied.",
                param=param,
            )
    reference = node.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        raise InvalidRequest("A `$ref` in a JSON schema may point into the same schema only.", param=param)


def most_repeats(pattern: str) -> int:
    """How often an engine writes out the innermost piece of `pattern`, at most: nested `{m,n}` multiply."""
    most = atom = 1
    groups: list[int] = []  # the most repeats inside each open group so far
    inside = 1
    position = 0
    while position < len(pattern):
        char = pattern[position]
        quantifier = _QUANTIFIER.match(pattern, position)
        if char == "(":
            groups.append(inside)
            inside = atom = 1
        elif char == ")" and groups:
            atom, inside = inside, max(inside, groups.pop())
        elif quantifier:
            atom *= max([1, *(int(number) for number in quantifier.groups() if number)])
            position = quantifier.end() - 1
        elif char not in "*+?":
            atom = 1
            position = _end_of_atom(pattern, position)
        inside = max(inside, atom)
        most = max(most, inside)
        position += 1
    return most


def _end_of_atom(pattern: str, position: int) -> int:
    """The last position of the character, escape or character class that begins at `position`."""
    if pattern[position] == "\\":
        return position + 1
    if pattern[position] != "[":
        return position
    end = position + 1
    while end < len(pattern) and pattern[end] != "]":
        end += 2 if pattern[end] == "\\" else 1
    return end
