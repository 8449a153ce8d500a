"""Jobs as rows: made, leased, renewed, settled, rescued, watched.

It refuses a write that does not name the attempt that it belongs to: a worker that was given up for dead cannot
overwrite the work of the one that replaced it. Whoever changes both a job and its parent takes the parent first, and
whoever changes many jobs takes them in the order of their ids.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from forebay.clock import Clock
from forebay.errors import Conflict, LeaseLost, NotFound
from forebay.store.database import Database, Transaction
from forebay.store.job_records import Job, Lease, NewJob, Renewed, Verdict, job_of, new_row
from forebay.store.job_state import FINISHED, LIVE, JobState, sources
from forebay.store.spare import Others, of_kind
from forebay.store.tables import job_log, jobs, line_rates, media_jobs

NEWS = "jobs"  # the channel on which workers hear of work
CANCELS = "cancels"  # the channel on which workers hear of cancelled jobs
PAGE_SIZE_MAX = 100
ERRORS_MAX = 10
_DETAIL_CHARS_MAX = 1000
REMOVING, REMOVED = "removing", "removed"  # the media that came with a job: nobody can work on it again
HAS_LOST_MEDIA = media_jobs.c.media.in_((REMOVING, REMOVED))

_NO_TURNS: Mapping[str, Mapping[str, float]] = {}
_NO_SPARE: Mapping[str, int] = {}
_NO_MODELS: Mapping[str, Collection[str]] = {}


@dataclass(frozen=True, slots=True)
class _Due:
    """Whether any job is due; the models whose jobs fail, and the ids of the jobs of these that may be tried."""

    any: bool = True
    failing: Collection[str] = ()
    probes: Collection[str] = ()

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """What a job has to meet to be leased."""
        if not self.failing:
            return []
        return [sa.or_(jobs.c.model.is_(None), jobs.c.model.not_in(self.failing), jobs.c.id.in_(self.probes))]


class JobStore:
    """Every statement about jobs."""

    def __init__(self, database: Database, clock: Clock, log_lines_max: int = 200) -> None:
        self.database = database
        self._clock = clock
        self._log_lines_max = log_lines_max

    def now(self) -> float:
        """The time by which leases are kept: the database's, where several machines share one."""
        return self.database.now(self._clock)

    # Making.

    async def insert(self, transaction: Transaction, new: Sequence[NewJob]) -> list[str]:
        """Make jobs, ready to be leased, and tell the workers; the ids in the same order."""
        if not new:
            return []
        now = self.now()
        rows = [new_row(each, now) for each in new]
        await transaction.execute(sa.insert(jobs), rows)
        await self.database.notify(transaction, NEWS)
        return [row["id"] for row in rows]

    # Leasing.

    async def lease(
        self,
        room: Mapping[str, int],
        node: str,
        lease_seconds: float,
        *,
        warm: Collection[str] = (),
        group_wait_seconds: float = 0.0,
        turns: Mapping[str, Mapping[str, float]] = _NO_TURNS,
        grouped: Collection[str] = (),
        spare: Mapping[str, int] = _NO_SPARE,
        models: Mapping[str, Collection[str]] = _NO_MODELS,
        loaded: Collection[str] = (),
    ) -> list[Lease]:
        """Lease what goes first of each kind, at most `room[kind]` jobs of it.

        The order: priority; then jobs of a `warm` or a `loaded` model, and those that have waited for
        `group_wait_seconds`; then the deadline; then age. Of a model whose jobs fail, and have made no progress since, one is leased at a time, and
        none while the model is `warm`: a worker that has one of its jobs already takes no second one.

        Of a kind in `turns` projects of which fewer jobs run go before others, by the number there, and of a `grouped`
        one behind the question of the model; it gets half of its room at a time, so that the next ones are chosen with
        a look at these. Where there is no room, a `spare` place is for a project that is not in `turns` and, before that,
        for a job that has waited for `group_wait_seconds`, or is of a `loaded` model, and of none that is in `models`, of
        which jobs run.
        """
        others = {
            kind: Others(turns[kind], models.get(kind), self.now() - group_wait_seconds, loaded)
            for kind, count in spare.items()
            if count > 0 >= room[kind]
        }
        wanted = {kind: count for kind, count in room.items() if count > 0} | dict.fromkeys(others, 1)
        if not wanted:
            return []
        due = await self._look(wanted, warm, others)
        if not due.any:
            return []
        leases: list[Lease] = []
        async with self.database.begin() as transaction:
            for kind, count in wanted.items():
                some = (count + 1) // 2 if kind in turns else count
                order = self._order(
                    {*warm, *loaded} if warm else (), group_wait_seconds, turns.get(kind, {}), grouped=kind in grouped
                )
                if kind in others:
                    order.insert(1, sa.case((others[kind].of_model(), 0), else_=1))  # behind the priority
                query = self._lease(of_kind(kind, others), some, node, lease_seconds, order, due)
                leases += [Lease(job_of(row)) for row in await transaction.execute(query)]
        leases.sort(key=lambda lease: (lease.job.priority, lease.job.deadline_at, lease.job.created_at))
        return leases

    async def _look(self, kinds: Iterable[str], warm: Collection[str], others: Mapping[str, Others]) -> _Due:
        """A look that takes no lock, so that an idle worker does not write."""
        plain = jobs.c.kind.in_([kind for kind in kinds if kind not in others])
        wanted = sa.or_(plain, *(of_kind(kind, others) for kind in others))
        due = (jobs.c.state == JobState.AVAILABLE, wanted, self._is_due())
        async with self.database.read() as connection:
            if not await connection.scalar(sa.select(sa.exists().where(*due))):
                return _Due(any=False)
            live = (jobs.c.state.in_((JobState.AVAILABLE, JobState.RUNNING)), jobs.c.kind.in_(kinds))
            query = sa.select(jobs.c.model).where(*live, jobs.c.failures > 0, jobs.c.model.is_not(None)).distinct()
            failing = set((await connection.execute(query)).scalars())
            if failing <= set(warm):
                return _Due(failing=failing)
            first = sa.over(
                sa.func.row_number(),
                partition_by=(jobs.c.kind, jobs.c.model),
                order_by=(jobs.c.priority, jobs.c.deadline_at, jobs.c.created_at, jobs.c.id),
            )
            some = sa.select(jobs.c.id, first.label("place")).where(*due, jobs.c.model.in_(failing - set(warm)))
            ranked = some.subquery()
            probes = (await connection.execute(sa.select(ranked.c.id).where(ranked.c.place == 1))).scalars()
            return _Due(failing=failing, probes=set(probes))

    def _is_due(self) -> sa.ColumnElement[bool]:
        return jobs.c.run_at <= self.now()

    def _order(
        self, warm: Collection[str], group_wait_seconds: float, running: Mapping[str, float], *, grouped: bool
    ) -> list[sa.ColumnElement[Any]]:
        order: list[sa.ColumnElement[Any]] = []
        if running:
            order.append(sa.case(dict(running), value=jobs.c.project_id, else_=0))
        if warm:
            first = sa.or_(jobs.c.model.in_(warm), jobs.c.created_at < self.now() - group_wait_seconds)
            order.insert(0 if grouped else len(order), sa.case((first, 0), else_=1))
        return [jobs.c.priority, *order, jobs.c.deadline_at, jobs.c.created_at, jobs.c.id]

    def _lease(
        self,
        wanted: sa.ColumnElement[bool],
        count: int,
        node: str,
        lease_seconds: float,
        order: Sequence[sa.ColumnElement[Any]],
        due: _Due,
    ) -> sa.Executable:
        now = self.now()
        chosen = (
            sa.select(jobs.c.id)
            .where(jobs.c.state == JobState.AVAILABLE, wanted, self._is_due(), *due.conditions())
            .order_by(*order)
            .limit(count)
            .with_for_update(skip_locked=True)
            # PostgreSQL may run a locking subquery again for each row, and lease more than the limit; a CTE runs once.
            .cte("chosen")
        )
        return (
            sa.update(jobs)
            .where(jobs.c.id.in_(sa.select(chosen.c.id)), jobs.c.state.in_(sources(JobState.RUNNING)))
            .values(
                state=JobState.RUNNING,
                attempt=jobs.c.attempt + 1,
                node=node,
                lease_expires_at=now + lease_seconds,
                started_at=sa.func.coalesce(jobs.c.started_at, now),
                progress_at=now,
            )
            .returning(*jobs.columns)
        )

    async def renew(self, node: str, ids: Collection[str], lease_seconds: float) -> dict[str, Renewed]:
        """Renew the leases of `node` on these jobs; a job that is not in the answer is lost."""
        mine = (jobs.c.id.in_(ids), jobs.c.state == JobState.RUNNING, jobs.c.node == node)
        query = (
            sa.update(jobs)
            .where(*in_order(self.database, *mine))
            .values(lease_expires_at=self.now() + lease_seconds)
            .returning(jobs.c.id, jobs.c.attempt, jobs.c.cancel_requested_at)
        )
        async with self.database.begin() as transaction:
            rows = (await transaction.execute(query)).all()
        return {row.id: Renewed(row.attempt, row.cancel_requested_at is not None) for row in rows}

    # Writing under a lease.

    async def fence(self, transaction: Transaction, lease: Lease) -> None:
        """Hold the job for this transaction as a sign of progress. Raises LeaseLost if another attempt has it."""
        await self._fenced(transaction, lease, {"progress_at": self.now(), "failures": 0, "rescues": 0})

    async def progress(
        self, transaction: Transaction, lease: Lease, *, stage: str | None = None, total: int | None = None
    ) -> None:
        """The same, and write down where the job is. Raises LeaseLost."""
        values: dict[str, Any] = {"progress_at": self.now(), "failures": 0, "rescues": 0}
        values |= {name: value for name, value in (("stage", stage), ("total", total)) if value is not None}
        await self._fenced(transaction, lease, values)

    async def measure(self, transaction: Transaction, job_id: str, total: int, model: str | None) -> None:
        """Say how much there is to do in all, and for which model if it is one."""
        await transaction.execute(sa.update(jobs).where(jobs.c.id == job_id).values(total=total, model=model))

    async def count(self, transaction: Transaction, job_id: str, *, completed: int = 0, failed: int = 0) -> None:
        """Add to the counts of a job, under a lease of a child of it: counts never go down."""
        assert completed >= 0, completed
        assert failed >= 0, failed
        values = {
            "completed": jobs.c.completed + completed,
            "failed": jobs.c.failed + failed,
            "progress_at": self.now(),
        }
        await transaction.execute(sa.update(jobs).where(jobs.c.id == job_id).values(values))

    async def settle(self, transaction: Transaction, lease: Lease, verdict: Verdict) -> None:
        """Close the attempt. Raises LeaseLost if another attempt has the job."""
        await self._fenced(transaction, lease, self._closing(lease.job, verdict))
        if verdict.state is JobState.AVAILABLE:
            await self.database.notify(transaction, NEWS)

    async def _fenced(self, transaction: Transaction, lease: Lease, values: Mapping[str, Any]) -> None:
        held = [jobs.c.id == lease.id, jobs.c.attempt == lease.attempt, jobs.c.state == JobState.RUNNING]
        if lease.unless_renewed:
            held.append(jobs.c.lease_expires_at == lease.job.lease_expires_at)
        query = sa.update(jobs).where(*held).values(values)
        if (await transaction.execute(query)).rowcount != 1:
            raise LeaseLost

    async def settle_completed(self, transaction: Transaction, leases: Collection[Lease]) -> set[tuple[str, int]]:
        """Close many attempts that ended well in one statement; (job, attempt) of those that still held."""
        pairs = [(lease.id, lease.attempt) for lease in leases]
        held = (sa.tuple_(jobs.c.id, jobs.c.attempt).in_(pairs), jobs.c.state == JobState.RUNNING)
        query = (
            sa.update(jobs)
            .where(*in_order(self.database, *held))
            .values(state=JobState.COMPLETED, finished_at=self.now(), lease_expires_at=None, node=None)
            .returning(jobs.c.id, jobs.c.attempt)
        )
        return {(row.id, row.attempt) for row in await transaction.execute(query)}

    def _closing(self, job: Job, verdict: Verdict) -> dict[str, Any]:
        assert job.state in sources(verdict.state), f"{job.state} -> {verdict.state}"
        values: dict[str, Any] = {"state": verdict.state, "run_at": verdict.run_at}
        values |= {"lease_expires_at": None, "node": None}
        if verdict.state in FINISHED:
            values["finished_at"] = self.now()
        if verdict.stage is not None:
            values["stage"] = verdict.stage
        if verdict.counts_as_failure:
            values["failures"] = jobs.c.failures + 1
        if verdict.error is not None:
            code, message = verdict.error
            entry = {"attempt": job.attempt, "at": self.now(), "code": code, "message": message[:_DETAIL_CHARS_MAX]}
            values |= {"errors": [*job.errors, entry][-ERRORS_MAX:]}
            values |= {"error_code": code, "error_message": message[:_DETAIL_CHARS_MAX]}
        return values

    # Parents and children.

    async def lock(self, transaction: Transaction, job_id: str) -> Job | None:
        """Hold a job's row until the transaction ends; its newest state, or None if there is no such job."""
        query = sa.select(jobs).where(jobs.c.id == job_id).with_for_update()
        row = (await transaction.execute(query)).one_or_none()
        return None if row is None else job_of(row)

    async def wake_parent(self, transaction: Transaction, parent_id: str, kind: str, stage: str) -> bool:
        """Make a waiting parent available again at `stage` if none of its children of `kind` is left; whether it was.

        The caller holds the parent's row, so that two last children cannot both see each other.
        """
        child = jobs.alias("child")
        left = sa.exists().where(child.c.parent_id == parent_id, child.c.kind == kind, child.c.state.in_(LIVE))
        query = (
            sa.update(jobs)
            .where(jobs.c.id == parent_id, jobs.c.state == JobState.WAITING, ~left)
            .values(state=JobState.AVAILABLE, stage=stage, run_at=self.now(), progress_at=self.now())
        )
        woken = (await transaction.execute(query)).rowcount == 1
        if woken:
            await self.database.notify(transaction, NEWS)
        return woken

    async def end_available_children(self, transaction: Transaction, parent_id: str, kind: str, state: JobState) -> int:
        """End every child of `kind` that is not running; how many."""
        assert JobState.AVAILABLE in sources(state), state
        # Those that run are held as well: the same transaction may ask them to stop.
        live = (jobs.c.parent_id == parent_id, jobs.c.kind == kind, jobs.c.state.in_(LIVE))
        query = (
            sa.update(jobs)
            .where(*in_order(self.database, *live), jobs.c.state == JobState.AVAILABLE)
            .values(state=state, finished_at=self.now())
        )
        return int((await transaction.execute(query)).rowcount)

    async def request_cancel(self, transaction: Transaction, job_id: str, *, children_of: str | None = None) -> None:
        """Ask the workers of a job, or of all running children of `children_of`, to stop."""
        now = self.now()
        chosen = jobs.c.id == job_id
        if children_of is not None:
            chosen = sa.or_(chosen, sa.and_(jobs.c.parent_id == children_of, jobs.c.state == JobState.RUNNING))
        asked = (chosen, jobs.c.state.in_(LIVE), jobs.c.cancel_requested_at.is_(None))
        query = sa.update(jobs).where(*in_order(self.database, *asked)).values(cancel_requested_at=now)
        await transaction.execute(query)
        await self.database.notify(transaction, CANCELS)

    async def end_available(self, transaction: Transaction, job: Job, verdict: Verdict) -> bool:
        """End a job that nobody runs; whether it still was so."""
        query = (
            sa.update(jobs)
            .where(jobs.c.id == job.id, jobs.c.state == JobState.AVAILABLE, jobs.c.attempt == job.attempt)
            .values(self._closing(job, verdict))
        )
        return bool((await transaction.execute(query)).rowcount == 1)

    async def revive(self, transaction: Transaction, job: Job, stage: str | None = None) -> bool:
        """Make a finished job available again, with all its attempts and its time before it; whether it was finished.

        Raises Conflict if what came with it is gone.
        """
        await self.lock(transaction, job.id)  # whoever removes media holds it too: the next statement sees what he did
        if await transaction.scalar(sa.select(media_are_lost(job.id))):
            raise Conflict(
                "What came with this job went when it ended. Send it again as a new request.", code="input_gone"
            )
        now = self.now()
        again = now + jobs.c.deadline_at - jobs.c.created_at
        query = (
            sa.update(jobs)
            .where(jobs.c.id == job.id, jobs.c.state.in_(sources(JobState.AVAILABLE) & FINISHED))
            .values(
                state=JobState.AVAILABLE,
                stage=job.stage if stage is None else stage,
                run_at=now,
                deadline_at=sa.case((jobs.c.deadline_at <= now, again), else_=jobs.c.deadline_at),
                failures=0,
                rescues=0,
                finished_at=None,
                cancel_requested_at=None,
                error_code=None,
                error_message=None,
            )
        )
        revived = (await transaction.execute(query)).rowcount == 1
        if revived:
            await self.database.notify(transaction, NEWS)
        return revived

    # Rescuing and pruning.

    async def lost(self, limit: int, node: str | None = None) -> list[Job]:
        """Running jobs whose lease has run out; with `node`, those of a node that is known to be dead."""
        gone = jobs.c.lease_expires_at < self.now() if node is None else jobs.c.node == node
        query = sa.select(jobs).where(jobs.c.state == JobState.RUNNING, gone).limit(limit)
        async with self.database.read() as connection:
            return [job_of(row) for row in await connection.execute(query)]

    async def take_back(self, transaction: Transaction, lost: Collection[Job]) -> int:
        """Make lost jobs available again; how many of them were still lost, and not locked."""
        places = [(job.id, job.attempt, job.lease_expires_at) for job in lost]
        still_lost = (
            sa.tuple_(jobs.c.id, jobs.c.attempt, jobs.c.lease_expires_at).in_(places),
            jobs.c.state == JobState.RUNNING,
        )
        query = (
            sa.update(jobs)
            # Not those that somebody has locked: he may stand still with them, and the others need not wait for that.
            .where(*in_order(self.database, *still_lost, skip_locked=True))
            .values(
                state=JobState.AVAILABLE,
                rescues=jobs.c.rescues + 1,
                run_at=self.now(),
                lease_expires_at=None,
                node=None,
            )
        )
        count = int((await transaction.execute(query)).rowcount)
        if count:
            await self.database.notify(transaction, NEWS)
        return count

    async def unwanted(self, kinds: Collection[str], limit: int) -> list[Job]:
        """Jobs that nobody runs, and nobody is to run: the deadline has passed, or a failed attempt met a cancellation.

        One that waits is ended by the ends of its children.
        """
        unwanted = sa.or_(jobs.c.deadline_at <= self.now(), jobs.c.cancel_requested_at.is_not(None))
        query = sa.select(jobs).where(jobs.c.state == JobState.AVAILABLE, jobs.c.kind.in_(kinds), unwanted).limit(limit)
        async with self.database.read() as connection:
            return [job_of(row) for row in await connection.execute(query)]

    async def prune(self, finished_before: float, limit: int) -> int:
        """Remove finished jobs, and all that hangs on them; how many."""
        live_parent = jobs.alias("parent")
        needed = sa.exists().where(live_parent.c.id == jobs.c.parent_id, live_parent.c.state.in_(LIVE))
        old = sa.select(jobs.c.id).where(jobs.c.finished_at < finished_before, jobs.c.state.in_(FINISHED), ~needed)
        async with self.database.begin() as transaction:
            some = (await transaction.execute(old.limit(limit))).scalars().all()
            query = sa.delete(jobs).where(*in_order(self.database, jobs.c.id.in_(some), jobs.c.state.in_(FINISHED)))
            return int((await transaction.execute(query)).rowcount)

    async def delete(self, job: Job, children: str | None) -> bool:
        """Remove a job that is finished, its children of a kind, and all that hangs on them; whether it was finished."""
        gone = sa.delete(jobs).where(jobs.c.id == job.id, jobs.c.state.in_(FINISHED))
        async with self.database.begin() as transaction:
            deleted = (await transaction.execute(gone)).rowcount == 1
            if deleted and children is not None:
                theirs = (jobs.c.parent_id == job.id, jobs.c.kind == children)
                await transaction.execute(sa.delete(jobs).where(*in_order(self.database, *theirs)))
        return deleted

    # The log of one job.

    async def note(self, transaction: Transaction, job_id: str, event: str, detail: str = "") -> None:
        """Add a line to the job's log; the oldest ones make room."""
        last = sa.select(sa.func.coalesce(sa.func.max(job_log.c.number), 0)).where(job_log.c.job_id == job_id)
        number = int(await transaction.scalar(last) or 0) + 1
        line = {"job_id": job_id, "number": number, "at": self.now(), "event": event}
        await transaction.execute(sa.insert(job_log).values(**line, detail=detail[:_DETAIL_CHARS_MAX]))
        oldest = number - self._log_lines_max
        if oldest > 0:
            gone = sa.delete(job_log).where(job_log.c.job_id == job_id, job_log.c.number <= oldest)
            await transaction.execute(gone)

    async def log(self, job_id: str) -> list[dict[str, Any]]:
        """The lines of the job's log, oldest first."""
        query = sa.select(job_log).where(job_log.c.job_id == job_id).order_by(job_log.c.number)
        async with self.database.read() as connection:
            return [
                {"number": row.number, "at": row.at, "event": row.event, "detail": row.detail}
                for row in await connection.execute(query)
            ]

    # Looking.

    async def get(self, project_id: str, job_id: str) -> Job:
        """A project's job. Raises NotFound, also for another project's."""
        query = sa.select(jobs).where(jobs.c.id == job_id, jobs.c.project_id == project_id)
        async with self.database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise NotFound("There is no such job.")
        return job_of(row)

    async def list(
        self,
        project_id: str,
        *,
        kinds: Collection[str] = (),
        states: Collection[JobState] = (),
        after: str | None = None,
        limit: int = PAGE_SIZE_MAX,
    ) -> list[Job]:
        """A page of a project's jobs, newest first: those behind `after`. Raises NotFound if there is no such job."""
        query = sa.select(jobs).where(jobs.c.project_id == project_id)
        query = query.where(jobs.c.kind.in_(kinds)) if kinds else query
        query = query.where(jobs.c.state.in_(states)) if states else query
        if after is not None:
            place = await self.get(project_id, after)
            query = query.where(sa.tuple_(jobs.c.created_at, jobs.c.id) < sa.tuple_(place.created_at, place.id))
        query = query.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit)
        async with self.database.read() as connection:
            return [job_of(row) for row in await connection.execute(query)]

    async def marks(self, ids: Collection[str]) -> dict[str, tuple[Any, ...]]:
        """Of each of these jobs something that changes whenever there is news of it; nothing of one that is gone."""
        fields = (jobs.c.state, jobs.c.stage, jobs.c.attempt, jobs.c.total, jobs.c.completed, jobs.c.failed)
        query = sa.select(jobs.c.id, *fields, jobs.c.step, jobs.c.cancel_requested_at).where(jobs.c.id.in_(ids))
        async with self.database.read() as connection:
            return {row[0]: tuple(row[1:]) for row in await connection.execute(query)}

    async def ahead(self, job: Job) -> int:
        """How many live jobs of the same kind go before this one."""
        query = sa.select(sa.func.count()).select_from(jobs).where(_goes_before(job))
        async with self.database.read() as connection:
            return int(await connection.scalar(query) or 0)

    async def lines_ahead(self, job: Job) -> int:
        """How many lines of the same model are left in the live jobs that go before this one."""
        return await self._lines_left(_goes_before(job), jobs.c.model == job.model)

    async def lines_left(self, kind: str, model: str, priority: int) -> int:
        """How many lines of the model are left in live jobs that go before a new one of this priority."""
        before = (jobs.c.kind == kind, jobs.c.state.in_(LIVE), jobs.c.priority <= priority)
        return await self._lines_left(*before, jobs.c.model == model)

    async def _lines_left(self, *conditions: sa.ColumnElement[bool]) -> int:
        left = jobs.c.total - jobs.c.completed - jobs.c.failed
        async with self.database.read() as connection:
            return int(await connection.scalar(sa.select(sa.func.sum(left)).where(*conditions)) or 0)

    async def line_rate(self, model: str) -> float | None:
        """Lines a second of a model in batches, as it was measured last; None if it never was."""
        query = sa.select(line_rates.c.lines_per_second).where(line_rates.c.model == model)
        async with self.database.read() as connection:
            rate = await connection.scalar(query)
        return None if rate is None else float(rate)

    async def counts(self) -> dict[tuple[str, JobState], int]:
        """How many live jobs there are, by kind and state."""
        query = (
            sa.select(jobs.c.kind, jobs.c.state, sa.func.count())
            .where(jobs.c.state.in_(LIVE))
            .group_by(jobs.c.kind, jobs.c.state)
        )
        async with self.database.read() as connection:
            return {(kind, JobState(state)): count for kind, state, count in await connection.execute(query)}

    async def live(self, project_id: str, kind: str) -> int:
        """How many jobs of a kind a project has that have not ended."""
        return await self._count(jobs.c.project_id == project_id, jobs.c.kind == kind, jobs.c.state.in_(LIVE))

    async def stuck(self, seconds: float) -> int:
        """How many running jobs have made no progress for so long."""
        return await self._count(jobs.c.state == JobState.RUNNING, jobs.c.progress_at < self.now() - seconds)

    async def _count(self, *conditions: sa.ColumnElement[bool]) -> int:
        async with self.database.read() as connection:
            return int(await connection.scalar(sa.select(sa.func.count()).select_from(jobs).where(*conditions)) or 0)


