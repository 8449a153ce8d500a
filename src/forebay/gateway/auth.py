"""Who is asking, and what they may do: headers in, Principal out.

It refuses whoever it cannot identify: an unknown key, a database that is away and a full line all leave the door shut.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from fastapi import Request
from pydantic import SecretStr

from forebay.clock import Clock, random_bytes
from forebay.errors import InvalidRequest, PermissionDenied, RateLimited, SetupError, StoreUnavailable, Unauthorized
from forebay.gateway.bucket import Bucket
from forebay.inference import Capability
from forebay.server_config import AuthSettings
from forebay.store.key_format import Role, hash_key, lookup_prefix, same_hash
from forebay.store.keys import DEFAULT_PROJECT, KeyRecord, KeyStore

ADMIN_KEY_ID = "admin_key"
_CREDENTIAL_CHARS_MAX = 512
_LOOKUPS_MAX = 256
_ADDRESSES_MAX = 10_000
_TOO_MANY_FAILURES = "Too many failed API key checks from this address. Try again later with a valid key."
_RANK = {Role.READ_ONLY: 0, Role.MEMBER: 1, Role.ADMIN: 2}


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is asking. No scopes means every capability; a rate of None means no limit."""

    key_id: str
    project_id: str
    role: Role
    scopes: frozenset[Capability] = frozenset()
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @property
    def can_write(self) -> bool:
        """Whether it may create anything, an answer of a model included."""
        return self.role is not Role.READ_ONLY

    def require_role(self, role: Role) -> None:
        """Raise PermissionDenied below `role`."""
        if _RANK[self.role] < _RANK[role]:
            raise PermissionDenied(
                f"This API key has the role {self.role.value}; that takes the role {role.value}.",
                code="insufficient_role",
            )

    def require_scope(self, capability: Capability) -> None:
        """Raise PermissionDenied unless it may create with this capability."""
        self.require_role(Role.MEMBER)
        if self.scopes and capability not in self.scopes:
            raise PermissionDenied(f"This API key has no scope `{capability.value}`.", code="insufficient_scope")


@dataclass(frozen=True, slots=True)
class _Known:
    record: KeyRecord | None  # None: no key has this prefix
    principal: Principal | None
    trusted_until: float


