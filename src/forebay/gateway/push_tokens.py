"""Signed tokens of a push platform: whether one was made for this server and by its account, and whom it then acts for.

It refuses every algorithm but RS256 and every key but those at the configured address, to ask there more than once a
minute for a key that is not among them, and projects that the settings do not name.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import jwt
from pydantic_core import from_json

from forebay.clock import Clock
from forebay.config import IntakeSettings
from forebay.errors import InvalidRequest, PermissionDenied, Unauthorized, Unreachable
from forebay.gateway.auth import Principal
from forebay.inference import Capability
from forebay.outbound import Outbound
from forebay.store.key_format import Role
from forebay.store.keys import KeyStore
from forebay.telemetry import Log

_KEY_ID = "intake_token"
_ALGORITHM = "RS256"
_TOKEN_CHARS_MAX = 8192
_KID_CHARS_MAX = 256
_KEYS_BYTES_MAX = 262_144
_KEYS_MAX = 64
_FETCH_SECONDS = 5.0
_FRESH_SECONDS = 3600.0  # then they are asked for again
_STALE_SECONDS = 86_400.0  # as long as they count where nobody answers
_AGAIN_SECONDS = 60.0  # before an unknown key is asked for again
_FAILED_SECONDS = 5.0  # the same after an answer that was none
_LEEWAY_SECONDS = 30.0  # between the platform's clock and ours

# What the library makes of hostile tokens; beyond its own errors, of nesting and of numbers.
_BROKEN = (jwt.PyJWTError, RecursionError, ValueError, TypeError, OverflowError)


def looks_like_token(credential: str) -> bool:
    """Whether it is a signed token and no API key of ours."""
    return credential.count(".") == 2 and credential.startswith("eyJ")


class PushTokens:
    """Checks tokens. It owns the platform's public keys, and is used on one event loop."""

    def __init__(self, settings: IntakeSettings, store: KeyStore, outbound: Outbound, clock: Clock) -> None:
        self._settings = settings
        self._store = store
        self._projects: dict[str, str] = {}  # ids by name
        self._outbound = outbound
        self._clock = clock
        self._log = Log()
        self._keys: Mapping[str, jwt.PyJWK] = {}
        self._fetched_at = self._next_at = float("-inf")
        self._fetching: asyncio.Task[None] | None = None

    @property
    def accepted(self) -> bool:
        """Whether any token is."""
        return self._settings.token_audience is not None

    async def principal(self, token: str) -> Principal:
        """Whom a good token acts for: a member of the project of the settings. Raises what `check` does."""
        await self.check(token)
        project_id = await self._id_of(self._settings.token_project)
        return Principal(_KEY_ID, project_id, Role.MEMBER, frozenset({Capability.IMAGE_EDIT}))

    async def check_project(self, caller: Principal) -> None:
        """Raise PermissionDenied unless the store is open to the caller's project: a message may name any object of it."""
        if caller.role is Role.ADMIN:
            return
        names = (self._settings.token_project, *self._settings.projects)
        if caller.project_id not in [await self._id_of(name) for name in names]:
            raise PermissionDenied(
                "The project of this API key may push no messages. The operator of the server adds it to `intake.projects`."
            )

    async def _id_of(self, project: str) -> str:
        if project not in self._projects:
            self._projects[project] = (await self._store.get_or_create_project(project)).id
        return self._projects[project]

    async def check(self, token: str) -> None:
        """Raise Unauthorized unless the platform made it for us, Unreachable where its keys cannot be had."""
        try:
            key = await self._key(_key_id(token))
            if key is None:
                raise _Refused("unknown key")
            self._check_claims(jwt.decode(token, key, algorithms=[_ALGORITHM], **self._expected()))
        except _BROKEN as error:
            reason = str(error) if isinstance(error, _Refused) else type(error).__name__
            self._log.warning("intake.token_refused", reason=reason)
            raise Unauthorized from None

    def _expected(self) -> dict[str, Any]:
        return {
            "audience": self._settings.token_audience,
            "issuer": self._settings.token_issuer,
            "leeway": _LEEWAY_SECONDS,
            "options": {
                "require": ["exp", "iat", "iss", "aud"],
                "strict_aud": True,
                "enforce_minimum_key_length": True,
            },
        }

    def _check_claims(self, claims: Mapping[str, Any]) -> None:
        if claims.get("email") != self._settings.token_email or claims.get("email_verified") is not True:
            raise _Refused("another account")

    async def _key(self, key_id: str) -> jwt.PyJWK | None:
        """The public key of that id. Raises Unreachable where nobody knows."""
        now = self._clock.monotonic()
        if key_id in self._keys and now - self._fetched_at < _FRESH_SECONDS:
            return self._keys[key_id]
        if self._fetching is None and now >= self._next_at:
            self._fetching = asyncio.create_task(self._fetch())
        if self._fetching is not None:
            await asyncio.shield(self._fetching)  # one who leaves must not take it from the others
        if self._clock.monotonic() - self._fetched_at > _STALE_SECONDS:
            raise Unreachable(
                "The keys of the platform's tokens cannot be fetched right now. Try again later.",
                retry_after_seconds=_FAILED_SECONDS,
            )
        return self._keys.get(key_id)

    async def _fetch(self) -> None:
        wait = _FAILED_SECONDS
        try:
            found = await self._ask()
            self._keys, self._fetched_at, wait = found, self._clock.monotonic(), _AGAIN_SECONDS
        except (Unreachable, InvalidRequest) as error:
            self._log.warning("intake.keys_away", reason=str(error))
        finally:
            self._next_at = self._clock.monotonic() + wait
            self._fetching = None

    async def _ask(self) -> Mapping[str, jwt.PyJWK]:
        """Raises Unreachable for whatever is no set of keys."""
        address = self._settings.token_keys_url
        answer = await self._outbound.get(
            address, hosts=("*",), timeout_seconds=_FETCH_SECONDS, bytes_max=_KEYS_BYTES_MAX
        )
        found = _keys_of(answer.body) if answer.status == 200 and answer.whole else {}
        if not found:
            raise Unreachable(f"The address of the keys answers with status {answer.status} and no key.")
        return found


class _Refused(jwt.PyJWTError):
    """What the library does not check."""


def _key_id(token: str) -> str:
    if len(token) > _TOKEN_CHARS_MAX:
        raise _Refused("too long")
    header = jwt.get_unverified_header(token)
    key_id = header.get("kid")
    if header.get("alg") != _ALGORITHM or not isinstance(key_id, str) or len(key_id) > _KID_CHARS_MAX:
        raise _Refused("another algorithm, or no key id")
    return key_id


def _keys_of(body: bytes) -> Mapping[str, jwt.PyJWK]:
    """The keys that may sign, by id; others are passed over."""
    try:
        listed = from_json(body)["keys"][:_KEYS_MAX]
    except (ValueError, KeyError, TypeError):
        return {}
    found: dict[str, jwt.PyJWK] = {}
    for each in listed:
        if not isinstance(each, dict) or not isinstance(each.get("kid"), str) or each.get("kty") != "RSA":
            continue
        if each.get("alg", _ALGORITHM) != _ALGORITHM or each.get("use", "sig") != "sig":
            continue
        try:
            found[each["kid"]] = jwt.PyJWK(each, _ALGORITHM)
        except _BROKEN:
            continue
    return found
