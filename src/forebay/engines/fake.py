"""An engine without a model: deterministic answers, and every misbehaviour that a real engine is feared for, on request.

It speaks the dialect of the real engines over HTTP/1.1 on loopback. It refuses to guess: a directive that it cannot read is
ignored, and nothing but the request body decides what an answer says.

Which misbehaviour: see the directive in `fake_answers`.
"""

import asyncio
import hmac
import json
import os
import re
import signal
import sys
from collections import deque
from dataclasses import dataclass, field
from typing import Any, cast

import uvloop

from forebay.engines.fake_answers import Chunks, Directive, Job, Refused, read_job, read_tokens, whole_answer
from forebay.engines.fake_images import PATHS as PICTURES
from forebay.engines.fake_images import Canvas, read_canvas
from forebay.engines.fake_speech import PATHS, Recital, read_recital
from forebay.engines.fake_vectors import Reading, read_reading
from forebay.engines.lived import Lived
from forebay.engines.start import check_types, read_spec, refuse_to_start, run_out_of_memory

_MAX_HEAD_BYTES = 64 * 1024
_MAX_BODY_BYTES = 256 * 1024 * 1024
_MAX_WAITING = 4096
_BURST_TOKENS = 64
_ABOUT_TOKENS = ("/tokenize", "/detokenize", "/v1/chat/completions/input_tokens")
_READS = {"/v1/embeddings": "embedding", "/v1/rerank": "rerank"}
_UNPRINTABLE = re.compile(r"[^\x21-\x7e]")
_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 503: "Service Unavailable"}
_STREAM_HEAD = "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Spec:
    """How this engine is set up, from FOREBAY_ENGINE_SPEC."""

    name: str = "fake"
    slots: int = 1
    context: int = 2048
    start_delay_seconds: float = 0.0
    fail_start: str = "no"
    memory_slots_max: int = 0
    tools: bool = False
    vision: bool = False
    capabilities: list = field(default_factory=list)  # type: ignore[type-arg]  # what it serves beside text
    dimensions: int = 384
    input_tokens_max: int = 300_000
    ballast_bytes: int = 0  # memory that it holds for nothing
    sleep_level: int = 0  # whether it can sleep
    quiet: bool = False
    port: int = 0  # 0 takes a free one, and says which

    def __post_init__(self) -> None:
        check_types(self)


class CutStream(Exception):
    """The connection is to be closed in the middle of the answer."""


class Slots:
    """The places that compute. Who finds none free waits in line, as in a real engine."""

    def __init__(self, count: int) -> None:
        self.busy = [False] * count
        self._waiting: deque[tuple[int, asyncio.Future[list[int]]]] = deque()

    async def take(self, count: int) -> list[int]:
        """Wait for `count` free slots and occupy them all at once."""
        if len(self._waiting) >= _MAX_WAITING:
            raise Refused(503, "The line is full.", "unavailable_error")
        place: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, place))
        self._grant()
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.free(place.result())
            else:
                self._waiting.remove((count, place))
                self._grant()
            raise

    def free(self, taken: list[int]) -> None:
        """Give slots back, and let in whoever is next."""
        for slot in taken:
            self.busy[slot] = False
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self._waiting[0][0] <= self.busy.count(False):
            count, place = self._waiting.popleft()
            taken = [slot for slot, busy in enumerate(self.busy) if not busy][:count]
            for slot in taken:
                self.busy[slot] = True
            place.set_result(taken)


