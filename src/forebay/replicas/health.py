"""The gate of the machine's health: with little memory left, or a hot GPU, it loads nothing and lets batch work wait.

It closes at one threshold and opens at another, so that it does not flutter. It refuses to measure and to act: gauge.py
reads, the supervisor and the hallway ask whether it is open. Pure.
"""

from forebay.replicas.gauge import Reading
from forebay.server_config import MemorySettings


class Gate:
    """Open at first, and as long as nothing was read."""

    def __init__(self, settings: MemorySettings) -> None:
        self._settings = settings
        self._short = False
        self._hot = False
        self._reason = ""
        self._lacking = 0

    @property
    def lacking_bytes(self) -> int:
        """How much more memory has to become available before it opens; 0 if that is not why it is closed."""
        return self._lacking

    @property
    def open(self) -> bool:
        """Whether models may be loaded and batch work may run."""
        return not (self._short or self._hot)

    @property
    def reason(self) -> str:
        """Why it is closed, as a sentence; empty while it is open."""
        return self._reason

    def update(self, reading: Reading) -> bool:
        """Take notice of the machine; whether that opened or closed the gate."""
        before = self.open
        settings = self._settings
        share = reading.available_bytes / max(1, reading.total_bytes)
        limit = settings.available_resume_share if self._short else settings.available_min_share
        self._short = share < limit
        enough = int(reading.total_bytes * settings.available_resume_share)
        self._lacking = max(0, enough - reading.available_bytes) if self._short else 0
        hottest = max((gpu.celsius for gpu in reading.gpus if gpu.celsius is not None), default=None)
        degrees = settings.gpu_celsius_resume if self._hot else settings.gpu_celsius_max
        self._hot = hottest is not None and hottest > degrees
        self._reason = ""
        if self._short:
            self._reason = (
                f"The machine has {share:.1%} of its memory available; it loads again at "
                f"{settings.available_resume_share:.1%}."
            )
        elif self._hot:
            self._reason = f"A GPU is at {hottest:.0f} degrees Celsius; the machine loads again at {settings.gpu_celsius_resume:.0f}."
        return self.open is not before
