"""The routes of dead letters: read what was given up, and have it tried again.

It refuses to requeue what was requeued before, unless that is what the caller asks for.
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic_core import from_json, to_json
from starlette.responses import Response

from forebay.config import Settings
from forebay.dialects.openai.batches import BatchBody, parse_line
from forebay.dialects.openai.jobs import RequeueBody, RequeueFilter, parse_or_default, request_line
from forebay.dialects.pubsub import within
from forebay.errors import CallerError, Conflict, InvalidRequest, NotFound
from forebay.gateway.answers import json_answer, read_body
from forebay.gateway.auth import Principal, principal, role_at_least
from forebay.gateway.background import Handed, submit
from forebay.gateway.batches import check_lines, check_live, insert_batch
from forebay.gateway.idempotency import create
from forebay.gateway.intake import order_in
from forebay.gateway.jobs import page_of
from forebay.inference import Capability
from forebay.jobs.desk import Desk
from forebay.jobs.requeue import Bundle, Requeue
from forebay.store.database import Transaction
from forebay.store.dead_letters import MESSAGE, PAGE_SIZE_MAX, Chosen, DeadLetter, DeadLetterStore
from forebay.store.files import FileStore
from forebay.store.job_records import Job
from forebay.store.job_state import JobState
from forebay.store.key_format import Role

AT_ONCE_MAX = 1000  # dead letters that one call takes up
_WINDOW, _WINDOW_SECONDS = "24h", 86_400

router = APIRouter(prefix="/v1/dead-letters", dependencies=[Depends(principal)])

Caller = Annotated[Principal, Depends(principal)]
Member = Annotated[Principal, Depends(role_at_least(Role.MEMBER))]


def letter_object(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter as its project sees it."""
    return {
        "id": letter.id,
        "object": "dead_letter",
        "kind": letter.kind,
        "job_id": letter.job_id or None,
        "endpoint": letter.endpoint,
        "custom_id": letter.custom_id,
        "line": letter.line,
        "error": {"code": letter.error_code, "message": letter.error_message},
        "attempts": letter.attempts,
        "created_at": int(letter.created_at),
        "requeued_at": None if letter.requeued_at is None else int(letter.requeued_at),
        "requeued_as": letter.requeued_as,
    }


@router.get("")
async def list_letters(
    request: Request,
    caller: Caller,
    kind: Annotated[str | None, Query(max_length=32)] = None,
    job: Annotated[str | None, Query(max_length=64)] = None,
    code: Annotated[str | None, Query(max_length=64)] = None,
    waiting: bool = False,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=PAGE_SIZE_MAX)] = 20,
) -> Response:
    """The project's dead letters, newest first, without their input."""
    store: DeadLetterStore = request.app.state.dead_letters
    found = await store.list(caller.project_id, Chosen(kind, job, code, waiting), after=after, limit=limit + 1)
    return json_answer(page_of([letter_object(letter) for letter in found[:limit]], more=len(found) > limit))


@router.get("/{letter_id}")
async def show_letter(request: Request, letter_id: str, caller: Caller) -> Response:
    """One dead letter, with its input where that still exists."""
    store: DeadLetterStore = request.app.state.dead_letters
    letter = await store.get(caller.project_id, letter_id)
    line = await _requeue(request).line_of(letter)
    return json_answer({**letter_object(letter), "input": None if line is None else _shown(line)})


def _shown(line: bytes) -> Any:
    try:
        return from_json(line)
    except ValueError:
        return line.decode(errors="replace")


