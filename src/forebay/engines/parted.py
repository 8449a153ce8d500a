"""The form of bodies that bring more than JSON: one line of JSON, then raw bytes; and the checks of single values.

It refuses what is not of that form and what is out of its bounds, naming the parameter, and knows no model.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from forebay.engines.connection import Refused

Check = Callable[[str, Any], Any]
"""Gives a value back as it is used, by its name; raises Refused for what is none."""


def parted(body: bytes, line_bytes_max: int) -> tuple[dict[str, Any], memoryview]:
    """The object in the first line, which is no longer than `line_bytes_max`, and what is behind it. Raises Refused."""
    end = body.find(b"\n", 0, line_bytes_max)
    if end < 0:
        raise Refused(400, "The body has to begin with a line of JSON.")
    return json_object(body[:end], "The first line of the body"), memoryview(body)[end + 1 :]


def json_object(text: bytes, what: str = "The body") -> dict[str, Any]:
    """The object that `text` is; `what` names it in the sentence. Raises Refused."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise Refused(400, f"{what} is not JSON.") from None
    if not isinstance(found, dict):
        raise Refused(400, f"{what} has to be a JSON object.")
    return found


def flag(fields: Mapping[str, Any], name: str, *, otherwise: bool = False) -> bool:
    """A yes or no; `otherwise` where it is left out. Raises Refused."""
    return yes_or_no(name, fields.get(name, otherwise))


def yes_or_no(name: str, value: Any) -> bool:
    """A yes or no. Raises Refused."""
    if not isinstance(value, bool):
        raise Refused(400, f"`{name}` has to be true or false.", param=name)
    return value


def number(low: float, high: float) -> Check:
    """A check for numbers from `low` to `high`."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise Refused(400, f"`{name}` has to be a number from {low:g} to {high:g}.", param=name)
        return float(value)

    return check


def whole(low: int, high: int) -> Check:
    """A check for whole numbers from `low` to `high`."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise Refused(400, f"`{name}` has to be a whole number from {low} to {high}.", param=name)
        return value

    return check
