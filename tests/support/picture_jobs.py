"""Pictures in the background over HTTP: handing in, reading results, and what is left of them."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image

from tests.support.images import encoded, picture
from tests.support.server import Server, eventually

EDITS, GENERATIONS = "/v1/images/edits", "/v1/images/generations"
SIZE = (64, 48)
IMAGE = picture(*SIZE, "red")
SEED = 7


def mask(left: int = 16, top: int = 16, right: int = 40, bottom: int = 40) -> bytes:
    """A mask with one hole, as OpenAI has it: what is transparent is painted."""
    image = Image.new("RGBA", SIZE, (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (left, top, right, bottom))
    return encoded(image)


async def post(
    server: Server,
    image: bytes | None = IMAGE,
    *,
    path: str = EDITS,
    hole: bytes | None = None,
    key: str | None = None,
    headers: Mapping[str, str] | None = None,
    **fields: Any,
) -> tuple[int, dict[str, Any], str]:
    """POST an image and a mask in a form, or with no image a JSON body; status, JSON and Location."""
    body = {"model": "painter", "prompt": "a cat", "background": True, "seed": SEED, **fields}
    sent: dict[str, Any] = {"json": body}
    if image is not None:
        form = aiohttp.FormData()
        for name, value in body.items():
            form.add_field(name, str(value).lower() if isinstance(value, bool) else str(value))
        form.add_field("image", image, filename="image.png", content_type="image/png")
        form.add_field("mask", hole or mask(), filename="mask.png", content_type="image/png")
        sent = {"data": form}
    named = {"Authorization": f"Bearer {key or server.key}", **(headers or {})}
    async with server.session.post(server.url + path, headers=named, **sent) as response:
        return response.status, await response.json(), response.headers.get("Location", "")


async def handed_in(server: Server, image: bytes | None = IMAGE, **fields: Any) -> str:
    """Hand a request in; the id of its job."""
    status, job, location = await post(server, image, **fields)
    assert status == 202, job
    assert location == f"/v1/jobs/{job['id']}"
    return str(job["id"])


async def generated(server: Server, **fields: Any) -> str:
    """Hand in a request for a new picture; the id of its job."""
    return await handed_in(server, None, path=GENERATIONS, **{"size": "64x48", **fields})


async def content(server: Server, file_id: str) -> bytes:
    """The bytes of a file."""
    async with server.session.get(f"{server.url}/v1/files/{file_id}/content", headers=server.headers) as response:
        assert response.status == 200, await response.text()
        return await response.read()


def pixels(data: bytes) -> list[bytes]:
    """A picture, pixel by pixel."""
    values = Image.open(io.BytesIO(data)).convert("RGB").tobytes()
    return [values[place : place + 3] for place in range(0, len(values), 3)]


def kept_pictures(folder: Path) -> list[str]:
    """The blobs and private files of image jobs below a server's folder, results left out."""
    places = (folder / "data" / "blobs" / "pictures", folder / "data" / "pictures")
    return [path.name for place in places for path in place.rglob("*") if path.is_file()]


def blobs_of_files(folder: Path) -> set[str]:
    """The ids of files that have bytes."""
    return {path.name for path in (folder / "data" / "blobs" / "files").rglob("*") if path.is_file()}


async def pictures_of(server: Server) -> list[dict[str, Any]]:
    """The files that pictures have become."""
    return list((await server.get("/v1/files?purpose=image_result"))["data"])


async def until_nothing_is_left(server: Server, model: str = "painter", within_seconds: float = 5) -> None:
    """Wait until nothing that came with a request is kept, every blob is a file, and no place of the engine is taken."""

    async def clear() -> bool:
        known = {file["id"] for file in (await server.get("/v1/files"))["data"]}
        return (
            not kept_pictures(server.folder)
            and blobs_of_files(server.folder) <= known
            and await server.load(model) == (0, 0)
        )

    await eventually(clear, within_seconds=within_seconds, what="an empty cellar and an idle engine")