@router.post("/requeue")
async def requeue_letters(request: Request, caller: Member) -> Response:
    """Take up all that fit and were not taken up yet, as many as one call may; says how many are left or gone."""
    store: DeadLetterStore = request.app.state.dead_letters
    raw = await read_body(request, request.app.state.settings.http.body_bytes_max)
    body = parse_or_default(RequeueFilter, raw)
    waiting = Chosen(body.kind, body.job, body.code, waiting=True)
    chosen = replace(waiting, takeable=True)
    async with AsyncExitStack() as stack:
        taken = _Taken(request, caller)

        async def collect() -> None:
            letters = await store.list(caller.project_id, chosen, limit=AT_ONCE_MAX)
            await taken.collect(stack, letters)

        async def perform(transaction: Transaction) -> dict[str, Any]:
            jobs = await taken.requeue(transaction)
            left, takeable = [await store.count(transaction, caller.project_id, each) for each in (waiting, chosen)]
            return {
                "object": "dead_letter.requeue",
                "requeued": sum(each["requeued"] for each in jobs),
                "left": left,
                "gone": left - takeable,
                "jobs": jobs,
            }

        return await create(request, caller, raw, perform, before=collect)


@router.post("/{letter_id}/requeue")
async def requeue_letter(request: Request, letter_id: str, caller: Member) -> Response:
    """Try one dead letter again, with another body if there is one."""
    store: DeadLetterStore = request.app.state.dead_letters
    raw = await read_body(request, request.app.state.settings.http.body_bytes_max)
    body = parse_or_default(RequeueBody, raw)
    letter = await store.get(caller.project_id, letter_id)
    edited = {} if body.body is None else {letter.id: _edited_line(letter, body.body)}
    strict = letter.kind == MESSAGE  # what is wrong with it is told
    async with AsyncExitStack() as stack:
        taken = _Taken(request, caller, again=body.again)

        async def collect() -> None:
            await taken.collect(stack, [letter], edited, strict=strict)
            if taken.empty:
                raise _gone(letter)

        async def perform(transaction: Transaction) -> dict[str, Any]:
            (job,) = await taken.requeue(transaction)
            now = request.app.state.clock.now()
            return letter_object(replace(letter, requeued_at=now, requeued_as=job["id"]))

        return await create(request, caller, raw, perform, before=collect)


@router.delete("/{letter_id}")
async def delete_letter(request: Request, letter_id: str, caller: Member) -> Response:
    """Forget a dead letter."""
    store: DeadLetterStore = request.app.state.dead_letters
    await store.delete(caller.project_id, letter_id)
    return json_answer({"id": letter_id, "object": "dead_letter", "deleted": True})


def _edited_line(letter: DeadLetter, body: dict[str, Any]) -> bytes:
    """The line with another body, or what is in a message. Raises InvalidRequest where there is neither, or it is none."""
    if letter.kind == MESSAGE:
        return to_json(body)
    if letter.endpoint is None or letter.custom_id is None:
        raise InvalidRequest("Only the line of a batch has a `body` that can be edited.", param="body")
    line = request_line(letter.custom_id, letter.endpoint, body)
    parse_line(line, letter.endpoint)
    return line


def _gone(letter: DeadLetter) -> Conflict:
    if letter.endpoint is None:
        return Conflict(
            "The job of this dead letter is gone, or what came with it is, or it is being tried already.",
            code="input_gone",
        )
    return Conflict("The input of this dead letter is gone. Send a `body` in its place.", code="input_gone")


def _requeue(request: Request) -> Requeue:
    state = request.app.state
    return Requeue(state.files, state.blobs, state.settings.batches.bytes_max)


