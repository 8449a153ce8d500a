"""Whom the spare place of a worker is for, where all its places for a kind of job are taken.

It refuses whoever has a job running already: whose project has one, and whose model does; one that is not loaded has to wait before.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from forebay.store.tables import jobs


@dataclass(frozen=True, slots=True)
class Others:
    """Jobs that are not of these projects, or else not of these models if they were made `before` then, or at once if `loaded`.

    None is no model at all.
    """

    projects: Collection[str]
    models: Collection[str] | None
    before: float
    loaded: Collection[str] = ()

    def of_model(self) -> sa.ColumnElement[bool]:
        """Jobs of another model that have waited, or need not."""
        if self.models is None:
            return sa.false()
        due = sa.or_(jobs.c.created_at < self.before, jobs.c.model.in_(self.loaded))
        return sa.and_(jobs.c.model.not_in(self.models), due)


def of_kind(kind: str, others: Mapping[str, Others]) -> sa.ColumnElement[bool]:
    """Jobs of a kind; where it has a spare place alone, those that this is for."""
    every = jobs.c.kind == kind
    if kind not in others:
        return every
    return sa.and_(every, sa.or_(jobs.c.project_id.not_in(others[kind].projects), others[kind].of_model()))
