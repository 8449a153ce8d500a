"""`forebay worker`: work on durable jobs apart from any server, with engines of its own.

It refuses to listen on anything: it takes its work from the database.
"""

import asyncio

import typer

from forebay import app as house
from forebay import config, telemetry
from forebay.cli.options import ConfigFile, DataFolder, load_settings, loop_factory, sentences
from forebay.errors import SetupError


def worker(config_file: ConfigFile = None, data_dir: DataFolder = None) -> None:
    """Work on jobs; Ctrl-C or SIGTERM writes down what is done so far and stops it."""
    with sentences():
        settings = load_settings(config_file, data_dir=data_dir)
        if not settings.jobs.enabled:
            raise SetupError("`jobs.enabled` is false, so this worker has nothing to do. Set it to true here.")
        environment = config.environment()
        telemetry.configure(settings.log.format, settings.log.level, config.secrets_of(settings, environment))
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(house.work(settings, environment, _say_ready))


def _say_ready(node: str) -> None:
    typer.echo(f"The worker {node} takes jobs from the database. Ctrl-C stops it.")
