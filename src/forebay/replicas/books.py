"""What models take of memory, as far as the settings say.

It refuses to guess: a model of which nothing is known takes nothing.
"""

from forebay.replicas.catalog import Catalog
from forebay.replicas.keeper import Keeper
from forebay.replicas.memory import HOST, Bytes
from forebay.server_config import MemorySettings

_PLENTY = 2**60


class DeclaredBooks:
    """Memory by declaration alone."""

    def __init__(self, catalog: Catalog, settings: MemorySettings) -> None:
        self._catalog = catalog
        self._totals = {HOST: settings.host_bytes or _PLENTY}

    def totals(self) -> Bytes:
        return self._totals

    def need(self, model: str) -> Bytes:
        declared = self._catalog.get(model).memory_bytes
        return {} if declared is None else {HOST: declared}

    def held(self, model: str, keeper: Keeper) -> Bytes:
        return self.need(model)

    def closed(self) -> str | None:
        return None
