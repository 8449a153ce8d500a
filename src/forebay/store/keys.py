"""Projects and their API keys, as rows.

It refuses to keep a key itself: it stores a hash, the public prefix and the last four characters.
"""

import re
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from forebay.clock import Clock, new_id
from forebay.errors import InvalidRequest, NotFound
from forebay.inference import Capability
from forebay.store.database import Database
from forebay.store.key_format import Role, hash_key, make_key
from forebay.store.tables import api_keys, projects

DEFAULT_PROJECT = "default"
PAGE_SIZE_MAX = 100
_PROJECT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY_NAME_CHARS_MAX = 128

_RECORDS = sa.select(api_keys, projects.c.name.label("project")).join(projects)
# The one spelling of "insert unless it is there" that both databases share.
_CREATE_PROJECT = sa.text(
    "INSERT INTO projects (id, name, created_at) VALUES (:id, :name, :created_at) ON CONFLICT (name) DO NOTHING"
)


@dataclass(frozen=True, slots=True)
class Project:
    """A tenant: what belongs to one is never shown to another."""

    id: str
    name: str
    created_at: float


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is known of a key. Times are seconds since the epoch; no scopes means all of them."""

    id: str
    project_id: str
    project: str
    prefix: str
    hash: bytes = field(repr=False)
    last4: str
    name: str
    role: Role
    scopes: frozenset[Capability]
    expires_at: float | None
    revoked_at: float | None
    created_at: float
    requests_per_minute: int | None
    tokens_per_minute: int | None


class KeyStore:
    """Every statement about projects and keys."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def get_or_create_project(self, name: str) -> Project:
        """The project of that name; any number of callers at once get the same one."""
        _check_project_name(name)
        async with self._database.begin() as connection:
            return await self._project(connection, name)

    async def create_key(
        self,
        project: str = DEFAULT_PROJECT,
        *,
        name: str = "",
        role: Role = Role.MEMBER,
        scopes: frozenset[Capability] = frozenset(),
        expires_at: float | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> tuple[KeyRecord, str]:
        """A new key and its plain text, which nobody can ask for again. Creates the project on its first key."""
        _check_project_name(project)
        _check_key(name, requests_per_minute, tokens_per_minute)
        key = make_key()
        async with self._database.begin() as connection:
            owner = await self._project(connection, project)
            record = KeyRecord(
                id=new_id("key"),
                project_id=owner.id,
                project=owner.name,
                prefix=key.prefix,
                hash=hash_key(key.plain),
                last4=key.plain[-4:],
                name=name,
                role=role,
                scopes=scopes,
                expires_at=expires_at,
                revoked_at=None,
                created_at=self._clock.now(),
                requests_per_minute=requests_per_minute,
                tokens_per_minute=tokens_per_minute,
            )
            await connection.execute(sa.insert(api_keys).values(_row(record)))
        return record, key.plain

    async def find(self, prefix: str) -> KeyRecord | None:
        """The key whose public part this is, revoked and expired ones too."""
        async with self._database.read() as connection:
            row = (await connection.execute(_RECORDS.where(api_keys.c.prefix == prefix))).one_or_none()
        return None if row is None else _record(row)

    async def list(
        self, project: str | None = None, *, after: str | None = None, limit: int = PAGE_SIZE_MAX
    ) -> list[KeyRecord]:
        """One page of keys, oldest first: those behind the key `after`. Raises NotFound if there is no such key."""
        query = _RECORDS.order_by(api_keys.c.created_at, api_keys.c.id).limit(max(1, min(limit, PAGE_SIZE_MAX)))
        if project is not None:
            query = query.where(projects.c.name == project)
        async with self._database.read() as connection:
            if after is not None:
                place = sa.select(api_keys.c.created_at, api_keys.c.id).where(api_keys.c.id == after)
                row = (await connection.execute(place)).one_or_none()
                if row is None:
                    raise NotFound("There is no such key to continue after.", param="after")
                query = query.where(sa.tuple_(api_keys.c.created_at, api_keys.c.id) > sa.tuple_(*row))
            return [_record(row) for row in await connection.execute(query)]

    async def revoke(self, key: str) -> KeyRecord:
        """Revoke a key by its id or prefix; doing it again changes nothing. Raises NotFound."""
        chosen = sa.or_(api_keys.c.id == key, api_keys.c.prefix == key)
        now = self._clock.now()
        async with self._database.begin() as connection:
            await connection.execute(
                sa.update(api_keys).where(chosen, api_keys.c.revoked_at.is_(None)).values(revoked_at=now)
            )
            row = (await connection.execute(_RECORDS.where(chosen))).one_or_none()
        if row is None:
            raise NotFound("There is no such API key.")
        return _record(row)

    async def any_keys(self) -> bool:
        """Whether a key was ever created, revoked ones included."""
        async with self._database.read() as connection:
            return bool(await connection.scalar(sa.select(sa.exists().select_from(api_keys))))

    async def _project(self, connection: AsyncConnection, name: str) -> Project:
        find = sa.select(projects.c.id, projects.c.name, projects.c.created_at).where(projects.c.name == name)
        row = (await connection.execute(find)).one_or_none()
        if row is None:
            # The default project has a known id, so that the admin key of the settings belongs to it too.
            identity = DEFAULT_PROJECT if name == DEFAULT_PROJECT else new_id("proj")
            values = {"id": identity, "name": name, "created_at": self._clock.now()}
            await connection.execute(_CREATE_PROJECT, values)
            row = (await connection.execute(find)).one()
        return Project(row.id, row.name, row.created_at)


def _check_project_name(name: str) -> None:
    if not _PROJECT_NAME.fullmatch(name):
        raise InvalidRequest(
            "A project name has 1 to 64 letters, digits, dots, dashes and underscores, and starts with a letter or digit.",
            param="project",
        )


def _check_key(name: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
    if len(name) > _KEY_NAME_CHARS_MAX or not name.isprintable():
        raise InvalidRequest(f"A key name has at most {_KEY_NAME_CHARS_MAX} printable characters.", param="name")
    for rate in (requests_per_minute, tokens_per_minute):
        if rate is not None and not 1 <= rate <= 2**53:
            raise InvalidRequest("A rate is at least 1 in a minute.")


def _row(record: KeyRecord) -> dict[str, object]:
    row = {column.name: getattr(record, column.name) for column in api_keys.columns}
    return row | {"role": record.role.value, "scopes": " ".join(sorted(record.scopes))}


def _record(row: sa.Row[tuple[object, ...]]) -> KeyRecord:
    values = dict(row._mapping)  # noqa: SLF001  # SQLAlchemy's documented name
    values["role"] = Role(values["role"])
    values["scopes"] = frozenset(Capability(scope) for scope in str(values["scopes"]).split())
    values["hash"] = bytes(values["hash"])
    return KeyRecord(**values)