class _Taken:
    """The dead letters that one request takes up: lines become batches, jobs get their attempts again."""

    def __init__(self, request: Request, caller: Principal, *, again: bool = False) -> None:
        self._request = request
        self._caller = caller
        self._again = again
        self._desk: Desk = request.app.state.desk
        self._bundles: list[Bundle] = []
        self._jobs: dict[str, Job] = {}
        self._letters: dict[str, list[DeadLetter]] = {}  # of each of these jobs
        self._orders: list[tuple[DeadLetter, Handed]] = []  # what pushed messages ask for

    @property
    def empty(self) -> bool:
        """Whether there is nothing that can be taken up."""
        return not (self._bundles or self._jobs or self._orders)

    async def collect(
        self,
        stack: AsyncExitStack,
        letters: Sequence[DeadLetter],
        edited: dict[str, bytes] | None = None,
        *,
        strict: bool = False,
    ) -> None:
        """Write the lines, look for the jobs, and read the messages; what is gone is left out.

        A message that still cannot be used is left out too or, if `strict`, refused as when it came.
        """
        lines = [letter for letter in letters if letter.kind != MESSAGE]
        self._bundles = await stack.enter_async_context(_requeue(self._request).bundles(lines, edited))
        for letter in letters:
            if letter.kind == MESSAGE:
                await self._read_order(letter, (edited or {}).get(letter.id), strict=strict)
            if letter.endpoint is None:
                self._letters.setdefault(letter.job_id, []).append(letter)
        lost = await self._request.app.state.media_jobs.without_media(self._letters)
        for job_id in (each for each in self._letters if each not in lost):
            with suppress(NotFound):
                job = await self._desk.get(self._caller.project_id, job_id)
                if job.finished and job.state is not JobState.COMPLETED:
                    self._jobs[job_id] = job
        await self._desk.check_room(len(self._bundles) + len(self._jobs) + len(self._orders))

    async def _read_order(self, letter: DeadLetter, edited: bytes | None, *, strict: bool) -> None:
        self._caller.require_scope(Capability.IMAGE_EDIT)
        data = edited or await _requeue(self._request).line_of(letter)
        if data is None:
            return
        try:
            self._orders.append((letter, await order_in(self._request, self._caller, data, {})))
        except CallerError as error:
            if strict:
                raise within(error, "body") from None

    async def requeue(self, transaction: Transaction) -> list[dict[str, Any]]:
        """Make the batches, revive the jobs, and mark the dead letters. Raises Conflict if one was taken up before."""
        made = [await self._make_batch(transaction, bundle) for bundle in self._bundles]
        for letter, handed in self._orders:  # before the jobs: who makes something holds the project first, everywhere
            handed.key_id = self._caller.key_id
            await submit(self._desk, self._request.app.state.media_jobs, transaction, handed)
            await self._mark(transaction, [letter], handed.new.id)
            made.append({"id": handed.new.id, "kind": handed.new.kind, "requeued": 1})
        for _, job in sorted(self._jobs.items()):  # whoever takes many jobs takes them in this order
            await self._desk.revive(transaction, job)
            letters = self._letters[job.id]
            await self._mark(transaction, letters, job.id)
            made.append({"id": job.id, "kind": job.kind, "requeued": len(letters)})
        return made

    async def _make_batch(self, transaction: Transaction, bundle: Bundle) -> dict[str, Any]:
        state = self._request.app.state
        settings: Settings = state.settings
        files: FileStore = state.files
        keep = settings.files.batch_keep_seconds
        file = await files.finish(transaction, bundle.file, bundle.size, bundle.sha256, keep)
        await check_live(state.batches, transaction, self._caller, settings.batches.live_per_project_max)
        count = len(bundle.letters)
        await check_lines(state.batches, transaction, self._caller, state.door.meter, count)
        body = BatchBody(
            input_file_id=file.id,
            endpoint=bundle.endpoint,
            completion_window=_WINDOW,
            metadata={"requeued_from": bundle.source},
        )
        batch = await insert_batch(
            state.batches, self._desk, transaction, self._caller, body, _WINDOW_SECONDS, lines=count
        )
        await self._mark(transaction, bundle.letters, batch["id"])
        return {"id": batch["id"], "kind": "batch", "requeued": count}

    async def _mark(self, transaction: Transaction, letters: Sequence[DeadLetter], job_id: str) -> None:
        store: DeadLetterStore = self._request.app.state.dead_letters
        ids = [letter.id for letter in letters]
        if await store.mark_requeued(transaction, ids, job_id, again=self._again) != len(ids):
            raise Conflict(
                "This was requeued before. Look at `requeued_as`, or send `again` to try it once more.",
                code="already_requeued",
            )
