"""What jobs may use and have used: reserved before an attempt computes, counted in the transaction that keeps its result.

It refuses to count an attempt that has brought nothing: a line counts once, however often it was tried.
"""

from collections.abc import Iterable
from contextlib import ExitStack, nullcontext

from forebay.dialects.openai.call import Call
from forebay.metering.estimate import at_most
from forebay.metering.meter import Aside, Meter, Reservation
from forebay.quotas import Account, Amounts, Use
from forebay.store.database import Transaction
from forebay.store.job_records import Job
from forebay.store.usage import UsageStore


class JobMeter:
    """The meter, for work whose results go into the database."""

    def __init__(self, meter: Meter, usage: UsageStore) -> None:
        self._meter = meter
        self._usage = usage

    async def reserve(self, job: Job, call: Call, aside: Aside = nullcontext) -> Reservation:
        """Take what `call` may use at most, as soon as others of the project do not hold it. Raises QuotaExceeded."""
        request = call.request
        return await self._meter.reserve_in_turn(
            job.project_id, job.key_id or "", request.model, request.capability, lambda: at_most(call), aside
        )

    async def reserve_until(self, end: ExitStack, job: Job, call: Call) -> Reservation:
        """The same until `end` is closed, which comes after the result is committed: till then nobody else may have it.

        Raises Overloaded where others hold it for long: a job has a place, in which another one may go on meanwhile.
        """
        async with self._meter.for_a_while():
            reservation = await self.reserve(job, call)
        end.callback(reservation.release)
        return reservation

    def reserve_done(self, end: ExitStack, job: Job, call: Call, use: Use) -> None:
        """Take what a job has used that is done and has only to be written down: it counts, whether it is left or not."""
        account = Account(job.project_id, job.key_id or "", call.request.model, call.request.capability)
        self.settle_at(end, self._meter.reserve_anyway(account, use.amounts), use)

    async def raise_to(self, reservation: Reservation, amounts: Amounts) -> None:
        """Reserve more for a job, now that it is known how much it takes. Raises QuotaExceeded and Overloaded."""
        async with self._meter.for_a_while():
            await reservation.raise_in_turn(lambda: amounts)

    @staticmethod
    def settle_at(end: ExitStack, reservation: Reservation, use: Use) -> None:
        """So much was used, which is in the database when `end` is closed."""
        end.callback(reservation.settled_elsewhere, use)

    async def write(self, transaction: Transaction, used: Iterable[tuple[Account, Use]]) -> None:
        """Count it, as the last statement of the transaction that waits for anybody."""
        totals: dict[Account, Use] = {}
        for account, use in used:
            totals[account] = totals.get(account, Use()) + use
        if totals:
            await self._usage.add(transaction, totals)
