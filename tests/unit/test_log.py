"""Lines of the log: secrets are struck out however a line writes them."""

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
