"""The routes of files: upload, list, look at, download, delete.

It refuses to hold a file in memory, and to answer before its bytes and its row would survive a power cut.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic_core import to_json
from starlette.responses import Response

from forebay import commit_points
from forebay.blobs.blobs import Blobs
from forebay.blobs.shielded import shielded
from forebay.config import Settings
from forebay.dialects.openai import files as wire
from forebay.errors import InsufficientStorage, InvalidRequest, Overloaded, StoreUnavailable
from forebay.gateway.answers import json_answer
from forebay.gateway.auth import Principal, principal, role_at_least
from forebay.gateway.download import Download
from forebay.gateway.idempotency import create, idempotency_key, replayed
from forebay.gateway.multipart import FilePart, Form, read_form
from forebay.gateway.protocol import allow_steady_body
from forebay.store.database import Transaction
from forebay.store.files import File, FileStore
from forebay.store.key_format import Role

router = APIRouter(prefix="/v1", dependencies=[Depends(principal)])

Caller = Annotated[Principal, Depends(principal)]
Member = Annotated[Principal, Depends(role_at_least(Role.MEMBER))]
RECEIVING_MAX = 64
RECEIVING_PER_PROJECT_MAX = 32
_FORM = {"type": "object", "required": ["file", "purpose"], "properties": {
    "file": {"type": "string", "format": "binary"},
    "purpose": {"type": "string", "enum": list(wire.PURPOSES)},
    "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
    "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
}}  # fmt: skip
_TAKES_FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


class Receiving:
    """Counts the files and parts that are on their way in, each of which holds memory, in all and by project."""

    def __init__(self) -> None:
        self._projects: Counter[str] = Counter()

    @contextmanager
    def entered(self, project_id: str) -> Iterator[None]:
        """Count one while the block lasts. Raises Overloaded if there are as many as there may be."""
        if self._projects.total() >= RECEIVING_MAX or self._projects[project_id] >= RECEIVING_PER_PROJECT_MAX:
            raise Overloaded("Too many files are on their way in. Send fewer at once.", code="too_many_uploads")
        self._projects[project_id] += 1
        try:
            yield
        finally:
            self._projects[project_id] -= 1
            if not self._projects[project_id]:
                del self._projects[project_id]


@dataclass(slots=True)
class Draft:
    """Something that is removed again unless somebody says that it is kept."""

    kept: bool = False


@asynccontextmanager
async def drafted(discard: Callable[[], Awaitable[None]]) -> AsyncIterator[Draft]:
    """Run `discard` after the block unless the draft is kept; what it cannot remove now, a sweep removes."""
    draft = Draft()
    try:
        yield draft
    finally:
        if not draft.kept:
            with suppress(StoreUnavailable, InsufficientStorage):
                await shielded(discard())


def limits_of(settings: Settings, file_bytes_max: int) -> wire.Limits:
    """What the settings say of files of at most `file_bytes_max` bytes."""
    return wire.Limits(file_bytes_max, settings.batches.bytes_max, settings.files.batch_keep_seconds)


def file_object(file: File) -> dict[str, Any]:
    """A file as its project sees it."""
    shown: dict[str, Any] = {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }
    if file.expires_at is not None:
        shown["expires_at"] = int(file.expires_at)
    return shown


class _Intake:
    """Checks and stores one file while it arrives."""

    def __init__(self, limits: wire.Limits, write: Callable[[bytes], Awaitable[None]]) -> None:
        self.size = 0
        self._limits = limits
        self._write = write
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of what has arrived."""
        return self._digest.hexdigest()

    async def take(self, form: Form, part: FilePart, data: bytes) -> None:
        """Store a piece, or refuse the file as soon as it is known to be wrong."""
        purpose = wire.purpose_of(form.fields) if "purpose" in form.fields else None
        if part.filename is None:
            raise InvalidRequest("Send `file` as a file, with a name.", param="file", code="invalid_value")
        if purpose is not None:
            wire.check_name(wire.label_of(part.filename), purpose)
        self.size += len(data)
        wire.check_size(self.size, purpose, self._limits)
        self._digest.update(data)
        await self._write(data)


