"""Lines of the log: secrets are struck out however a line writes them."""

import subprocess
import sys
from typing import Literal

import pytest
import structlog

from forebay import telemetry


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("secret", ["plain-secret-123", 'quo"ted-secret', "back\\slashed-secret", "it's-a-secret"])
def test_a_secret_is_struck_out_however_it_is_escaped(
    form: Literal["text", "json"], secret: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        telemetry.configure(form, "info", [secret, ""])
        telemetry.Log().info("request.finished", path=secret, reason=f"before {secret}\nafter")
    finally:
        structlog.reset_defaults()
    line = capsys.readouterr().err
    assert line.count("***") == 2
    assert "secret" not in line


def test_a_caller_who_left_is_no_trouble_to_tell_of() -> None:
    program = """
import asyncio, logging
from forebay import telemetry
telemetry.configure("text", "info")
for kind in (asyncio.CancelledError, ValueError):
    try:
        raise kind
    except BaseException:
        logging.getLogger("library").error("about %s", kind.__name__, exc_info=True)
logging.getLogger("library").error("about nothing")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    told = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
    assert told == ["ERROR library about ValueError", "ERROR library about nothing"]
    assert "CancelledError" not in ended.stderr


@pytest.mark.parametrize("event", ["server.ready", "intake.token_refused.and.more"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "status": 200,
            "path": "/v1/models",
            "ms": 1.5,
            "reason": 'it\'s "no"',
            "none": None,
            "model": "",
            "z": ["a b"],
        },
        {"exception": "Traceback:\n  a line", "path": "a=b"},
        {"z": "ends in blanks  "},
    ],
)
def test_a_line_of_text_is_as_the_library_writes_it(event: str, fields: dict[str, object]) -> None:
    line = {"event": event, "level": "info", "timestamp": "2026-11-22T00:00:00.000000Z", **fields}
    expected = structlog.dev.ConsoleRenderer(colors=False, pad_event_to=24)(None, "info", dict(line))
    assert telemetry.text_line(None, "info", dict(line)) == expected
