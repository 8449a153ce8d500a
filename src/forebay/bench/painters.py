"""Which model is measured: one of the configuration, a folder of weights, or a pipeline of random weights made for it.

It refuses to measure what is not here: nothing is pulled.
"""

import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from forebay.bench.program import running
from forebay.config import Settings
from forebay.engine_options import DiffusionOptions
from forebay.errors import SetupError
from forebay.model_config import DiffusionModel

_BUILDER = (sys.executable, "-P", "-m", "forebay.bench.tiny_pipelines")
_TINY_KIND, _TINY_WIDTH = "sd-inpaint", 128  # wide enough that a step takes longer than to start it
_REMEDY = "Install forebay[diffusion]."


@dataclass(frozen=True, slots=True)
class Choice:
    """At most one of them: the name of a model, a folder in the layout of diffusers, or a tiny pipeline."""

    model: str | None = None
    source: Path | None = None
    tiny: bool = False


@asynccontextmanager
async def chosen(settings: Settings, choice: Choice) -> AsyncIterator[tuple[Settings, str | None]]:
    """The settings with the model that was chosen, and its name, if one was. Raises SetupError."""
    if (choice.model is not None) + (choice.source is not None) + choice.tiny > 1:
        raise SetupError("Give one of `--model`, `--source` and `--tiny`.")
    if choice.source is not None:
        yield _with(settings, choice.source.name, choice.source, DiffusionOptions()), choice.source.name
    elif choice.tiny:
        with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
            async with running(_BUILDER, "the program that builds pipelines", _REMEDY) as program:
                await program.ask({"kind": _TINY_KIND, "folder": folder, "width": _TINY_WIDTH})
            yield _with(settings, "tiny", Path(folder), DiffusionOptions(threads=1)), "tiny"  # it is too small for more
    else:
        yield settings, choice.model


def _with(settings: Settings, name: str, folder: Path, options: DiffusionOptions) -> Settings:
    model = DiffusionModel(engine="diffusion", source=f"file:{folder.resolve()}", options=options)
    return settings.model_copy(update={"models": {**settings.models, name: model}})
