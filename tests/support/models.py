"""Real model files for tests, pulled once through our own puller and shared by all test runs."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.replicas.catalog import Catalog
from forebay.replicas.pull import pull

MODELS_FOLDER = Path(__file__).parents[2] / ".cache" / "models"
SMOLLM2 = "smollm2-135m-instruct"


@cache
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, 98 MB. The first call of all may take a minute; it may come from a running loop."""
    catalog = Catalog(Settings(models_dir=MODELS_FOLDER))
    if catalog.present(SMOLLM2):
        return catalog.path(SMOLLM2)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(_pull(catalog))).result()


async def _pull(catalog: Catalog) -> Path:
    return await pull(SMOLLM2, catalog, Settings().pull, SystemClock(), lambda _done, _total: None)


smollm2 = smollm2_path  # the name that the engines' suite knows it by
