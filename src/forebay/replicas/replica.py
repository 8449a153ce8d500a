"""One engine as the server sees it: its state, its places, the requests in flight on it, and how to run one there.

Its state is written by the supervisor alone. It refuses to give a place back before the engine has stopped, and to stand
still while anything but batch work is in flight on it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from enum import StrEnum

import aiohttp

from forebay.dialects.openai.errors import from_engine
from forebay.errors import EngineGarbled, EngineUnavailable, ForebayError, Quarantined
from forebay.inference import Capability, Priority, Request
from forebay.replicas.commands import Traits
from forebay.replicas.connection import EngineStream
from forebay.replicas.launcher import EngineProcess
from forebay.replicas.pauses import Pauses
from forebay.replicas.postmortem import Death, Quarantine

_VERDICT_SECONDS = 0.9
_SILENT_SECONDS = 1.0  # after this long in the middle of an answer, an engine may have hung
_SECRET_CHARS_MIN = 8


class ReplicaState(StrEnum):
    """STARTING -> READY -> DRAINING -> STOPPED, or ASLEEP -> STARTING; any of them -> STOPPED when the process ends."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    ASLEEP = "asleep"
    STOPPED = "stopped"


class Replica:
    """One live engine. A new process is a new Replica.

    `largest_input`: bytes of the largest request since somebody, who measures, last set it back.
    """

    def __init__(
        self,
        replica_id: str,
        model: str,
        slots: int,
        traits: Traits,
        session: aiohttp.ClientSession,
        quarantine: Quarantine,
    ) -> None:
        self.id = replica_id
        self.model = model
        self.slots = slots
        self.traits = traits
        self.state = ReplicaState.STARTING
        self.address = ""
        self.headers: dict[str, str] = {}
        self.tools: bool | None = None
        self.in_flight: dict[int, Request] = {}
        self.refusing: dict[int, Request] = {}
        self.largest_input = 0
        self.death: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
        self.idle = asyncio.Event()
        self.idle.set()
        self._granted = 0
        self.process: EngineProcess | None = None
        self.pauses = Pauses()
        self._session = session
        self._quarantine = quarantine
        self._stopping: set[int] = set()
        self._doubts: set[int] = set()
        self._stops: set[asyncio.Task[None]] = set()
        self._sequence = 0

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self.state is ReplicaState.READY

    @property
    def doubtful(self) -> bool:
        """Whether it fell silent on somebody who has left, and has not said since that it has stopped: it may hang."""
        return bool(self._doubts)

    @property
    def only_refusals_left(self) -> bool:
        """Whether nothing but requests that refuse to stop is in flight."""
        return len(self.refusing) == len(self.in_flight)

    @property
    def paused(self) -> bool:
        """Whether it stands still."""
        return self.pauses.paused

    @property
    def paused_seconds(self) -> float:
        """How long it has stood still in all."""
        return self.pauses.seconds

    @property
    def pausable(self) -> bool:
        """Whether it may stand still now: it is ours, it serves, all that it runs is batch work, and none of it is stopping."""
        return (
            self.process is not None
            and self.traits.pausable
            and self.ready
            and not self._stopping
            and all(request.priority is Priority.BATCH for request in self.in_flight.values())
        )

    def pause(self) -> None:
        """Let it stand still until `resume`, if it is pausable. Whatever needs it resumes it by itself."""
        if self.process is not None and self.pausable and not self.paused:
            self.pauses.begin()
            self.process.pause()

    def resume(self) -> None:
        """Let it go on, if it is paused."""
        if self.process is not None and self.paused:
            self.process.resume()
            self.pauses.end()

    @asynccontextmanager
    async def run(
        self,
        request: Request,
        grace_seconds: float,
        on_refusal: Callable[["Replica"], None],
        on_stopped: Callable[[], None],
    ) -> AsyncIterator[EngineStream]:
        """Send `request`; inside the block its answer can be read.

        Leaving the block, however it ends, never waits: `on_stopped` is called when the engine has stopped (or is
        gone), and `on_refusal` first if it does not stop within the grace period. Raises what the caller is to be told.
        """
        self._sequence += 1
        number = self._sequence
        self.in_flight[number] = request
        self.largest_input = max(self.largest_input, len(request.body))
        self.idle.clear()
        if request.priority is not Priority.BATCH:
            self.resume()
        stream = self._stream_for(request)
        try:
            await self._open(stream, request)
            yield stream
        except (aiohttp.ClientError, OSError) as error:
            raise await self._explain(request, error) from None
        except ForebayError as error:
            error.args = (self._strike_out(str(error), request),)
            if error.param == "messages" and request.capability is Capability.COMPLETION:
                error.param = "prompt"
            raise
        finally:
            if stream.finished:
                stream.release()
                self._forget(number, on_stopped)
            else:
                self.resume()
                self._stopping.add(number)
                if stream.silent_seconds >= _SILENT_SECONDS:
                    self._doubts.add(number)
                stop = asyncio.create_task(self._stop(stream, number, grace_seconds, on_refusal, on_stopped))
                self._stops.add(stop)
                stop.add_done_callback(self._stops.discard)

    async def _explain(self, request: Request, error: Exception) -> ForebayError:
        """What a broken connection meant: the engine died, or it answered with rubbish."""
        if not self.death.done():
            await asyncio.wait([self.death], timeout=_VERDICT_SECONDS)
        if self.death.done():
            return Quarantined() if self._quarantine.holds(request) else self.death.result().as_error()
        if isinstance(error, aiohttp.ClientConnectorError):
            return EngineUnavailable()
        return EngineGarbled()

    def _stream_for(self, request: Request) -> EngineStream:
        url, headers = self.address + request.path, self._headers_for(request)
        return EngineStream(self._session, url, headers, request.body, self.pauses)

    async def _open(self, stream: EngineStream, request: Request) -> None:
        status = await stream.open()
        if status != 200:
            said = (await stream.read_error()).decode("utf-8", "replace")
            raise from_engine(status, self._strike_out(said, request).encode())

    def _strike_out(self, said: str, request: Request) -> str:
        """What an engine said without what it was told in confidence: upstreams quote keys in their errors."""
        for value in (*self.headers.values(), request.caller_key or ""):
            secret = value.removeprefix("Bearer ")
            if len(secret) >= _SECRET_CHARS_MIN:
                said = said.replace(secret, "***")
        return said

    async def _stop(
        self,
        stream: EngineStream,
        number: int,
        grace_seconds: float,
        on_refusal: Callable[["Replica"], None],
        on_stopped: Callable[[], None],
    ) -> None:
        try:
            stopped = await self._make_stop(stream, grace_seconds)
            if not stopped and not self.death.done():
                self.refusing[number] = self.in_flight[number]
                on_refusal(self)
                await self.death
        finally:
            self._forget(number, on_stopped)

    async def _make_stop(self, stream: EngineStream, grace_seconds: float) -> bool:
        """Stop `stream`; whether the engine has stopped computing within the grace period."""
        try:
            async with asyncio.timeout(grace_seconds):
                if not await stream.stop(confirms_stop=self.traits.confirms_stop):
                    return True
                if self.traits.stops_after_step:
                    # llama.cpp handles the cancellation between two decoding steps, in the same loop as its probes:
                    # an answer to a probe that was sent after the end of the stream means that it is done.
                    async with self._session.get(self.address + self.traits.probe_path, headers=self.headers):
                        return True
        except TimeoutError:  # before OSError, whose child it is
            return False
        except (aiohttp.ClientError, OSError):
            return True  # nothing is left that could compute
        return True

    def grant(self) -> None:
        """Somebody was promised a place, and is about to run: it is not idle."""
        self._granted += 1
        self.idle.clear()

    def give_back(self) -> None:
        """He has run, or will not."""
        self._granted -= 1
        self._look_idle()

    def _look_idle(self) -> None:
        if not self.in_flight and not self._granted:
            self.idle.set()

    def _forget(self, number: int, on_stopped: Callable[[], None]) -> None:
        del self.in_flight[number]
        self.refusing.pop(number, None)
        self._stopping.discard(number)
        self._doubts.discard(number)
        self._look_idle()
        on_stopped()

    def _headers_for(self, request: Request) -> dict[str, str]:
        headers = {**self.headers, "Content-Type": "application/json", "X-Request-ID": request.id}
        if request.traceparent:
            headers["traceparent"] = request.traceparent
        return headers
