"""Bounds on what a client may put into a JSON schema before an engine compiles it into a grammar.

It refuses size, depth and repetition that would make the engine spend its memory or time on the grammar; it does not
check that a schema is correct: the engine does.
"""

from typing import Any

from pydantic_core import to_json

from forebay.errors import InvalidRequest

BYTES_MAX = 65_536
DEPTH_MAX = 32
NODES_MAX = 5_000
PATTERN_CHARS_MAX = 256
REPEAT_MAX = 1_000
_REPEATS = frozenset({"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"})


def check_schema(schema: dict[str, Any], param: str) -> None:
    """Raise InvalidRequest if `schema` is too large, deep, wide or repetitive."""
    if len(to_json(schema)) > BYTES_MAX:
        raise InvalidRequest(f"The JSON schema is larger than {BYTES_MAX} bytes.", param=param)
    nodes = 0
    stack: list[tuple[Any, int]] = [(schema, 1)]
    while stack:
        node, depth = stack.pop()
        nodes += 1
        if nodes > NODES_MAX or depth > DEPTH_MAX:
            raise InvalidRequest(f"The JSON schema has more than {NODES_MAX} nodes or {DEPTH_MAX} levels.", param=param)
        if isinstance(node, dict):
            _check_keywords(node, param)
            stack += [(child, depth + 1) for child in node.values() if isinstance(child, dict | list)]
        elif isinstance(node, list):
            stack += [(child, depth + 1) for child in node if isinstance(child, dict | list)]


def _check_keywords(node: dict[str, Any], param: str) -> None:
    for key in _REPEATS & node.keys():
        value = node[key]
        if isinstance(value, int | float) and value > REPEAT_MAX:
            raise InvalidRequest(f"`{key}` in a JSON schema may be {REPEAT_MAX} at most.", param=param)
    pattern = node.get("pattern")
    if isinstance(pattern, str) and len(pattern) > PATTERN_CHARS_MAX:
        raise InvalidRequest(f"A `pattern` in a JSON schema has at most {PATTERN_CHARS_MAX} characters.", param=param)
    reference = node.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        raise InvalidRequest("A `$ref` in a JSON schema may point into the same schema only.", param=param)
