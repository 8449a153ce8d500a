"""The worker: leases jobs while it has room, keeps their leases alive, and ends attempts that are not wanted any more.

It refuses to hold more than its room, and to go on with a job whose lease may have gone to somebody else.
It owns the set of attempts; nobody else starts or ends one.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from forebay.clock import Clock
from forebay.config import JobSettings
from forebay.errors import ForebayError
from forebay.jobs.executor import Executor
from forebay.jobs.kinds import Kind, Run
from forebay.jobs.outcome import Interruption
from forebay.store.jobs import CANCELS, NEWS, JobStore, Lease, Renewed
from forebay.telemetry import Log, Metrics

_RENEWALS = 3  # in the time of one lease


@dataclass(slots=True)
class _Attempt:
    run: Run
    task: asyncio.Task[None]
    started_at: float

    def interrupt(self, why: Interruption) -> None:
        """End it, once; that the lease is lost overrules everything else."""
        if self.run.interruption is None:
            self.run.interruption = why
            if self.run.performing:
                self.task.cancel()
        elif why is Interruption.LEASE_LOST:
            self.run.interruption = why


class Worker:
    """Works on jobs until it is stopped. `node` is who holds the leases."""

    def __init__(
        self,
        jobs: JobStore,
        executor: Executor,
        kinds: Mapping[str, Kind],
        node: str,
        settings: JobSettings,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._jobs = jobs
        self._executor = executor
        self._kinds = kinds
        self._node = node
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._log = Log()
        self._attempts: dict[str, _Attempt] = {}
        self._freed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._away = False

    @property
    def running(self) -> int:
        """How many attempts there are."""
        return len(self._attempts)

    async def run(self) -> None:
        """Work until `stop` and the end of the last attempt."""
        renewing = asyncio.create_task(self._renew_leases())
        try:
            await self._lease_jobs()
        finally:
            await self._drain()
            renewing.cancel()
            await asyncio.wait([renewing])

    def stop(self) -> None:
        """Lease nothing more, and let running attempts write down what they have."""
        self._stopping.set()
        self._freed.set()
        for attempt in list(self._attempts.values()):
            attempt.interrupt(Interruption.SHUTDOWN)

    # Leasing.

    async def _lease_jobs(self) -> None:
        with self._jobs.database.listen(NEWS) as news:
            while not self._stopping.is_set():
                news.clear()
                self._freed.clear()
                leases = await self._lease()
                if not leases:
                    await self._wait(news)

    async def _lease(self) -> list[Lease]:
        room = self._room()
        try:
            leases = await self._jobs.lease(
                room,
                self._node,
                self._settings.lease_seconds,
                warm=self._warm(),
                group_wait_seconds=self._settings.group_wait_seconds,
            )
        except ForebayError as error:  # the database is away: what runs goes on, and this is tried again
            self._note_away(error)
            return []
        self._note_back()
        for lease in leases:
            self._start(lease)
        return leases

    def _room(self) -> dict[str, int]:
        room = {name: kind.at_once for name, kind in self._kinds.items()}
        for attempt in self._attempts.values():
            room[attempt.run.lease.job.kind] -= 1
        return room

    def _warm(self) -> set[str]:
        models = (attempt.run.lease.job.model for attempt in self._attempts.values())
        return {model for model in models if model is not None}

    def _start(self, lease: Lease) -> None:
        run = Run(lease)
        if lease.job.cancel_requested_at is not None and self._kinds[lease.job.kind].children is None:
            run.interruption = Interruption.CANCELLED
        task = asyncio.create_task(self._attempt(run), name=f"job {lease.id}")
        self._attempts[lease.id] = _Attempt(run, task, self._clock.monotonic())

    async def _attempt(self, run: Run) -> None:
        kind = self._kinds[run.lease.job.kind]
        try:
            await self._executor.execute(kind, run)
        finally:
            self._attempts.pop(run.lease.id, None)
            self._freed.set()

    async def _wait(self, news: asyncio.Event) -> None:
        """Until there is news, room, or nothing for a while."""
        waits = [asyncio.create_task(event.wait()) for event in (news, self._freed)]
        waits.append(asyncio.create_task(self._clock.sleep(self._clock.jitter(self._settings.poll_seconds))))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    # Keeping.

    async def _renew_leases(self) -> None:
        pause = self._settings.lease_seconds / _RENEWALS
        renewed_at = self._clock.monotonic()
        with self._jobs.database.listen(CANCELS) as cancels:
            while True:
                cancels.clear()
                asked_at = self._clock.monotonic()
                if await self._renew():
                    renewed_at = asked_at
                elif asked_at - renewed_at >= self._settings.lease_seconds:
                    self._give_up(renewed_at)
                await self._pause(cancels, min(pause, self._until_deadline()))

    async def _renew(self) -> bool:
        """Renew every lease; whether the database answered."""
        attempts = dict(self._attempts)
        if attempts:
            try:
                renewed = await self._jobs.renew(self._node, list(attempts), self._settings.lease_seconds)
            except ForebayError as error:
                self._note_away(error)
                return False
            self._judge(attempts, renewed)
        return True

    def _judge(self, attempts: Mapping[str, _Attempt], renewed: Mapping[str, Renewed]) -> None:
        now = self._jobs.now()
        for job_id, attempt in attempts.items():
            lease, answer = attempt.run.lease, renewed.get(job_id)
            if answer is None or answer.attempt != lease.attempt:
                if not attempt.task.done():
                    attempt.interrupt(Interruption.LEASE_LOST)
            elif answer.cancel_requested and self._kinds[lease.job.kind].children is None:
                attempt.interrupt(Interruption.CANCELLED)
            elif now >= lease.job.deadline_at and self._kinds[lease.job.kind].children is None:
                attempt.interrupt(Interruption.EXPIRED)

    def _give_up(self, renewed_at: float) -> None:
        """The leases may have gone to others: a paused or cut-off worker must not believe in them."""
        for attempt in list(self._attempts.values()):
            if attempt.started_at <= renewed_at:
                attempt.interrupt(Interruption.LEASE_LOST)

    def _until_deadline(self) -> float:
        now = self._jobs.now()
        left = (attempt.run.lease.job.deadline_at - now for attempt in self._attempts.values())
        return max(0.05, min((seconds for seconds in left if seconds > 0), default=self._settings.lease_seconds))

    async def _pause(self, cancels: asyncio.Event, seconds: float) -> None:
        try:
            async with self._clock.timeout(seconds):
                await cancels.wait()
        except TimeoutError:
            pass  # time for the next renewal

    async def _drain(self) -> None:
        self.stop()
        attempts = [attempt.task for attempt in self._attempts.values()]
        if not attempts:
            return
        _, late = await asyncio.wait(attempts, timeout=self._settings.drain_seconds)
        for attempt in list(self._attempts.values()):
            attempt.run.interruption = Interruption.LEASE_LOST  # what is not written by now is done again
        for each in late:
            each.cancel()
        if late:
            await asyncio.wait(late)

    def _note_away(self, error: ForebayError) -> None:
        if not self._away:
            self._away = True
            self._log.warning("worker.store_away", reason=str(error))

    def _note_back(self) -> None:
        if self._away:
            self._away = False
            self._log.info("worker.store_back")
