"""What engines of ours report of themselves: lines in the log, how many slots are busy, and figures.

It refuses to write what could be taken for another line of the log.
"""

import json
import sys
from collections.abc import Mapping

_REASON_CHARS_MAX = 300


def say(engine: str, text: str) -> None:
    """Write a line into the log of `engine`."""
    sys.stderr.write(f"{engine}: {text}\n")


def one_line(text: str) -> str:
    """Printable characters of `text` on one line, cut."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:_REASON_CHARS_MAX]


def slots(count: int, busy: int) -> bytes:
    """The answer of /slots: of `count` slots the first `busy` are working."""
    return json.dumps([{"id": slot, "is_processing": slot < busy} for slot in range(count)]).encode()


def metrics(sums: Mapping[str, float], **gauges: float) -> str:
    """The answer of /metrics: sums since the start, and how things are now."""
    shown = {**{f"{name}_total": value for name, value in sums.items()}, **gauges}
    return "".join(f"forebay_engine_{name} {value}\n" for name, value in shown.items())