class Authenticator:
    """Checks keys against the store, through a short-lived memory of them.

    It owns the memory, the look-ups under way and the failures of each address, and is used on one event loop.
    Known and unknown prefixes are remembered apart, so that a flood of made-up keys cannot push out good ones.
    """

    def __init__(self, store: KeyStore, settings: AuthSettings, admin_key: SecretStr | None, clock: Clock) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._admin_hash = _admin_hash(admin_key)
        self._admin = Principal(ADMIN_KEY_ID, DEFAULT_PROJECT, Role.ADMIN)
        self._nobody = random_bytes(32)  # what a key is compared with when there is nothing to compare it with
        self._unknown_max = max(1, settings.key_cache_entries_max // 4)
        self._known_max = max(1, settings.key_cache_entries_max - self._unknown_max)
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._unknown: OrderedDict[str, _Known] = OrderedDict()
        self._lookups: dict[str, asyncio.Task[_Known]] = {}
        self._failures: OrderedDict[str, Bucket] = OrderedDict()

    async def authenticate(self, headers: Mapping[str, str], address: str = "") -> Principal:
        """The principal whose key the headers carry.

        Raises Unauthorized, RateLimited when `address` has failed too often, or StoreUnavailable.
        Missing, malformed, unknown, wrong, expired and revoked keys get one and the same answer.
        """
        plain = _credential(headers)
        if plain is None:
            self.refuse(address)
        presented = hash_key(plain)
        if self._admin_hash is not None and same_hash(presented, self._admin_hash):
            return self._admin
        prefix = lookup_prefix(plain)  # the checksum: a typo ends here
        if prefix is None:
            self.refuse(address)
        known = self._remembered(prefix)
        if known is None:
            known = await self._look_up(prefix, address)
        record = known.record
        # The comparison is made for an unknown key too, so that the time tells nothing.
        same = same_hash(presented, self._nobody if record is None else record.hash)
        if not same or record is None or known.principal is None or not self._in_force(record):
            self.refuse(address)
        return known.principal

    def forget(self) -> None:
        """Drop every remembered key, so that a change in the store counts at once."""
        self._known.clear()
        self._unknown.clear()

    def _in_force(self, record: KeyRecord) -> bool:
        return record.revoked_at is None and (record.expires_at is None or self._clock.now() < record.expires_at)

    def _remembered(self, prefix: str) -> _Known | None:
        for memory in (self._known, self._unknown):
            known = memory.get(prefix)
            if known is not None and self._clock.monotonic() < known.trusted_until:
                memory.move_to_end(prefix)
                return known
        return None

    async def _look_up(self, prefix: str, address: str) -> _Known:
        """Ask the store, once for all who ask for the same prefix at the same time."""
        lookup = self._lookups.get(prefix)
        if lookup is None:
            # A prefix that was seen before goes on: those behind one address must not lock each other out.
            if prefix not in self._known and (seconds := self._failures_left(address).seconds_until(1)):
                raise RateLimited(_TOO_MANY_FAILURES, retry_after_seconds=seconds)
            if len(self._lookups) >= _LOOKUPS_MAX:
                raise StoreUnavailable(retry_after_seconds=1)
            lookup = asyncio.create_task(self._fetch(prefix), name=f"key {prefix}")
            self._lookups[prefix] = lookup
            lookup.add_done_callback(lambda done: self._looked_up(prefix, done))
        return await asyncio.shield(lookup)  # one caller who leaves must not take the answer from the others

    async def _fetch(self, prefix: str) -> _Known:
        asked_at = self._clock.monotonic()
        record = await self._store.find(prefix)
        owner = None if record is None else _principal(record)
        known = _Known(record, owner, asked_at + self._settings.key_cache_seconds)
        forget, remember, most = (
            (self._known, self._unknown, self._unknown_max)
            if record is None
            else (self._unknown, self._known, self._known_max)
        )
        forget.pop(prefix, None)
        remember[prefix] = known
        remember.move_to_end(prefix)
        if len(remember) > most:
            remember.popitem(last=False)
        return known

    def _looked_up(self, prefix: str, lookup: asyncio.Task[_Known]) -> None:
        del self._lookups[prefix]
        if not lookup.cancelled():
            lookup.exception()  # read, for the case that every caller has left

    def refuse(self, address: str) -> NoReturn:
        """Count a failure of `address`. Raises Unauthorized, or RateLimited when it has failed too often."""
        bucket = self._failures_left(address)
        seconds = bucket.seconds_until(1)
        if seconds:
            raise RateLimited(_TOO_MANY_FAILURES, retry_after_seconds=seconds)
        self._failures[address] = bucket.less(1)
        raise Unauthorized

    def _failures_left(self, address: str) -> Bucket:
        """How often the address may still fail; the addresses heard of longest ago are forgotten first."""
        now = self._clock.monotonic()
        bucket = self._failures.pop(address, None) or Bucket.full(self._settings.failures_per_minute_max, now)
        self._failures[address] = bucket = bucket.at(self._settings.failures_per_minute_max, now)
        if len(self._failures) > _ADDRESSES_MAX:
            self._failures.popitem(last=False)
        return bucket


def _admin_hash(admin_key: SecretStr | None) -> bytes | None:
    if admin_key is None:
        return None
    plain = admin_key.get_secret_value()
    if len(plain) > _CREDENTIAL_CHARS_MAX or not plain.isascii() or not plain.isprintable() or plain != plain.strip():
        raise SetupError(
            f"The admin key cannot travel in a header. Use at most {_CREDENTIAL_CHARS_MAX} ASCII letters and digits."
        )
    return hash_key(plain)


def bearer(headers: Mapping[str, str]) -> str | None:
    """What `Authorization: Bearer` carries, of any length."""
    value = headers.get("authorization", "")
    return value[7:].strip() if value[:7].lower() == "bearer " else None


def _credential(headers: Mapping[str, str]) -> str | None:
    """The key of `Authorization: Bearer` or, without one, of `x-api-key`."""
    plain = bearer(headers)
    if plain is None:
        plain = headers.get("x-api-key", "").strip()
    return plain if 0 < len(plain) <= _CREDENTIAL_CHARS_MAX else None


def upstream_key(request: Request) -> str | None:
    """The caller's own key for a provider, if there is one. Raises InvalidRequest for what can be none."""
    value = request.headers.get("x-upstream-authorization")
    if value is None:
        return None
    key = (value[7:] if value[:7].lower() == "bearer " else value).strip()
    if not 0 < len(key) <= _CREDENTIAL_CHARS_MAX or not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidRequest(
            "The header X-Upstream-Authorization has to hold a key of the provider: `Bearer <key>`.",
            code="upstream_key_required",
        )
    if key == _credential(request.headers):
        raise InvalidRequest(
            "X-Upstream-Authorization holds the API key of this server, which no provider is to see. Send the provider's.",
            code="upstream_key_required",
        )
    return key


def _principal(record: KeyRecord) -> Principal:
    return Principal(
        key_id=record.id,
        project_id=record.project_id,
        role=record.role,
        scopes=record.scopes,
        requests_per_minute=record.requests_per_minute,
        tokens_per_minute=record.tokens_per_minute,
    )


async def principal(request: Request) -> Principal:
    """Dependency of every route that needs a key: any role will do."""
    authenticator: Authenticator = request.app.state.authenticator
    return await authenticator.authenticate(request.headers, address_of(request))


def address_of(request: Request) -> str:
    """Where a request comes from, as failures are counted."""
    client = request.scope.get("client")
    return client[0] if client else ""


def role_at_least(role: Role) -> Callable[[Request], Awaitable[Principal]]:
    """Dependency of routes for one role and those above it."""

    async def require(request: Request) -> Principal:
        found = await principal(request)
        found.require_role(role)
        return found

    return require


def may_create(capability: Capability) -> Callable[[Request], Awaitable[Principal]]:
    """Dependency of routes that run a model: a member or administrator whose scopes have the capability."""

    async def require(request: Request) -> Principal:
        found = await principal(request)
        found.require_scope(capability)
        return found

    return require
