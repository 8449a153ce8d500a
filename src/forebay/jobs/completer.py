"""Settles the attempts that ended well and have nothing else to write, all that are there at once in one transaction.

It refuses to keep anybody waiting for company: what is there when the last transaction has ended goes into the next.
"""

import asyncio

from forebay.errors import ForebayError, LeaseLost
from forebay.store.jobs import JobStore, Lease

_LEASES_MAX = 500  # in one statement


class Completer:
    """Owns the line of attempts that wait for their end to be written down."""

    def __init__(self, jobs: JobStore) -> None:
        self._jobs = jobs
        self._line: list[tuple[Lease, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def complete(self, lease: Lease) -> None:
        """Close the attempt as completed. Raises LeaseLost, StoreUnavailable."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append((lease, written))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write(), name="completer")
        await written

    async def _write(self) -> None:
        try:
            while self._line:
                group, self._line = self._line[:_LEASES_MAX], self._line[_LEASES_MAX:]
                await self._write_group(group)
        finally:
            self._writing = None

    async def _write_group(self, group: list[tuple[Lease, asyncio.Future[None]]]) -> None:
        trouble: ForebayError | None = None
        held: set[str] = set()
        try:
            async with self._jobs.database.begin() as transaction:
                held = await self._jobs.settle_completed(transaction, [lease for lease, _ in group])
        except ForebayError as error:  # it is everybody's
            trouble = error
        for lease, written in group:
            if written.done():
                continue  # whoever waited for it has been cancelled
            if trouble is not None:
                written.set_exception(trouble)
            elif lease.id in held:
                written.set_result(None)
            else:
                written.set_exception(LeaseLost())
