"""What a push platform sends, and the store whose objects it speaks of."""

import json
from base64 import b64encode
from collections.abc import Mapping
from typing import Any

from PIL import Image

from forebay.blobs.blobs import Blobs, open_objects
from forebay.config import IntakeSettings, Settings
from forebay.errors import NotFound
from tests.support import s3
from tests.support.images import encoded
from tests.support.picture_jobs import SIZE
from tests.support.server import Server

PATH = "/v1/intake/pubsub"
SUBSCRIPTION = "projects/p/subscriptions/pictures"


def hole() -> bytes:
    """A mask of its own with a white hole in the middle."""
    image = Image.new("L", SIZE, 0)
    image.paste(255, (16, 16, 40, 40))
    return encoded(image)


def ordered(image: str, **fields: Any) -> dict[str, Any]:
    """An order for an edit of `image`, with the mask beside it."""
    folder = image.rpartition("/")[0]
    mask = f"{folder}/mask.png" if folder else "mask.png"
    return {"image": image, "mask": mask, "mask_mode": "white", "prompt": "a cat", "seed": 7, **fields}


def envelope(order: Any, message_id: str, **fields: Any) -> dict[str, Any]:
    """The body of a push. `order` is what is in it, or the base64 itself."""
    data = order if isinstance(order, str) else b64encode(json.dumps(order).encode()).decode()
    message = {"data": data, "messageId": message_id, "message_id": message_id, "attributes": {}, "publishTime": "x"}
    return {"message": message, "subscription": SUBSCRIPTION, **fields}


async def push(
    server: Server, body: Any, *, key: str | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    """Deliver a message; status and JSON."""
    named = {"Authorization": f"Bearer {key or server.key}", **(headers or {})}
    named = {name: value for name, value in named.items() if value}
    async with server.session.post(server.url + PATH, headers=named, json=body) as response:
        return response.status, await response.json()


async def pushed(server: Server, order: Any, message_id: str, **fields: Any) -> str:
    """Deliver a message that is good; the id of its job."""
    status, receipt = await push(server, envelope(order, message_id, **fields))
    assert status == 200, receipt
    return str(receipt["job_id"])


class Bucket:
    """The store that others fill, as those see it: a folder or a bucket."""

    def __init__(self, settings: IntakeSettings) -> None:
        self.settings = settings
        store = open_objects(Settings(intake=settings))
        assert store is not None
        self._store: Blobs = store

    @property
    def environment(self) -> dict[str, str]:
        """What a server needs to find it."""
        secret = self.settings.secret_access_key
        given = self.settings.model_dump(include={"url", "endpoint", "region", "access_key_id"}, exclude_none=True)
        given["secret_access_key"] = "" if secret is None else secret.get_secret_value()
        given["allow_http"] = str(self.settings.allow_http).lower()
        return {f"FOREBAY_INTAKE_{name.upper()}": str(value) for name, value in given.items()}

    async def put(self, name: str, data: bytes) -> None:
        await self._store.put(name, data)

    async def get(self, name: str) -> bytes | None:
        """The bytes of an object; none if there is no such one."""
        try:
            return await self._store.read(name)
        except NotFound:
            return None

    async def remove(self, name: str) -> None:
        await self._store.delete(name)


async def s3_bucket() -> Bucket:
    """A new bucket of the S3 endpoint."""
    found = await s3.settings_for(await s3.new_bucket())
    return Bucket(IntakeSettings(**found.model_dump()))
