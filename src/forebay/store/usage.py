"""What was used by project, key, model, day and capability, as rows; and how far the journals are in them.

It refuses to count a record of a journal twice: what is added up and how far that was go into one transaction.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from forebay.clock import Clock
from forebay.quotas import Account, Amounts, Counted, Use, day_of
from forebay.store.database import Database, Transaction, delete_some
from forebay.store.tables import projects, usage, usage_journals

GROUPS = ("project_id", "key_id", "model", "capability")
_AMOUNTS = tuple(field.name for field in fields(Use))
_AT_ONCE = 200  # rows of a statement
_KEY = ("day", *GROUPS)


@dataclass(frozen=True, slots=True)
class Fold:
    """Records of a journal, added up: the `number`th of its folds, and where in the journal they end."""

    journal: str
    number: int
    end: int
    totals: Mapping[tuple[str, Account], Use]


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What was used on one day by one group; `group` has the values of what it is grouped by."""

    day: str
    group: tuple[str, ...]
    use: Use


class UsageStore:
    """Every statement about usage."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def add(self, transaction: Transaction, used: Mapping[Account, Use]) -> None:
        """Count what a job has used, in the transaction that keeps its result; the last statement of it that waits."""
        day = day_of(self._clock.now())
        await self._add(transaction, {(day, account): use for account, use in used.items()})

    async def fold(self, node: str, fold: Fold) -> None:
        """Count records of a journal, if that is not done already. Raises StoreUnavailable and InsufficientStorage."""
        now = self._clock.now()
        mine = usage_journals.c.id == fold.journal
        async with self._database.begin() as transaction:
            query = sa.select(usage_journals.c.folds).where(mine).with_for_update()
            before = await transaction.scalar(query)
            if before is not None and before >= fold.number:
                return
            values = {"folds": fold.number, "position": fold.end, "folded_at": now}
            if before is None:
                await transaction.execute(sa.insert(usage_journals).values(id=fold.journal, node=node, **values))
            else:
                await transaction.execute(sa.update(usage_journals).where(mine).values(values))
            await self._add(transaction, fold.totals)

    async def _add(self, transaction: Transaction, totals: Mapping[tuple[str, Account], Use]) -> None:
        insert = sqlite.insert if self._database.is_sqlite else postgresql.insert
        # In one order for all: two who add to the same rows at once wait for each other in turn.
        rows = sorted((_row(day, account, use) for (day, account), use in totals.items()), key=_key)
        for start in range(0, len(rows), _AT_ONCE):
            query = insert(usage).values(rows[start : start + _AT_ONCE])
            summed = {name: usage.c[name] + query.excluded[name] for name in _AMOUNTS}
            await transaction.execute(query.on_conflict_do_update(index_elements=list(_KEY), set_=summed))

    async def place(self, journal: str) -> tuple[int, int]:
        """How many folds of a journal there were, and how far they went; zeros for none."""
        query = sa.select(usage_journals.c.folds, usage_journals.c.position).where(usage_journals.c.id == journal)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return (0, 0) if row is None else (row.folds, row.position)

    async def forget(self, journal: str) -> None:
        """The journal is removed."""
        async with self._database.begin() as transaction:
            await transaction.execute(sa.delete(usage_journals).where(usage_journals.c.id == journal))

    async def forget_missing(self, node: str, there: Collection[str]) -> None:
        """Forget the journals that a dead process of this name wrote and that are removed; `there` are those that are not."""
        mine = usage_journals.c.id.startswith(f"{node}.", autoescape=True)
        async with self._database.read() as connection:
            known = (await connection.scalars(sa.select(usage_journals.c.id).where(mine))).all()
        for journal in set(known) - set(there):
            await self.forget(journal)

    async def counted(self, watched: Sequence[str], day: str) -> dict[str, Counted]:
        """What projects have used on a day and in its month."""
        found: dict[str, Counted] = {}
        for start in range(0, len(watched), _AT_ONCE):
            found |= await self._counted(watched[start : start + _AT_ONCE], day)
        return found

    async def _counted(self, watched: Sequence[str], day: str) -> dict[str, Counted]:
        tokens = usage.c.prompt_tokens + usage.c.completion_tokens
        amounts = (usage.c.requests, tokens, usage.c.audio_ms, usage.c.pixel_steps)
        today = [sa.func.sum(sa.case((usage.c.day == day, each), else_=0)) for each in amounts]
        query = (
            sa.select(usage.c.project_id, *today, *(sa.func.sum(each) for each in amounts))
            .where(usage.c.project_id.in_(watched), usage.c.day >= f"{day[:7]}-01", usage.c.day <= f"{day[:7]}-31")
            .group_by(usage.c.project_id)
        )
        month = day[:7]
        found = {project: Counted(day, month, Amounts(), Amounts()) for project in watched}
        async with self._database.read() as connection:
            for project, *sums in await connection.execute(query):
                numbers = [int(each) for each in sums]
                found[project] = Counted(day, month, Amounts(*numbers[:4]), Amounts(*numbers[4:]))
        return found

    async def report(
        self,
        *,
        first: str,
        last: str,
        groups: Sequence[str],
        limit: int,
        project: str | None = None,
        after: Sequence[str] | None = None,
        only: Mapping[str, Collection[str]] | None = None,
    ) -> tuple[list[UsageRow], bool]:
        """A page of what was used from `first` to `last`, by day and by `groups`, and whether there is more.

        `after` is the day and group of the last row of the page before; `only` are values that columns may have.
        """
        columns = [usage.c.day, *(usage.c[name] for name in groups)]
        query = sa.select(*columns, *(sa.func.sum(usage.c[name]) for name in _AMOUNTS))
        query = query.where(usage.c.day >= first, usage.c.day <= last)
        if project is not None:
            query = query.where(usage.c.project_id == project)
        for name, values in (only or {}).items():
            query = query.where(usage.c[name].in_(sorted(values)))
        if after is not None:
            query = query.where(sa.tuple_(*columns) > sa.tuple_(*after))
        query = query.group_by(*columns).order_by(*columns).limit(limit + 1)
        async with self._database.read() as connection:
            rows = (await connection.execute(query)).all()
        found = [_usage_row(tuple(row), len(columns)) for row in rows[:limit]]
        return found, len(rows) > limit

    async def prune(self, before: str, rows_max: int) -> int:
        """Forget what was used before a day; how many rows."""
        async with self._database.begin() as transaction:
            day = await transaction.scalar(sa.select(sa.func.min(usage.c.day)).where(usage.c.day < before))
            if day is None:
                return 0
            return int((await transaction.execute(delete_some(usage, usage.c.day == day, limit=rows_max))).rowcount)

    async def project_names(self, ids: Collection[str]) -> dict[str, str]:
        """The names of projects."""
        query = sa.select(projects.c.id, projects.c.name).where(projects.c.id.in_(sorted(ids)))
        async with self._database.read() as connection:
            return {row.id: row.name for row in await connection.execute(query)}


def _row(day: str, account: Account, use: Use) -> dict[str, Any]:
    return {
        "day": day,
        "project_id": account.project,
        "key_id": account.key_id,
        "model": account.model,
        "capability": account.capability,
        **asdict(use),
    }


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in _KEY)


def _usage_row(values: tuple[Any, ...], columns: int) -> UsageRow:
    return UsageRow(values[0], tuple(values[1:columns]), Use(*(int(each) for each in values[columns:])))
