"""The commands of `forebay`: what the listing says of each, and its module, imported when it is called.

It refuses to import a command in order to list it: `forebay --help` waits for no server, database or HTTP library.
"""

import gc
import importlib
from types import ModuleType
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

HELP = {  # the first paragraph of each command's own help; tests/house holds them together
    "serve": "Start the server; Ctrl-C or SIGTERM lets running requests finish and stops it.",
    "worker": "Work on jobs; Ctrl-C or SIGTERM writes down what is done so far and stops it.",
    "chat": "Talk to a model of a running server. Type /help inside. `echo question | forebay chat` works too.",
    "transcribe": "Write down what is said in recordings, as text, subtitles or JSON.",
    "edit": "Change what a mask marks in an image, as a prompt says.",
    "doctor": "Look at this machine and the configuration; status 1 if something would stop `forebay serve`.",
    "models": "List, pull, verify and remove models.",
    "keys": "Create, list and revoke API keys.",
    "projects": "List projects, and set their shares and quotas.",
    "usage": "Show what was used, by day and project, key, model or capability.",
    "batch": "Hand in files of requests and fetch their results.",
    "jobs": "List, show, cancel and retry jobs.",
    "dead-letters": "List, show and requeue what was given up.",
    "db": "Upgrade, check and back up the database.",
    "bench": "Measure this server on this machine.",
}


def load(name: str) -> Any:
    """The command with everything that it needs: its module's `app`, or else the function named like it."""
    module = _import(f"forebay.cli.{name.replace('-', '_')}")
    alone = typer.Typer()
    if hasattr(module, "app"):
        alone.add_typer(module.app, name=name)
    else:
        alone.command(name)(getattr(module, name))
    return get_group(alone).commands[name]


def _import(name: str) -> ModuleType:
    """Import a module without looking for garbage: there is next to none, and what is imported stays."""
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


class Commands(TyperGroup):
    """A group that lists its commands by name and help, and loads the one that is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {name: TyperCommand(name, help=line) for name, line in HELP.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, listed, rest = super().resolve_command(ctx, args)
        return name, load(name) if name and listed else None, rest
