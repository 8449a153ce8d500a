"""What engines of ours report of themselves: lines in the log, how many slots are busy, and figures.

It refuses to write what could be taken for another line of the log.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from forebay.engines.connection import Refused, Visit

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


class Visits:
    """The requests of an engine: how many there were, how many are running, and a line in the log for each."""

    def __init__(self, engine: str) -> None:
        self.running = 0
        self._engine = engine
        self._requests = 0
        self._cancelled = 0

    @property
    def sums(self) -> dict[str, float]:
        """How many there were since the start, and how many of them were given up."""
        return {"requests": self._requests, "cancelled": self._cancelled}

    @contextmanager
    def noted(self, visit: Visit) -> Iterator[dict[str, Any]]:
        """Count a request, and say in the log how it has ended; what is put into the dictionary is said as well."""
        note: dict[str, Any] = {}
        begun, ended = time.monotonic(), "cancelled"
        self._requests += 1
        self.running += 1
        try:
            yield note
            ended = "finished"
        except Refused as refused:
            ended = "refused" if refused.status < 500 else "failed"
            note["reason"] = one_line(str(refused))
            raise
        finally:
            self.running -= 1
            self._cancelled += ended == "cancelled"
            more = "".join(f" {name}={value}" for name, value in note.items())
            seconds = time.monotonic() - begun
            say(self._engine, f"event={ended} {visit.ids} path={visit.path} seconds={seconds:.4f}{more}")
