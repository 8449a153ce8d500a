"""A push platform as far as its signed tokens go: a key pair of its own, and a real server that shows the public halves."""

import functools
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from jwt.algorithms import RSAAlgorithm

ISSUER = "https://accounts.google.com"
AUDIENCE = "https://forebay.example.com/v1/intake/pubsub"
EMAIL = "push@project.iam.gserviceaccount.com"


@functools.cache
def key(name: str, bits: int = 2048) -> RSAPrivateKey:
    """A private key, made once for the run."""
    return generate_private_key(65_537, bits)


def public(name: str, **changes: Any) -> dict[str, Any]:
    """The public half as a set of keys has it."""
    found = RSAAlgorithm.to_jwk(key(name).public_key(), as_dict=True)
    return {**found, "kid": name, "alg": "RS256", "use": "sig", **changes}


def claims(**changes: Any) -> dict[str, Any]:
    """What a good token says; a change to None leaves it out."""
    now = int(time.time())
    found = {
        "iss": ISSUER, "aud": AUDIENCE, "sub": "113774264463038321964", "azp": "113774264463038321964",
        "email": EMAIL, "email_verified": True, "iat": now, "exp": now + 3600, **changes,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def token(name: str = "one", *, kid: str | None = None, **changes: Any) -> str:
    """A token that the platform signs with its key `name`."""
    return jwt.encode(claims(**changes), key(name), "RS256", headers={"kid": name if kid is None else kid})


@dataclass(slots=True)
class Keys:
    """What the server shows; a test sets these while it runs."""

    shown: list[dict[str, Any]] = field(default_factory=lambda: [public("one")])
    status: int = 200
    body: bytes | None = None
    asked: int = 0
    url: str = ""

    async def handle(self, _request: web.Request) -> web.Response:
        self.asked += 1
        content = json.dumps({"keys": self.shown}).encode() if self.body is None else self.body
        return web.Response(status=self.status, body=content, content_type="application/json")


@asynccontextmanager
async def serving_keys(host: str = "127.0.0.1") -> AsyncIterator[Keys]:
    """The server on a free port."""
    keys = Keys()
    app = web.Application()
    app.router.add_get("/certs", keys.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, host, 0).start()
    keys.url = f"http://{host}:{runner.addresses[0][1]}/certs"
    try:
        yield keys
    finally:
        await runner.cleanup()
