"""What the command line says about itself."""

from pathlib import Path

from typer.testing import CliRunner

import forebay
from forebay.cli import app


def test_the_version_needs_no_command() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"forebay {forebay.__version__}\n")


def test_the_hint_of_a_list_without_large_models_names_no_command_twice(tmp_path: Path) -> None:
    configuration = tmp_path / "forebay.toml"
    configuration.write_text('default_models = false\n[models.f]\nengine = "fake"\n')
    result = CliRunner().invoke(app, ["models", "list", "--config", str(configuration), "--data-dir", str(tmp_path)])
    assert (result.exit_code, result.stderr) == (0, "There is nothing to pull.\n")