@router.post("/files", openapi_extra=_TAKES_FORM)
async def create_file(request: Request, caller: Member) -> Response:
    """Store a file."""
    receiving: Receiving = request.app.state.receiving
    idempotency_key(request)
    with receiving.entered(caller.project_id):
        return await _receive_file(request, caller)


async def _receive_file(request: Request, caller: Principal) -> Response:
    settings: Settings = request.app.state.settings
    store: FileStore = request.app.state.files
    blobs: Blobs = request.app.state.blobs
    limits = limits_of(settings, settings.files.bytes_max)
    allow_steady_body(request.scope, settings.files.receive_bytes_per_second_min)
    begun = await store.begin(caller.project_id)
    async with drafted(lambda: store.discard(blobs, begun)) as draft:
        async with blobs.write(begun.blob_key) as writer:
            intake = _Intake(limits, writer.write)
            form = await read_form(request, {"file": 1}, wire.FORM_FIELDS, intake.take)
            await intake.take(form, form.files[0], b"")  # an empty file, or a purpose that came last
            purpose, expires_after = wire.purpose_of(form.fields), wire.expiry_of(form.fields)
        commit_points.reach("file.blob_written")
        keep_seconds = wire.keep_seconds(purpose, expires_after, limits)
        named = replace(begun, filename=wire.label_of(form.files[0].filename or ""), purpose=purpose)

        async def finish(transaction: Transaction) -> dict[str, Any]:
            return file_object(await store.finish(transaction, named, intake.size, intake.sha256, keep_seconds))

        fingerprint = to_json([named.filename, purpose, keep_seconds, intake.sha256])
        response = await create(request, caller, fingerprint, finish)
        commit_points.reach("file.row_committed")
        draft.kept = not replayed(response)
    return response


@router.get("/files")
async def list_files(
    request: Request,
    caller: Caller,
    after: Annotated[str | None, Query(max_length=128)] = None,
    limit: Annotated[int, Query(ge=1, le=wire.PAGE_SIZE_MAX)] = wire.PAGE_SIZE_MAX,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> Response:
    """The project's files, newest first."""
    store: FileStore = request.app.state.files
    found, has_more = await store.list(caller.project_id, after=after, limit=limit, order=order, purpose=purpose)
    return await asyncio.to_thread(_page, found, has_more=has_more)


def _page(found: list[File], *, has_more: bool) -> Response:
    """Ten thousand files take their time, so this runs in a thread."""
    return json_answer(
        {
            "object": "list",
            "data": [file_object(file) for file in found],
            "has_more": has_more,  # always there: clients take a missing one for more
            "first_id": found[0].id if found else None,
            "last_id": found[-1].id if found else None,
        }
    )


@router.get("/files/{file_id}")
async def show_file(request: Request, caller: Caller, file_id: str) -> Response:
    """One file."""
    store: FileStore = request.app.state.files
    return json_answer(file_object(await store.get(caller.project_id, file_id)))


@router.get("/files/{file_id}/content")
async def file_content(request: Request, caller: Caller, file_id: str) -> Response:
    """The bytes of a file, or one range of them."""
    store: FileStore = request.app.state.files
    state = request.app.state
    file = await store.get(caller.project_id, file_id)
    stall_seconds = state.settings.http.write_stall_seconds
    return Download(state.blobs, file.blob_key, file.bytes, file.filename, stall_seconds, state.door.clock)


@router.delete("/files/{file_id}")
async def delete_file(request: Request, caller: Member, file_id: str) -> Response:
    """Remove a file for good."""
    store: FileStore = request.app.state.files
    await store.delete(request.app.state.blobs, caller.project_id, file_id)
    return json_answer({"id": file_id, "object": "file", "deleted": True})