def in_order(
    database: Database, *conditions: sa.ColumnElement[bool], skip_locked: bool = False
) -> tuple[sa.ColumnElement[bool], ...]:
    """The conditions, for a statement that locks all jobs that meet them in the order of their ids before it writes.

    Two statements about the same rows then wait for each other, and never in a circle.
    """
    if database.is_sqlite:
        return conditions  # one writes at a time
    held = sa.select(jobs.c.id).where(*conditions).order_by(jobs.c.id).with_for_update(skip_locked=skip_locked)
    # PostgreSQL may run a locking subquery again for each row; a CTE runs once. What was locked may have changed
    # while somebody else held it, so the conditions are asked once more of every row that is written.
    return (jobs.c.id.in_(sa.select(held.cte("held").c.id)), *conditions)


def media_are_lost(job_id: sa.ColumnElement[str] | str) -> sa.ColumnElement[bool]:
    """Whether nobody can work on the job of that id again, because what came with it is gone."""
    return sa.exists().where(media_jobs.c.id == job_id, HAS_LOST_MEDIA)


def _goes_before(job: Job) -> sa.ColumnElement[bool]:
    key = sa.tuple_(jobs.c.priority, jobs.c.deadline_at, jobs.c.created_at, jobs.c.id)
    earlier = key < sa.tuple_(job.priority, job.deadline_at, job.created_at, job.id)
    return sa.and_(jobs.c.kind == job.kind, jobs.c.state.in_(LIVE), earlier)
