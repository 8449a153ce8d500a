"""How every engine program of ours begins, and how it ends when it cannot: its spec, its key, its exit codes, its output.

It refuses to import more than the standard library: the smallest engine pays for what is here.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NoReturn, TypeVar

OUT_OF_MEMORY = 86
CANNOT_START = 78

SpecT = TypeVar("SpecT")


def read_spec(spec_type: Callable[..., SpecT], who: str) -> tuple[SpecT, str]:
    """The spec and the key, taken out of the environment so that nothing else can read them; `who` is the engine."""
    text, key = os.environ.pop("FOREBAY_ENGINE_SPEC", "{}"), os.environ.pop("FOREBAY_ENGINE_KEY", "")
    try:
        spec = spec_type(**json.loads(text))
    except (ValueError, TypeError) as error:
        refuse_to_start(f"{who}'s settings cannot be read: {error}.")
    if not key:
        refuse_to_start(f"{who} needs a key in FOREBAY_ENGINE_KEY.")
    return spec, key


def check_types(spec: Any) -> None:
    """Raise TypeError for a field of a spec whose value has another type than it declares."""
    for field in fields(spec):
        accepted: Any = (int, float) if field.type is float else field.type
        if isinstance(field.type, type) and not isinstance(getattr(spec, field.name), accepted):
            raise TypeError(f"{field.name} has to be of type {field.type.__name__}")


def refuse_to_start(reason: str) -> NoReturn:
    """Say why this can never start as configured."""
    _die(CANNOT_START, reason)


def run_out_of_memory(reason: str) -> NoReturn:
    """End as an engine ends when there is no memory for its model, or for its work."""
    _die(OUT_OF_MEMORY, reason)


def keep_stdout() -> int:
    """Our one line goes to the descriptor returned; whatever a library prints goes to standard error."""
    out = os.dup(1)
    os.dup2(2, 1)
    return out


def _die(code: int, reason: str) -> NoReturn:
    sys.stderr.write(f"{reason}\n")
    sys.stderr.flush()
    os._exit(code)