class Engine:
    """What all connections share."""

    def __init__(self, spec: Spec, key: str) -> None:
        self.spec = spec
        self.ready = False
        self.slots = Slots(spec.slots)
        self.lived = Lived()
        self.stats = {"started": 0, "finished": 0, "cancelled": 0, "running": 0, "tokens": 0}
        self.ballast = b""
        self.asleep = False
        self.authorization = f"Bearer {key}".encode()

    def sleep(self, *, asleep: bool) -> dict[str, bool]:
        """Let go of the ballast, or take it again."""
        self.asleep = asleep
        self.ballast = b"" if asleep else self.ballast or b"\1" * self.spec.ballast_bytes
        return {"is_sleeping": asleep}

    def look_up(self, path: str) -> Any:
        """The answer to a GET, and to what has no body."""
        match path:
            case "/is_sleeping" if self.spec.sleep_level:
                return {"is_sleeping": self.asleep}
            case "/sleep" | "/wake_up" | "/collective_rpc" if self.spec.sleep_level:
                return self.sleep(asleep=path == "/sleep")
            case "/slots":
                return [{"id": slot, "is_processing": busy} for slot, busy in enumerate(self.slots.busy)]
            case "/props":
                caps = {"supports_tools": self.spec.tools, "supports_tool_calls": self.spec.tools}
                return {"model_alias": self.spec.name, "total_slots": self.spec.slots, "chat_template_caps": caps}
            case "/v1/models":
                return {"object": "list", "data": [{"id": self.spec.name, "object": "model"}]}
            case "/fake/stats":
                return self.stats
            case _:
                raise Refused(404, "There is nothing here by that name.", "not_found_error")

    def log(self, ids: str, event: str) -> None:
        """One line about one request."""
        if not self.spec.quiet:
            sys.stderr.write(f"fake: event={event} {ids}\n")

    async def run(self, job: Job | Reading | Recital | Canvas, ids: str, out: "Writer") -> None:
        """Compute the answer in slots of its own; they are free again when this returns or raises."""
        taken = await self.slots.take(job.choices)
        self._check_memory()
        self.stats["started"] += 1
        self.stats["running"] += 1
        self.log(ids, "started")
        ended = "cancelled"
        try:
            await (self._read(job, ids, out) if isinstance(job, Reading) else self._produce(job, out))
            ended = "finished"
        finally:
            self.stats["running"] -= 1
            self.stats[ended] += 1
            self.slots.free(taken)
            self.log(ids, ended)

    def _check_memory(self) -> None:
        limit = self.spec.memory_slots_max
        if limit and self.slots.busy.count(True) > limit:
            lose_memory()

    async def _produce(self, job: Job | Recital | Canvas, out: "Writer") -> None:
        directive, chunks = job.directive, Chunks(job) if isinstance(job, Job) else job
        if directive.delay_ms > 0:
            await self.lived.sleep(directive.delay_ms / 1000)
        clock, interval = self.lived.seconds, directive.interval_seconds
        due, ready = clock(), [chunks.begin()]
        for index, word in enumerate(job.words):
            if directive.troubled:
                await meet_trouble(directive, index, out, ready)
            ready.append(chunks.token(word))
            self.stats["tokens"] += job.choices
            due += interval
            wait = due - clock() if interval else 0.0
            if wait > 0 or index % _BURST_TOKENS == _BURST_TOKENS - 1:
                await out.send(ready)
                await (self.lived.sleep(wait) if wait > 0 else asyncio.sleep(0))
        if directive.troubled:
            await meet_trouble(directive, len(job.words), out, ready)
        if isinstance(job, Job) and not job.stream:
            return out.finish(whole_answer(job))
        return out.finish(b"".join(ready) + chunks.end())

    async def _read(self, reading: Reading, ids: str, out: "Writer") -> None:
        """All at once: what goes wrong goes wrong before the answer."""
        directive = reading.directive
        if directive.delay_ms > 0:
            await self.lived.sleep(directive.delay_ms / 1000)
        if directive.troubled:
            garbage: list[bytes] = []
            await meet_trouble(directive, 0, out, garbage)
            if garbage:
                return out.finish(garbage[0])
        self.log(f"{ids} items={len(reading.contents)}", "read")
        return out.finish(reading.answer())


async def meet_trouble(directive: Directive, index: int, out: "Writer", ready: list[bytes]) -> None:
    """Misbehave as asked, if this is the token for it. What came before has reached the caller by then."""
    if index == directive.garbage_at:
        ready.append(b"\x00\xff\xfe<garbage>{]\n\n")
    if index not in (
        directive.crash_at,
        directive.oom_at,
        directive.hang_at,
        directive.freeze_at,
        directive.block_at,
        directive.truncate_at,
    ):
        return
    if any(ready) and index:
        await out.send(ready)
        await out.flush()
    if index == directive.truncate_at:
        raise CutStream
    if index == directive.hang_at:
        await asyncio.get_running_loop().create_future()
    if index == directive.freeze_at:
        os.kill(os.getpid(), signal.SIGSTOP)
    while index == directive.block_at:
        signal.pause()
    if index == directive.oom_at:
        lose_memory()
    if index == directive.crash_at:
        crash(directive.crash)


