"""The back office of one process: its desk, its worker, and who cleans up after everybody.

It refuses to know a kind of job by name; `forebay.app` hands it the list.
"""

import asyncio
from collections.abc import Sequence

from forebay.clock import Clock
from forebay.config import JobSettings
from forebay.errors import ForebayError
from forebay.jobs.desk import Desk
from forebay.jobs.executor import Executor
from forebay.jobs.kinds import Kind
from forebay.jobs.pruner import Pruner, Sweep
from forebay.jobs.rescuer import Rescuer
from forebay.jobs.settlement import Settlement
from forebay.jobs.worker import Loaded, Worker, nothing_loaded
from forebay.scheduler.shares import Weights, equal
from forebay.store.dead_letters import DeadLetterStore
from forebay.store.jobs import JobStore
from forebay.store.webhooks import WebhookStore
from forebay.telemetry import Log, Metrics


class Office:
    """Everything that happens to jobs in this process. With `works` false it only takes them in and cleans up."""

    def __init__(
        self,
        jobs: JobStore,
        webhooks: WebhookStore,
        dead_letters: DeadLetterStore,
        kinds: Sequence[Kind],
        sweeps: Sequence[Sweep],
        node: str,
        settings: JobSettings,
        clock: Clock,
        metrics: Metrics,
        *,
        works: bool,
        weights: Weights = equal,
        loaded: Loaded = nothing_loaded,
    ) -> None:
        by_name = {kind.name: kind for kind in kinds}
        settlement = Settlement(jobs, webhooks, dead_letters, by_name)
        self.desk = Desk(jobs, settlement, by_name, settings, clock)
        self._node = node
        self._clock = clock
        self._poll_seconds = settings.poll_seconds
        self._rescuer = Rescuer(jobs, settlement, by_name, settings, clock, metrics)
        self._pruner = Pruner(sweeps, settings, clock)
        executor = Executor(jobs, settlement, clock, metrics)
        worker = Worker(jobs, executor, by_name, node, settings, clock, metrics, weights, loaded)
        self._worker = worker if works else None
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Take back what an earlier process of this name left, then work until `stop`."""
        chores = [asyncio.create_task(self._rescuer.run()), asyncio.create_task(self._pruner.run())]
        work = asyncio.create_task(self._work())
        try:
            done, _ = await asyncio.wait([work, *chores], return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()
        finally:
            self.stop()
            for chore in chores:
                chore.cancel()
            await asyncio.wait([work, *chores])

    def stop(self) -> None:
        """Let running attempts write down what they have; `run` ends when they have."""
        self._stopping.set()
        if self._worker is not None:
            self._worker.stop()

    async def _work(self) -> None:
        if self._worker is None:
            await self._stopping.wait()
            return
        while not self._stopping.is_set():
            try:
                await self._rescuer.rescue_node(self._node)
                break
            except ForebayError as error:  # the database is away at start; the leases are not going anywhere
                Log().warning("worker.store_away", reason=str(error))
                await self._clock.sleep(self._clock.jitter(self._poll_seconds))
        await self._worker.run()
