"""Every log event and metric has its name in one table, and nothing in the table is dead."""

import ast
import re

from forebay import telemetry
from forebay.replicas import figures
from tests.house import source

_LEVELS = {"debug", "info", "warning", "error"}


def _events_written() -> set[str]:
    """The first argument of every `log.info("room.event", …)` in the source."""
    return {
        node.args[0].value
        for path in source.modules()
        if "engines" not in path.parts  # an engine prints lines; the server turns them into `engine.line`
        for node in ast.walk(source.tree(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in _LEVELS
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    }


def test_every_event_that_is_written_is_in_the_table() -> None:
    assert _events_written() <= set(telemetry.EVENTS)


def test_every_event_of_the_table_is_written_somewhere() -> None:
    text = "\n".join(path.read_text("utf-8") for path in source.modules() if path.name != "telemetry.py")
    assert not [event for event in telemetry.EVENTS if f'"{event}"' not in text]


def test_every_metric_is_recorded_somewhere() -> None:
    text = "\n".join(path.read_text("utf-8") for path in source.modules() if path.name != "telemetry.py")
    names = set(vars(telemetry.Metrics())) - {"registry"}
    assert not [name for name in sorted(names) if not re.search(rf"metrics\.{name}\b", text)]


def test_every_metric_and_event_is_documented() -> None:
    page = (source.ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
    metrics = [family.name for family in telemetry.Metrics().registry.collect()]
    assert not [name for name in metrics if f"`{name}" not in page]
    assert not [name for name in figures.NAMES if f"`{name}`" not in page]
    assert not [event for event in telemetry.EVENTS if f"`{event}`" not in page]
