"""`forebay serve`: start the server, and tell a person where it is and how to try it.

It refuses to print a key twice: the first start shows it, and only its hash is kept.
"""

import asyncio
from typing import Annotated

import typer
from rich.console import Console

from forebay import app as house
from forebay import config, telemetry
from forebay.cli.options import ConfigFile, DataFolder, load_settings, loop_factory, sentences


def serve(
    config_file: ConfigFile = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    data_dir: DataFolder = None,
) -> None:
    """Start the server; Ctrl-C or SIGTERM lets running requests finish and stops it."""
    with sentences():
        settings = load_settings(config_file, host=host, port=port, data_dir=data_dir)
        environment = config.environment()
        telemetry.configure(settings.log.format, settings.log.level, config.secrets_of(settings, environment))
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(house.serve(settings, environment, _greet, _say_ready))


def _greet(greeting: house.Greeting) -> None:
    console = _console()
    console.print(f"Forebay listens on {greeting.address}")
    if greeting.first_key:
        console.print("Your first API key (administrator). It is shown this once:")
        console.print(f"  {greeting.first_key}", markup=False)
    if greeting.models:
        console.print(f"Loading {', '.join(greeting.models)} ...")


def _say_ready(greeting: house.Greeting) -> None:
    console = _console()
    console.print("Ready.")
    if greeting.models:
        body = f'{{"model":"{greeting.models[0]}","messages":[{{"role":"user","content":"Who wrote Hamlet?"}}]}}'
        key = greeting.first_key or "YOUR_KEY"
        console.print("Try it:")
        console.print(
            f"  curl {greeting.address}/v1/chat/completions -H 'Authorization: Bearer {key}' "
            f"-H 'Content-Type: application/json' -d '{body}'",
            markup=False,
        )


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)
