"""The rescuer: takes back jobs whose worker is gone, ends those that nobody wants any more, and watches for stuck ones.

It refuses to judge by age alone: only a lease that has run out, or a node that is known to be dead, frees a job.
"""

from collections.abc import Mapping

from forebay.clock import Clock
from forebay.config import JobSettings
from forebay.errors import EngineCrashed, ForebayError, LeaseLost
from forebay.jobs.kinds import Kind
from forebay.jobs.outcome import Cancelled, Expired, Failed, verdict
from forebay.jobs.settlement import Settlement
from forebay.store.job_records import Job, Lease
from forebay.store.job_state import LIVE
from forebay.store.jobs import JobStore
from forebay.telemetry import Log, Metrics

_LOST_MAX = 1000
_UNWANTED_MAX = 1000
_TICKS = 3  # in the time of one lease
_TICK_SECONDS_MAX = 4.0  # so that a long lease does not make a long wait longer


class Rescuer:
    """Looks after every worker's jobs; any number of rescuers may do so at once."""

    def __init__(
        self,
        jobs: JobStore,
        settlement: Settlement,
        kinds: Mapping[str, Kind],
        settings: JobSettings,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._jobs = jobs
        self._settlement = settlement
        self._kinds = kinds
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._log = Log()

    async def run(self) -> None:
        """Look on every tick, until cancelled."""
        while True:
            try:
                await self.tick()
            except ForebayError as error:  # the database is away; the next tick comes
                self._log.debug("worker.store_away", reason=str(error))
            await self._clock.sleep(self._clock.jitter(min(self._settings.lease_seconds / _TICKS, _TICK_SECONDS_MAX)))

    async def tick(self) -> None:
        """One round: rescue, end, measure."""
        if cut_off := await self._jobs.database.cut_off_standing():
            self._log.warning("store.cut_off", sessions=cut_off)
        await self.rescue(await self._jobs.lost(_LOST_MAX))
        for job in await self._jobs.unwanted(list(self._kinds), _UNWANTED_MAX):
            await self._end(job)
        self._metrics.jobs_stuck.set(await self._jobs.stuck(self._settings.stuck_seconds))
        counts = await self._jobs.counts()
        for kind in self._kinds:
            for state in LIVE:
                self._metrics.jobs_live.labels(kind, state.value).set(counts.get((kind, state), 0))

    async def rescue_node(self, node: str) -> None:
        """Take back what a dead worker of this node has left behind, but for what is locked: that lease runs out."""
        while (lost := await self._jobs.lost(_LOST_MAX, node)) and await self.rescue(lost):
            pass

    async def rescue(self, lost: list[Job]) -> int:
        """Make lost jobs available again, give up those on which too many workers have died; how many it were."""
        count = 0
        again = [job for job in lost if job.rescues + 1 < self._settings.rescues_max]
        if again:
            async with self._jobs.database.begin() as transaction:
                count = await self._jobs.take_back(transaction, again)
            if count:
                self._metrics.jobs_rescued.inc(count)
                self._log.warning("job.rescued", jobs=count)
        for job in lost:
            if job not in again:
                count += await self._give_up(job)
        return count

    async def _give_up(self, job: Job) -> bool:
        error = EngineCrashed("Its workers died on this job, one after the other.", code="worker_lost")
        outcome = Failed(error, retryable=False)
        kind, lease = self._kinds[job.kind], Lease(job, unless_renewed=True)
        try:
            await self._settlement.settle(lease, outcome, verdict(job, outcome, kind.retry, self._jobs.now()))
        except LeaseLost:
            return False  # it has ended, or its worker was only late
        return True

    async def _end(self, job: Job) -> None:
        kind = self._kinds[job.kind]
        if kind.children is not None and job.stage == kind.joins_at:
            return  # all that is left is to put together what there is
        outcome = Expired() if job.cancel_requested_at is None else Cancelled()
        async with self._jobs.database.begin() as transaction:
            await self._settlement.end(transaction, job, verdict(job, outcome, kind.retry, self._jobs.now()))
