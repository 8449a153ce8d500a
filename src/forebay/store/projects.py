"""Projects with what they may use, as rows: their share, and the quotas of their own.

It refuses a share or a quota that is out of bounds, and to make a project: a first key does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from forebay.clock import Clock
from forebay.errors import InvalidRequest, NotFound
from forebay.quotas import WEIGHT_MAX, WEIGHT_MIN, ProjectLimits, Quota, parse_quotas
from forebay.store.database import Database, Transaction
from forebay.store.tables import project_limits, projects

PAGE_SIZE_MAX = 100


@dataclass(frozen=True, slots=True)
class LimitedProject:
    """A project and its limits."""

    id: str
    name: str
    created_at: float
    limits: ProjectLimits


class ProjectStore:
    """Every statement about the limits of projects."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def limits(self) -> dict[str, ProjectLimits]:
        """The limits of all projects that have some of their own."""
        query = sa.select(project_limits.c.project_id, project_limits.c.weight, project_limits.c.quotas)
        async with self._database.read() as connection:
            return {row.project_id: _limits(row.weight, row.quotas) for row in await connection.execute(query)}

    async def list(self, *, after: str | None = None, limit: int = PAGE_SIZE_MAX) -> tuple[list[LimitedProject], bool]:
        """A page of projects by name, behind the name `after`, and whether there are more."""
        query = _joined().order_by(projects.c.name).limit(limit + 1)
        if after is not None:
            query = query.where(projects.c.name > after)
        async with self._database.read() as connection:
            found = [_project(row) for row in await connection.execute(query)]
        return found[:limit], len(found) > limit

    async def get(self, name: str) -> LimitedProject:
        """The project of that name. Raises NotFound."""
        async with self._database.read() as connection:
            row = (await connection.execute(_joined().where(projects.c.name == name))).one_or_none()
        if row is None:
            raise NotFound("There is no such project. It is made with its first API key.")
        return _project(row)

    async def set(
        self, name: str, *, weight: float | None = None, quotas: Sequence[Quota] | None = None, reset: bool = False
    ) -> LimitedProject:
        """Change the share, or each quota of the same resource and period. The rest stays; with `reset` it goes.

        Raises NotFound and InvalidRequest, and has changed nothing then.
        """
        if weight is not None and not WEIGHT_MIN <= weight <= WEIGHT_MAX:
            raise InvalidRequest(f"A weight is between {WEIGHT_MIN} and {WEIGHT_MAX:g}.", param="weight")
        insert = sqlite.insert if self._database.is_sqlite else postgresql.insert
        async with self._database.begin() as transaction:
            if await transaction.scalar(_held(projects.c.name == name)) is None:
                raise NotFound("There is no such project. It is made with its first API key.")
            project = _project((await transaction.execute(_joined().where(projects.c.name == name))).one())
            before = ProjectLimits() if reset else project.limits
            merged = {(quota.resource, quota.period): quota for quota in (*before.quotas, *(quotas or ()))}
            values = {
                "weight": before.weight if weight is None else weight,
                "quotas": [str(quota) for quota in merged.values()],
                "updated_at": self._clock.now(),
            }
            query = insert(project_limits).values(project_id=project.id, **values)
            await transaction.execute(query.on_conflict_do_update(index_elements=["project_id"], set_=values))
        return await self.get(name)


async def hold_project(transaction: Transaction, project_id: str) -> None:
    """Hold a project until the transaction ends, for who counts what it has before adding to it.

    On PostgreSQL two who come at once count one after the other. Rows that name the project can still be written.
    """
    if transaction.dialect.name != "sqlite":  # there one writes at a time
        await transaction.execute(_held(projects.c.id == project_id))


def _held(which: sa.ColumnElement[bool]) -> sa.Select[tuple[str]]:
    return sa.select(projects.c.id).where(which).with_for_update(key_share=True)


def _joined() -> sa.Select[tuple[str, str, float, float | None, list[str] | None]]:
    return sa.select(
        projects.c.id, projects.c.name, projects.c.created_at, project_limits.c.weight, project_limits.c.quotas
    ).outerjoin(project_limits)


def _project(row: sa.Row[tuple[str, str, float, float | None, list[str] | None]]) -> LimitedProject:
    return LimitedProject(row.id, row.name, row.created_at, _limits(row.weight, row.quotas))


def _limits(weight: float | None, quotas: Sequence[str] | None) -> ProjectLimits:
    return ProjectLimits(1.0 if weight is None else weight, parse_quotas(quotas or ()))
