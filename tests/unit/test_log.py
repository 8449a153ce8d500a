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
