"""Signed tokens of a push platform against a real server of its keys: what is let in, and what is asked for how often."""

import asyncio
import hmac
import json
import time
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Callable
from typing import Any

import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from forebay.clock import SystemClock
from forebay.config import IntakeSettings, OutboundSettings, Settings
from forebay.errors import Unauthorized, Unreachable
from forebay.gateway.push_tokens import PushTokens, looks_like_token
from forebay.inference import Capability
from forebay.outbound import Outbound
from forebay.store.database import Database
from forebay.store.key_format import Role
from forebay.store.keys import KeyStore
from tests.support import jwks
from tests.support.clock import FakeClock
from tests.support.jwks import Keys, claims, public, token

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def keys() -> AsyncIterator[Keys]:
    async with jwks.serving_keys() as served:
        yield served


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def store(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[KeyStore]:
    database = await Database.open(Settings(data_dir=tmp_path_factory.mktemp("data")))
    yield KeyStore(database, SystemClock())
    await database.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def tokens(keys: Keys, store: KeyStore, clock: FakeClock) -> PushTokens:
    return checker(keys.url, store, clock)


def checker(url: str, store: KeyStore, clock: FakeClock, *, open_to: tuple[str, ...] = ("127.0.0.0/8",)) -> PushTokens:
    settings = IntakeSettings(
        token_audience=jwks.AUDIENCE, token_email=jwks.EMAIL, token_keys_url=url, token_project="pushed"
    )
    return PushTokens(settings, store, Outbound(OutboundSettings(allowed_networks=open_to), clock), clock)


def written(head: Any, body: Any, signature: bytes = b"") -> str:
    """A token as somebody writes it by hand."""
    parts = (json.dumps(head).encode(), json.dumps(body).encode(), signature)
    return ".".join(urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def pem(name: str) -> bytes:
    return jwks.key(name).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def with_the_public_key_as_a_secret() -> str:
    """What once let people in: HS256 with the public key, which everybody has."""
    head, body, _ = written({"alg": "HS256", "typ": "JWT", "kid": "one"}, claims()).split(".")
    signature = hmac.digest(pem("one"), f"{head}.{body}".encode(), "sha256")
    return f"{head}.{body}." + urlsafe_b64encode(signature).rstrip(b"=").decode()


async def test_a_good_token_is_let_in_and_its_key_is_asked_for_once(tokens: PushTokens, keys: Keys) -> None:
    assert tokens.accepted
    await asyncio.gather(*(tokens.check(token()) for _ in range(20)))
    assert keys.asked == 1


async def test_a_good_token_acts_for_the_project_of_the_settings(tokens: PushTokens, store: KeyStore) -> None:
    caller = await tokens.principal(token())
    assert caller.project_id == (await store.get_or_create_project("pushed")).id
    assert (caller.role, caller.scopes) == (Role.MEMBER, frozenset({Capability.IMAGE_EDIT}))


async def test_tokens_are_taken_only_where_the_settings_say_whose(store: KeyStore) -> None:
    clock = FakeClock()
    assert not PushTokens(IntakeSettings(), store, Outbound(OutboundSettings(), clock), clock).accepted


FORGED: dict[str, Callable[[], str]] = {
    "another key under the same name": lambda: token("two", kid="one"),
    "a key that is not shown": lambda: token("two"),
    "expired": lambda: token(exp=int(time.time()) - 60),
    "no end": lambda: token(exp=None),
    "not yet made": lambda: token(iat=int(time.time()) + 600),
    "not yet good": lambda: token(nbf=int(time.time()) + 600),
    "another audience": lambda: token(aud="https://elsewhere.example.com"),
    "several audiences": lambda: token(aud=[jwks.AUDIENCE, "https://elsewhere.example.com"]),
    "no audience": lambda: token(aud=None),
    "another issuer": lambda: token(iss="https://accounts.example.com"),
    "no issuer": lambda: token(iss=None),
    "another account": lambda: token(email="somebody@project.iam.gserviceaccount.com"),
    "no account": lambda: token(email=None),
    "an account that nobody has verified": lambda: token(email_verified=False),
    "an account that is said to be verified": lambda: token(email_verified="true"),
    "no algorithm": lambda: written({"alg": "none", "typ": "JWT", "kid": "one"}, claims()),
    "NONE": lambda: written({"alg": "NoNe", "typ": "JWT", "kid": "one"}, claims(), b"x"),
    "the public key as a secret": with_the_public_key_as_a_secret,
    "a longer hash": lambda: jwt.encode(claims(), jwks.key("one"), "RS512", headers={"kid": "one"}),
    "no key id": lambda: jwt.encode(claims(), jwks.key("one"), "RS256"),
    "a key id that is none": lambda: written({"alg": "RS256", "kid": ["one"]}, claims(), b"x"),
    "a long key id": lambda: token(kid="x" * 300),
    "no signature": lambda: token().rpartition(".")[0] + ".",
    "another body": lambda: ".".join(
        [token().split(".")[0], written({}, claims(sub="me")).split(".")[1], token().split(".")[2]]
    ),
    "a header that is nested without end": lambda: urlsafe_b64encode(b"[" * 4500).decode() + ".e30.e30",
    "a body that is nested without end": lambda: jws(b"[" * 4500),
    "a body of numbers beyond reason": lambda: jws(b'{"exp": 1e999, "iat": 1, "iss": "x", "aud": "x"}'),
    "far too long": lambda: token(padding="x" * 8000),
    "no token at all": lambda: "eyJ..",
}  # fmt: skip


def jws(body: bytes) -> str:
    """What the platform's own key signs, and is no set of claims."""
    return jwt.PyJWS().encode(body, jwks.key("one"), "RS256", headers={"kid": "one"})


@pytest.mark.parametrize("why", FORGED)
async def test_a_token_is_refused_for(tokens: PushTokens, why: str) -> None:
    with pytest.raises(Unauthorized) as raised:
        await tokens.check(FORGED[why]())
    assert str(raised.value) == Unauthorized.__doc__, "nobody is told why"


async def test_a_storm_of_unknown_keys_asks_once_a_minute(tokens: PushTokens, keys: Keys, clock: FakeClock) -> None:
    await tokens.check(token())
    for minute in range(1, 4):
        clock.advance(61)
        for _ in range(50):
            with pytest.raises(Unauthorized):
                await tokens.check(token("two", kid=f"made-up-{minute}-{_}"))
        assert keys.asked == 1 + minute
    await tokens.check(token())


async def test_a_new_key_counts_within_a_minute_and_an_old_one_no_longer(
    tokens: PushTokens, keys: Keys, clock: FakeClock
) -> None:
    await tokens.check(token())
    keys.shown = [public("two")]
    with pytest.raises(Unauthorized):
        await tokens.check(token("two"))
    clock.advance(61)
    await tokens.check(token("two"))
    with pytest.raises(Unauthorized):
        await tokens.check(token("one"))


async def test_keys_are_asked_for_again_each_hour_and_last_a_day_where_nobody_answers(
    tokens: PushTokens, keys: Keys, clock: FakeClock
) -> None:
    await tokens.check(token())
    clock.advance(3601)
    await tokens.check(token())
    assert keys.asked == 2
    keys.status = 500
    clock.advance(3601)
    await tokens.check(token())
    assert keys.asked == 3
    clock.advance(86_400)
    with pytest.raises(Unreachable):
        await tokens.check(token())
    keys.status = 200
    with pytest.raises(Unreachable):
        await tokens.check(token())
    clock.advance(6)
    await tokens.check(token())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"keys": 5}',
        b'{"keys": []}',
        b'{"keys": [5, {}, {"kid": "one", "kty": "RSA"}]}',
        b'{"keys": [' + b"[" * 300_000,
    ],
)
async def test_what_is_no_set_of_keys_lets_nobody_in(tokens: PushTokens, keys: Keys, body: bytes) -> None:
    keys.body = body
    with pytest.raises(Unreachable):
        await tokens.check(token())


