"""Recordings that tests make up, and forms that they are sent in."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def form_of(body: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The fields of a form for `body`, as the official client writes them."""
    found = []
    for name, value in body.items():
        if isinstance(value, Mapping):
            found += [(f"{name}[{inner}]", _text(each)) for inner, each in value.items()]
        elif isinstance(value, Sequence) and not isinstance(value, str) and name != "segments":
            found += [(f"{name}[]", _text(each)) for each in value]
        else:
            found.append((name, _text(value)))
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