def crash(how: str) -> None:
    """Die without a word."""
    if how == "exit":
        os._exit(1)
    os.kill(os.getpid(), signal.SIGSEGV if how == "segv" else signal.SIGKILL)


def lose_memory() -> None:
    """Die as an engine dies when the device has no memory left."""
    run_out_of_memory("fake: out of memory: the cache does not fit")


class Writer:
    """One answer on its way out: SSE in HTTP chunks, or one JSON body."""

    def __init__(self, transport: asyncio.Transport, writable: asyncio.Event, stream: bool, kind: str) -> None:
        self._transport = transport
        self._writable = writable
        self._stream = stream
        self._head = _STREAM_HEAD.format(kind=kind).encode()
        self._begun = False

    async def send(self, ready: list[bytes]) -> None:
        """Write and empty `ready`; waits for a slow reader."""
        data = b"".join(ready)
        ready.clear()
        if self._stream and data:
            self._write(data)
            await self._writable.wait()

    async def flush(self) -> None:
        """Wait, but not for ever, until the kernel has what was written."""
        for _ in range(1000):
            await asyncio.sleep(0)
            if not self._transport.get_write_buffer_size():
                return

    def finish(self, data: bytes) -> None:
        """Write the last part."""
        if not self._stream:
            write_whole(self._transport, 200, data)
        else:
            self._write(data)
            self._send(b"0\r\n\r\n")

    def _write(self, data: bytes) -> None:
        head = b"" if self._begun else self._head
        self._begun = True
        self._send(b"%b%x\r\n%b\r\n" % (head, len(data), data))

    def _send(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)


def write_whole(transport: asyncio.Transport, status: int, body: bytes) -> None:
    """One JSON answer with its length."""
    if not transport.is_closing():
        reason = _REASONS.get(status, "Error")
        head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        transport.write(head.encode() + body)


@dataclass(slots=True)
class Head:
    """The first lines of one HTTP request."""

    method: str
    path: str
    headers: dict[bytes, bytes]
    length: int

    @property
    def ids(self) -> str:
        """The caller's names for the request and for the trace it belongs to, safe to log."""
        trace = self._printable(b"traceparent")
        return f"request_id={self._printable(b'x-request-id') or '-'}" + (f" traceparent={trace}" if trace else "")

    def _printable(self, name: bytes) -> str:
        return _UNPRINTABLE.sub("", self.headers.get(name, b"").decode("latin-1"))[:128]


def read_head(block: bytes) -> Head:
    """Parse request line and headers, or raise Refused."""
    request_line, *lines = block.split(b"\r\n")
    parts = request_line.split(b" ")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    length = headers.get(b"content-length", b"0")
    if len(parts) != 3 or not length.isdigit() or b"transfer-encoding" in headers:
        raise Refused(400, "Send HTTP/1.1 with a Content-Length.")
    if len(length) > 12 or int(length) > _MAX_BODY_BYTES:
        raise Refused(413, "The body is too large.")
    return Head(parts[0].decode("latin-1"), parts[1].decode("latin-1").partition("?")[0], headers, int(length))


