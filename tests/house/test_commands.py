"""The commands of `forebay`: every one is listed, with its own help, and none is imported before it is called."""

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import forebay.cli
from forebay.cli.commands import HELP, load

SERVER = {
    "aiohttp", "alembic", "fastapi", "obstore", "prometheus_client", "pydantic", "sqlalchemy", "starlette", "structlog",
    "uvicorn",
}  # fmt: skip
MODELS = {
    "PIL", "av", "ctranslate2", "faster_whisper", "numpy", "onnx", "onnxruntime", "pocketsphinx", "tokenizers", "xllamacpp",
}  # fmt: skip
HEAVY = SERVER | MODELS
CLIENT = {"aiohttp", "pydantic"}
DATABASE = {"alembic", "pydantic", "sqlalchemy"}


def test_every_command_is_listed() -> None:
    found = set()
    for module in pkgutil.iter_modules(forebay.cli.__path__):
        if not module.name.startswith("_"):
            words = importlib.import_module(f"forebay.cli.{module.name}").__doc__ or ""
            found |= set(re.findall(r"^`forebay ([a-z-]+)`", words))
    assert found == set(HELP)


@pytest.mark.parametrize("name", HELP)
def test_the_listing_says_of_a_command_what_the_command_says(name: str) -> None:
    command = load(name)
    assert command.name == name
    assert " ".join(command.help.partition("\n\n")[0].split()) == HELP[name]
    shown = CliRunner().invoke(forebay.cli.app, ["--help"], env={"COLUMNS": "240", "TERM": "dumb"})
    assert re.search(rf"^\W*{name} +{re.escape(HELP[name])}\W*$", shown.output, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        ("--version", set()),
        ("--help", set()),
        ("chat --help", CLIENT),
        ("batch status --help", CLIENT),
        ("jobs list --help", CLIENT),
        ("dead-letters list --help", CLIENT),
        ("models list --data-dir .", CLIENT),
        ("db check --help", DATABASE),
        ("keys create --help", DATABASE),
        ("doctor --help", DATABASE),
        ("serve --help", SERVER),
    ],
)
def test_a_command_imports_what_it_needs(arguments: str, needed: set[str], tmp_path: Path) -> None:
    assert _imported("import forebay.cli; forebay.cli.main()", *arguments.split(), folder=tmp_path) == needed


@pytest.mark.parametrize("engine", ["fake", "llama_cpp"])
def test_an_engine_imports_nothing_of_the_server(engine: str, tmp_path: Path) -> None:
    assert not _imported(f"import forebay.engines.{engine}", folder=tmp_path)


def _imported(statement: str, *arguments: str, folder: Path) -> set[str]:
    """The heavy libraries that a program has imported by its end."""
    program = f"import atexit, sys; atexit.register(lambda: print('\\n', *sys.modules)); {statement}"
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    modules = set(ended.stdout.splitlines()[-1].split())
    assert "sys" in modules
    return modules & HEAVY
