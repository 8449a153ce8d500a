"""Peaks of memory that models came to, as rows.

It refuses to keep more than one row for each model, fingerprint, device and class, and rows that nobody would believe.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from forebay.peaks import Peak
from forebay.store.database import Database
from forebay.store.tables import model_memory

_ROWS_MAX = 10_000
_KEY = ("model", "fingerprint", "device", "input_class")


class ModelMemoryStore:
    """Every statement about them. Several nodes may write at once: the larger figure stays."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self, since: float) -> list[Peak]:
        """All that were measured at `since` or later, the newest first; older ones are forgotten."""
        async with self._database.begin() as transaction:
            await transaction.execute(sa.delete(model_memory).where(model_memory.c.measured_at < since))
            newest = sa.select(model_memory).order_by(model_memory.c.measured_at.desc()).limit(_ROWS_MAX)
            return [Peak(**row) for row in (await transaction.execute(newest)).mappings()]

    async def save(self, peaks: Sequence[Peak], since: float) -> None:
        """Keep each where it is more than what is known, or where what is known is older than `since`.

        What is a tenth below the known peak, or less, shows that the model comes to that still; what is lower does not.
        """
        insert = sqlite.insert if self._database.is_sqlite else postgresql.insert
        known = model_memory.c
        async with self._database.begin() as transaction:
            for peak in sorted(peaks, key=lambda each: (each.model, each.fingerprint, each.device, each.input_class)):
                new = insert(model_memory).values(
                    model=peak.model,
                    fingerprint=peak.fingerprint,
                    device=peak.device,
                    input_class=peak.input_class,
                    peak_bytes=peak.peak_bytes,
                    load_seconds=peak.load_seconds,
                    measured_at=peak.measured_at,
                )
                told = new.excluded
                smaller = sa.and_(known.measured_at >= since, known.peak_bytes > told.peak_bytes)
                much_smaller = sa.and_(smaller, known.peak_bytes * 9 > told.peak_bytes * 10)
                newer = known.measured_at > told.measured_at
                await transaction.execute(
                    new.on_conflict_do_update(
                        index_elements=list(_KEY),
                        set_={
                            "peak_bytes": sa.case((smaller, known.peak_bytes), else_=told.peak_bytes),
                            "load_seconds": told.load_seconds,
                            "measured_at": sa.case(
                                (sa.or_(much_smaller, newer), known.measured_at), else_=told.measured_at
                            ),
                        },
                    )
                )