class Connection(asyncio.Protocol):
    """One client: one request at a time. When it goes away or half-closes, its work stops, then the connection closes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._transport: asyncio.Transport
        self._received = bytearray()
        self._head: Head | None = None
        self._running: asyncio.Task[None] | None = None
        self._stoppable = True
        self._gone = False
        self._writable = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def eof_received(self) -> bool:
        self._leave()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._writable.set()
        self._leave()

    def _leave(self) -> None:
        self._gone = True
        if self._running is None:
            self._transport.close()
        elif self._stoppable:
            self._running.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if len(self._received) > _MAX_BODY_BYTES + _MAX_HEAD_BYTES:
            return self._transport.abort()
        try:
            self._advance()
        except Refused as refused:
            self._refuse(refused)
            self._transport.close()

    def _advance(self) -> None:
        """Serve every request that has arrived in full, until one has to be waited for."""
        while self._running is None and not self._transport.is_closing():
            if self._head is None:
                end = self._received.find(b"\r\n\r\n", 0, _MAX_HEAD_BYTES)
                if end < 0:
                    if len(self._received) > _MAX_HEAD_BYTES:
                        raise Refused(431, "The headers are too large.")
                    return
                self._head = read_head(bytes(self._received[:end]))
                del self._received[: end + 4]
            head = self._head
            if len(self._received) < head.length:
                return
            body = bytes(self._received[: head.length])
            del self._received[: head.length]
            self._head = None
            self._serve(head, body)

    def _serve(self, head: Head, body: bytes) -> None:
        try:
            answer = self._route(head, body)
        except Refused as refused:
            self._refuse(refused)
            return
        if answer is not None:
            write_whole(self._transport, 200, json.dumps(answer).encode())

    def _route(self, head: Head, body: bytes) -> Any:
        """The answer, or None when it is being computed."""
        if head.path != "/health" and not hmac.compare_digest(
            head.headers.get(b"authorization", b""), self._engine.authorization
        ):
            raise Refused(401, "Invalid API key", "authentication_error")
        if not self._engine.ready:
            raise Refused(503, "Loading model", "unavailable_error")
        if head.path == "/health":
            return {"status": "ok"}
        if head.method == "POST" and head.path in ("/v1/chat/completions", "/v1/completions"):
            spec = self._engine.spec
            chat = head.path == "/v1/chat/completions"
            job = read_job(body, chat, spec.name, spec.slots, spec.context, vision=spec.vision)
            self._start(job, head.ids)
            return None
        if head.method == "POST" and head.path in _READS and _READS[head.path] in self._engine.spec.capabilities:
            spec = self._engine.spec
            reading = read_reading(body, spec.name, spec.context, spec.dimensions, spec.input_tokens_max)
            self._start(reading, head.ids)
            return None
        if head.method == "POST" and not PATHS.get(head.path, set()).isdisjoint(self._engine.spec.capabilities):
            self._start(read_recital(head.path, body), head.ids)
            return None
        if head.method == "POST" and PICTURES.get(head.path) in self._engine.spec.capabilities:
            self._start(read_canvas(head.path, body), head.ids)
            return None
        if head.method == "POST" and head.path in _ABOUT_TOKENS:
            return read_tokens(head.path, body)
        return self._engine.look_up(head.path)

    def _start(self, job: Job | Reading | Recital | Canvas, ids: str) -> None:
        self._stoppable = not job.directive.refuse_stop
        kind = job.kind if isinstance(job, Recital | Canvas) else "text/event-stream"
        out = Writer(self._transport, self._writable, job.stream, kind)
        self._running = asyncio.ensure_future(self._engine.run(job, ids, out))
        self._running.add_done_callback(self._ended)

    def _ended(self, running: "asyncio.Task[None]") -> None:
        self._running = None
        error = None if running.cancelled() else running.exception()
        if isinstance(error, Refused):
            self._refuse(error)
        if self._gone or running.cancelled() or isinstance(error, CutStream):
            self._transport.close()
        elif error is None or isinstance(error, Refused):
            self.data_received(b"")
        else:
            raise error

    def _refuse(self, refused: Refused) -> None:
        write_whole(self._transport, refused.status, json.dumps(refused.body).encode())


def sound_spec() -> tuple[Spec, str]:
    """The spec and the key, once they make sense."""
    spec, key = read_spec(Spec, "The fake engine")
    if spec.slots < 1:
        refuse_to_start("The fake engine needs at least one slot.")
    return spec, key


def fail_to_start(spec: Spec) -> None:
    """Fail in the way the spec asks for, if it asks."""
    match spec.fail_start:
        case "exit":
            sys.stderr.write("fake: asked to fail at the start\n")
            os._exit(1)
        case "oom":
            lose_memory()
        case "refuse":
            refuse_to_start("The fake engine was asked never to start.")


async def serve(spec: Spec, key: str) -> None:
    """Listen, load for as long as asked, then answer until SIGTERM."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, os._exit, 0)
    engine = Engine(spec, key)
    server = await loop.create_server(lambda: Connection(engine), "127.0.0.1", spec.port, backlog=4096)
    address = server.sockets[0].getsockname()
    print(f"FOREBAY_ENGINE_LISTENING http://127.0.0.1:{address[1]}", flush=True)
    await asyncio.sleep(spec.start_delay_seconds)
    fail_to_start(spec)
    engine.sleep(asleep=False)
    engine.ready = spec.fail_start != "never_ready"
    await server.serve_forever()


def main() -> None:
    """Run the engine until it is told to stop."""
    spec, key = sound_spec()
    uvloop.run(serve(spec, key))


if __name__ == "__main__":
    main()
