"""A hub of models with one repository, `owner/painter`: its list of files, in pages, and the files."""

import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from tests.support.files_server import FilesServer, serve

SOURCE = "hf:owner/painter@main"
TREE = "/api/models/owner/painter/tree/main?recursive=true"
FILES = "/owner/painter/resolve/main/"


def entry(path: str, body: bytes) -> dict[str, Any]:
    """What a hub tells of a file; of weights their checksum."""
    told: dict[str, Any] = {"type": "file", "path": path, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
    if path.endswith(".safetensors"):
        told["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}
    return told


@asynccontextmanager
async def hub(files: Mapping[str, bytes], *further: dict[str, Any], pages: int = 1) -> AsyncIterator[FilesServer]:
    """A hub that has `files`; `further` is told in its list beside them."""
    folders = [{"type": "directory", "path": "transformer", "size": 0, "oid": "d"}]
    told = [*folders, *(entry(path, body) for path, body in files.items()), *further]
    async with serve(b"") as server:
        server.files = {FILES + path: body for path, body in files.items()}
        for page in range(pages):
            here = TREE if page == 0 else f"{TREE}&cursor={page}"
            server.files[here] = json.dumps(told[page::pages]).encode()
            if page + 1 < pages:
                server.links[here] = f'<{server.url}{TREE}&cursor={page + 1}>; rel="next"'
        yield server


def fetched(server: FilesServer) -> list[str]:
    """The files that were asked for, in order."""
    return [path.removeprefix(FILES) for path, _ in server.requests if path.startswith(FILES)]
