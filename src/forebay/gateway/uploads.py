"""The routes of uploads: a large file in parts, in any order and at once, put together at the end.

It refuses to join parts that are not what was announced: the byte count, and the MD5 where one is given.
"""

import hashlib
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from forebay import commit_points
from forebay.blobs.blobs import Blobs, Writer
from forebay.config import Settings
from forebay.dialects.openai import files as wire
from forebay.dialects.openai.call import parse
from forebay.errors import InvalidRequest, NotFound, PayloadTooLarge
from forebay.gateway.answers import json_answer, read_body
from forebay.gateway.auth import Principal, principal
from forebay.gateway.files import Caller, Member, Receiving, drafted, file_object, limits_of
from forebay.gateway.idempotency import create, idempotency_key, replayed
from forebay.gateway.multipart import FilePart, Form, read_form
from forebay.gateway.protocol import allow_steady_body
from forebay.store.database import Transaction
from forebay.store.files import File, FileStore
from forebay.store.uploads import Part, Upload, UploadStore

router = APIRouter(prefix="/v1", dependencies=[Depends(principal)])

_TAKES_PART = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {
    "type": "object", "required": ["data"], "properties": {"data": {"type": "string", "format": "binary"}},
}}}}}  # fmt: skip


def _takes(body: type[wire.UploadBody | wire.CompleteBody]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": body.model_json_schema()}}}}


@router.post("/uploads", openapi_extra=_takes(wire.UploadBody))
async def create_upload(request: Request, caller: Member) -> Response:
    """Announce a file that will come in parts."""
    settings: Settings = request.app.state.settings
    store: UploadStore = request.app.state.uploads
    raw = await read_body(request, settings.http.body_bytes_max)
    body = parse(wire.UploadBody, raw)
    limits = limits_of(settings, settings.files.upload_bytes_max)
    filename = wire.label_of(body.filename)
    wire.check_name(filename, body.purpose)
    wire.check_size(body.bytes, body.purpose, limits)

    async def perform(transaction: Transaction) -> dict[str, Any]:
        upload = await store.create(
            transaction,
            caller.project_id,
            filename=filename,
            purpose=body.purpose,
            mime_type=body.mime_type,
            size=body.bytes,
            file_expires_after_seconds=wire.keep_seconds(body.purpose, body.expires_after, limits),
        )
        return upload_object(upload)

    return await create(request, caller, raw, perform)


@router.get("/uploads/{upload_id}")
async def show_upload(request: Request, caller: Caller, upload_id: str) -> Response:
    """One upload, with its file once it is completed."""
    store: UploadStore = request.app.state.uploads
    upload = await store.get(caller.project_id, upload_id)
    return json_answer(upload_object(upload, await _file_of(request, upload)))


@router.post("/uploads/{upload_id}/parts", openapi_extra=_TAKES_PART)
async def create_part(request: Request, caller: Member, upload_id: str) -> Response:
    """Store one part; a part that was cut off left nothing and is sent again."""
    receiving: Receiving = request.app.state.receiving
    idempotency_key(request)
    with receiving.entered(caller.project_id):
        return await _receive_part(request, caller, upload_id)


async def _receive_part(request: Request, caller: Principal, upload_id: str) -> Response:
    settings: Settings = request.app.state.settings
    store: UploadStore = request.app.state.uploads
    blobs: Blobs = request.app.state.blobs
    allow_steady_body(request.scope, settings.files.receive_bytes_per_second_min)
    begun = await store.begin_part(caller.project_id, upload_id)
    async with drafted(lambda: store.discard_part(blobs, begun)) as draft:
        async with blobs.write(begun.blob_key) as writer:
            intake = _PartIntake(writer, settings.files.part_bytes_max)
            await read_form(request, {"data": 1}, (), intake.take)
            if not intake.size:
                raise InvalidRequest("The part is empty.", param="data", code="invalid_value")

        async def perform(transaction: Transaction) -> dict[str, Any]:
            return part_object(await store.finish_part(transaction, caller.project_id, begun, intake.size))

        response = await create(request, caller, intake.digest.digest(), perform)
        draft.kept = not replayed(response)
    return response


@router.post("/uploads/{upload_id}/complete", openapi_extra=_takes(wire.CompleteBody))
async def complete_upload(request: Request, caller: Member, upload_id: str) -> Response:
    """Join the parts in the order that is named; completing it again gives the same answer."""
    settings: Settings = request.app.state.settings
    uploads: UploadStore = request.app.state.uploads
    blobs: Blobs = request.app.state.blobs
    raw = await read_body(request, settings.http.body_bytes_max)
    body = parse(wire.CompleteBody, raw)
    upload = await uploads.get(caller.project_id, upload_id)
    if upload.status != "completed":
        try:
            return await _complete(request, caller, upload, body, raw)
        except (InvalidRequest, NotFound):
            # Whoever sends it twice, because the first answer did not come in time, may overtake himself.
            upload = await uploads.get(caller.project_id, upload_id)
            if upload.status != "completed":
                raise
    await uploads.remove_parts(blobs, upload)
    shown = upload_object(upload, await _file_of(request, upload))

    async def perform(_transaction: Transaction) -> dict[str, Any]:
        return shown

    return await create(request, caller, raw, perform)


@router.post("/uploads/{upload_id}/cancel")
async def cancel_upload(request: Request, caller: Member, upload_id: str) -> Response:
    """Give an upload up; its parts are removed."""
    store: UploadStore = request.app.state.uploads
    async with store.database.begin() as transaction:
        upload = await store.cancel(transaction, caller.project_id, upload_id)
    await store.remove_parts(request.app.state.blobs, upload)
    return json_answer(upload_object(upload))


class _PartIntake:
    """Bounds and stores one part while it arrives."""

    def __init__(self, writer: Writer, bytes_max: int) -> None:
        self.size = 0
        self.digest = hashlib.sha256()
        self._writer = writer
        self._bytes_max = bytes_max

    async def take(self, _form: Form, _part: FilePart, data: bytes) -> None:
        """Store a piece."""
        self.size += len(data)
        if self.size > self._bytes_max:
            raise PayloadTooLarge(f"A part has at most {self._bytes_max} bytes.", param="data")
        self.digest.update(data)
        await self._writer.write(data)


async def _complete(
    request: Request, caller: Principal, upload: Upload, body: wire.CompleteBody, raw: bytes
) -> Response:
    """Make the file and bind the upload to it."""
    uploads: UploadStore = request.app.state.uploads
    files: FileStore = request.app.state.files
    blobs: Blobs = request.app.state.blobs
    parts = await uploads.parts(upload, body.part_ids)
    size = sum(part.bytes for part in parts)
    if size != upload.bytes:
        raise InvalidRequest(
            f"The parts have {size} bytes in all, and the upload was announced with {upload.bytes}.",
            param="part_ids",
            code="upload_size_mismatch",
        )
    begun = await files.begin(upload.project_id, upload.filename, upload.purpose)
    async with drafted(lambda: files.discard(blobs, begun)) as draft:
        sha256 = await _join(blobs, begun, parts, body.md5)
        commit_points.reach("upload.joined")

        async def perform(transaction: Transaction) -> dict[str, Any]:
            await uploads.release_parts(transaction, upload)
            file = await files.finish(transaction, begun, size, sha256, upload.file_expires_after_seconds)
            return upload_object(await uploads.complete(transaction, upload, file), file)

        response = await create(request, caller, raw, perform)
        draft.kept = not replayed(response)
        commit_points.reach("file.row_committed")
    await uploads.remove_parts(blobs, upload)
    return response


async def _join(blobs: Blobs, file: File, parts: Sequence[Part], md5: str | None) -> str:
    """Write the parts as one blob; its SHA-256. Raises InvalidRequest if the MD5 is another."""
    sha256, checksum = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    async with blobs.write(file.blob_key) as writer:
        for part in parts:
            async with aclosing(blobs.stream(part.blob_key)) as pieces:
                async for piece in pieces:
                    sha256.update(piece)
                    checksum.update(piece)
                    await writer.write(piece)
        if md5 is not None and md5.lower() != checksum.hexdigest():
            raise InvalidRequest(
                "The MD5 of the joined parts is not the one that you gave. Send the parts again, or name them in order.",
                param="md5",
                code="checksum_mismatch",
            )
    return sha256.hexdigest()


async def _file_of(request: Request, upload: Upload) -> File | None:
    if upload.file_id is None:
        return None
    files: FileStore = request.app.state.files
    try:
        return await files.get(upload.project_id, upload.file_id)
    except NotFound:
        return None  # it was deleted, or has expired


def upload_object(upload: Upload, file: File | None = None) -> dict[str, Any]:
    """An upload as its project sees it."""
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": int(upload.created_at),
        "expires_at": int(upload.expires_at),
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "file": file_object(file) if file is not None else None,
    }


def part_object(part: Part) -> dict[str, Any]:
    """A part as its project sees it."""
    return {
        "id": part.id,
        "object": "upload.part",
        "created_at": int(part.created_at),
        "upload_id": part.upload_id,
    }
