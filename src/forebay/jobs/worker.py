"""The worker: leases jobs while it has room, keeps their leases alive, and ends attempts that are not wanted any more.

It refuses to hold more than its room, and to go on with a job whose lease may have gone to somebody else.
It owns the set of attempts; nobody else starts or ends one.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forebay.clock import Clock
from forebay.config import JobSettings
from forebay.errors import ForebayError
from forebay.jobs.executor import Executor
from forebay.jobs.kinds import Kind, Run
from forebay.jobs.outcome import Interruption
from forebay.scheduler.shares import Weights, equal
from forebay.store.job_records import Lease, Renewed
from forebay.store.jobs import CANCELS, NEWS, JobStore
from forebay.telemetry import Log, Metrics

_RENEWALS = 3  # in the time of one lease

Loaded = Callable[[], Collection[str]]


def nothing_loaded() -> Collection[str]:
    """Of a worker that has no models."""
    return ()


@dataclass(slots=True)
class _Attempt:
    run: Run
    task: asyncio.Task[None]
    leased_at: float  # monotonic, before the database was asked: the lease lasts at least as long as counted from here

    def interrupt(self, why: Interruption) -> None:
        """End it, once; that the lease is lost overrules everything else."""
        if self.run.interruption is None:
            self.run.interruption = why
            if self.run.performing:
                self.task.cancel()
        elif why is Interruption.LEASE_LOST:
            self.run.interruption = why


class Worker:
    """Works on jobs until it is stopped. `node` is who holds the leases; `loaded` names the models that are up here."""

    def __init__(
        self,
        jobs: JobStore,
        executor: Executor,
        kinds: Mapping[str, Kind],
        node: str,
        settings: JobSettings,
        clock: Clock,
        metrics: Metrics,
        weights: Weights = equal,
        loaded: Loaded = nothing_loaded,
    ) -> None:
        self._jobs = jobs
        self._executor = executor
        self._kinds = kinds
        self._node = node
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._weights = weights
        self._loaded = loaded
        self._log = Log()
        self._attempts: dict[tuple[str, int], _Attempt] = {}  # by job and attempt: an old one may still be ending
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
        room, asked_at = self._room(), self._clock.monotonic()
        spare = {name: room[name] + kind.spare for name, kind in self._kinds.items() if kind.spare}
        try:
            leases = await self._jobs.lease(
                room,
                self._node,
                self._settings.lease_seconds,
                warm=self._warm(),
                group_wait_seconds=self._settings.group_wait_seconds,
                turns=self._turns(),
                grouped=[name for name, kind in self._kinds.items() if kind.groups_models],
                spare=spare,
                models={name: self._models(name) for name, kind in self._kinds.items() if kind.groups_models},
                loaded=self._loaded(),
            )
        except ForebayError as error:  # the database is away: what runs goes on, and this is tried again
            self._note_away(error)
            return []
        self._note_back()
        for lease in leases:
            self._start(lease, asked_at)
        return leases

    def _room(self) -> dict[str, int]:
        room = {name: kind.at_once for name, kind in self._kinds.items()}
        for attempt in self._attempts.values():
            room[attempt.run.lease.job.kind] -= 1
        return room

    def _warm(self) -> set[str]:
        models = (attempt.run.lease.job.model for attempt in self._attempts.values())
        return {model for model in models if model is not None}

    def _models(self, kind: str) -> set[str]:
        """The models of which jobs of this kind run."""
        found = (attempt.run.lease.job for attempt in self._attempts.values())
        return {job.model for job in found if job.kind == kind and job.model is not None}

    def _turns(self) -> dict[str, dict[str, float]]:
        """Of each kind that takes turns how many jobs of each project run, by the weight of the project."""
        turns: dict[str, dict[str, float]] = {name: {} for name, kind in self._kinds.items() if kind.takes_turns}
        for attempt in self._attempts.values():
            job = attempt.run.lease.job
            if job.kind in turns:
                of_kind, one = turns[job.kind], 1 / self._weights(job.project_id)
                of_kind[job.project_id] = of_kind.get(job.project_id, 0.0) + one
        return turns

    def _start(self, lease: Lease, leased_at: float) -> None:
        run = Run(lease)
        if lease.job.cancel_requested_at is not None and self._kinds[lease.job.kind].children is None:
            run.interruption = Interruption.CANCELLED
        task = asyncio.create_task(self._attempt(run), name=f"job {lease.id}")
        self._attempts[lease.id, lease.attempt] = _Attempt(run, task, leased_at)

    async def _attempt(self, run: Run) -> None:
        kind = self._kinds[run.lease.job.kind]
        try:
            await self._executor.execute(kind, run)
        finally:
            self._attempts.pop((run.lease.id, run.lease.attempt), None)
            self._freed.set()

    async def _wait(self, news: asyncio.Event) -> None:
        """Until there is news, room, or nothing for a while."""
        waits: list[asyncio.Task[Any]] = [asyncio.create_task(event.wait()) for event in (news, self._freed)]
        waits.append(asyncio.create_task(self._clock.sleep(self._clock.jitter(self._settings.poll_seconds))))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    # Keeping.

    async def _renew_leases(self) -> None:
        pause = self._settings.lease_seconds / _RENEWALS
        with self._jobs.database.listen(CANCELS) as cancels:
            while True:
                cancels.clear()
                await self._renew()
                self._give_up()
                await self._pause(cancels, min(pause, self._until_deadline()))

    async def _renew(self) -> None:
        """Renew every lease, if the database answers."""
        attempts, asked_at = list(self._attempts.values()), self._clock.monotonic()
        if not attempts:
            return
        ids = {attempt.run.lease.id for attempt in attempts}
        try:
            renewed = await self._jobs.renew(self._node, ids, self._settings.lease_seconds)
        except ForebayError as error:
            self._note_away(error)
            return
        self._judge(attempts, renewed, asked_at)

    def _judge(self, attempts: Sequence[_Attempt], renewed: Mapping[str, Renewed], asked_at: float) -> None:
        now = self._jobs.now()
        for attempt in attempts:
            lease = attempt.run.lease
            answer = renewed.get(lease.id)
            if answer is None or answer.attempt != lease.attempt:
                if not attempt.task.done():
                    attempt.interrupt(Interruption.LEASE_LOST)
                continue
            attempt.leased_at = asked_at
            if answer.cancel_requested and self._kinds[lease.job.kind].children is None:
                attempt.interrupt(Interruption.CANCELLED)
            elif now >= lease.job.deadline_at and self._kinds[lease.job.kind].children is None:
                attempt.interrupt(Interruption.EXPIRED)

    def _give_up(self) -> None:
        """A paused or cut-off worker must not believe in leases that may have gone to others."""
        now = self._clock.monotonic()
        for attempt in list(self._attempts.values()):
            if now - attempt.leased_at >= self._settings.lease_seconds:
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