async def test_keys_for_something_else_do_not_sign(tokens: PushTokens, keys: Keys) -> None:
    keys.shown = [
        public("one", use="enc"),
        public("two", alg="RS512"),
        {"kty": "oct", "kid": "three", "k": "c2VjcmV0"},
        public("four"),
    ]
    await tokens.check(token("four"))
    for name in ("one", "two", "three"):
        with pytest.raises(Unauthorized):
            await tokens.check(token(name))


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")
async def test_a_key_that_is_too_short_does_not_sign(tokens: PushTokens, keys: Keys) -> None:
    short = jwks.key("short", 1024)
    shown = jwt.algorithms.RSAAlgorithm.to_jwk(short.public_key(), as_dict=True)
    keys.shown = [{**shown, "kid": "short"}]
    with pytest.raises(Unauthorized):
        await tokens.check(jwt.encode(claims(), short, "RS256", headers={"kid": "short"}))


async def test_the_address_of_the_keys_is_guarded_as_every_other(keys: Keys, store: KeyStore, clock: FakeClock) -> None:
    with pytest.raises(Unreachable):
        await checker(keys.url, store, clock, open_to=()).check(token())
    assert keys.asked == 0


async def test_an_api_key_does_not_look_like_a_token() -> None:
    assert looks_like_token(token())
    assert not looks_like_token("fb_0123456789abcdef")
    assert not looks_like_token("eyJ.a")
