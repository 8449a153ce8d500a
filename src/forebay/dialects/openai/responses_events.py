"""The answer of /v1/responses: an engine's chat stream as typed events, or as one response object.

Both come from one writer, so that they say the same. It refuses to number an event before it is sent: whoever keeps events
may join those that have not been told yet.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from pydantic_core import to_json

from forebay.dialects.answer import Progress
from forebay.dialects.openai.call import Call, Thread
from forebay.dialects.openai.errors import body_of
from forebay.dialects.openai.events import ANSWER_BYTES_MAX, EventReader, tool_call_from
from forebay.dialects.openai.responses_writer import Event, ResponseWriter
from forebay.errors import EngineGarbled, ForebayError

_JOINED = frozenset(
    {"response.output_text.delta", "response.reasoning_text.delta", "response.function_call_arguments.delta"}
)


def joined(events: Iterable[Event]) -> list[Event]:
    """The same events with fewer of them: deltas of one part that follow each other become one."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if (
            last is not None
            and event["type"] in _JOINED
            and (last["type"], last.get("item_id")) == (event["type"], event["item_id"])
        ):
            found[-1] = {**last, "delta": last["delta"] + event["delta"]}
            if "logprobs" in last:
                found[-1]["logprobs"] = [*last["logprobs"], *event["logprobs"]]
        else:
            found.append(event)
    return found


def numbered(events: Sequence[Event], first: int) -> list[Event]:
    """The events with their numbers."""
    return [{**event, "sequence_number": number} for number, event in enumerate(events, first)]


def rendered(events: Iterable[Event]) -> bytes:
    """Numbered events as server-sent ones."""
    return b"".join(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), to_json(event)) for event in events)


def unwell(response: dict[str, Any]) -> list[Event]:
    """The last events of a response that failed or was cancelled."""
    error = response["error"]
    told = [] if error is None else [{"type": "error", **error, "param": None}]
    return [*told, {"type": "response.failed", "response": response}]


class _Reading:
    """What relay and gatherer share: the engine's stream goes through a writer."""

    def __init__(self, call: Call, writer: ResponseWriter) -> None:
        self.progress = Progress(prompt_estimate=call.tokens_estimate)
        self._call = call
        self._writer = writer
        self._reader = EventReader()
        self._forced_text = ""
        self._bytes = 0

    @property
    def done(self) -> bool:
        """Whether the engine has said [DONE]."""
        return self._reader.done

    def take(self, data: bytes) -> list[Event]:
        """The events that `data` completes, without numbers. Raises EngineGarbled, or what an error event means."""
        self._bytes += len(data)
        if self._bytes > ANSWER_BYTES_MAX:  # its last event holds all of it
            raise EngineGarbled("The engine's answer is larger than this server puts together.")
        was_done = self._reader.done
        events: list[Event] = []
        for chunk in self._reader.feed(data):
            self.progress.events += 1
            self.progress.note_usage(chunk)
            for choice in chunk["choices"]:
                if choice.get("index"):
                    raise EngineGarbled
                if self._call.forced_tool:
                    self._hold_tool_text(choice)
            events += self._writer.take(chunk)
        self.progress.content_seen = self.progress.content_seen or self._writer.has_content
        if self._reader.done and not was_done:
            events += self._writer.end(self.progress)
        return events

    def _hold_tool_text(self, choice: dict[str, Any]) -> None:
        """Keep the text of a forced tool call until it is whole, then turn it into the call."""
        delta = choice.get("delta") or {}
        choice["delta"] = delta
        content = delta.pop("content", None)
        self._forced_text += content if isinstance(content, str) else ""
        if choice.get("finish_reason") is None:
            return
        call = tool_call_from(self._forced_text, self._call.request.id, 0)
        if call is None:
            delta["content"] = self._forced_text
        else:
            delta["tool_calls"] = [{"index": 0, **call}]


class ResponseRelay(_Reading):
    """Turns an engine's stream into typed events. `first` is the number of the first one."""

    def __init__(self, call: Call, writer: ResponseWriter, first: int = 0) -> None:
        super().__init__(call, writer)
        self._next = first

    def feed(self, data: bytes) -> bytes:
        """The bytes to send on for `data`; may be empty."""
        return self.render(self.take(data))

    def render(self, events: Sequence[Event]) -> bytes:
        """Events with the numbers that come next."""
        first, self._next = self._next, self._next + len(events)
        return rendered(numbered(events, first))


class ResponseGatherer(_Reading):
    """Puts an engine's stream together into a response object."""

    def feed(self, data: bytes) -> None:
        """Take in `data`."""
        self.take(data)

    def body(self) -> bytes:
        """The whole response as JSON. Raises EngineGarbled if there is none."""
        if self._writer.result is None:
            raise EngineGarbled
        return to_json(self._writer.result)


class ResponseShape:
    """How one response is written. `head` is what it says of its request; made for one answer alone."""

    def __init__(self, head: dict[str, Any], thread: Thread | None, *, logprobs: bool) -> None:
        self._head = head
        self._thread = thread
        self._logprobs = logprobs
        self._writer: ResponseWriter | None = None
        self._relay: ResponseRelay | None = None

    @property
    def result(self) -> dict[str, Any] | None:
        """The response as it ended, once it has."""
        return None if self._writer is None else self._writer.result

    def queued(self) -> dict[str, Any]:
        """The response before anything of it is written."""
        assert self._thread is not None, "only what is kept can be waited for"
        return ResponseWriter(self._head, self._thread, self._thread.id, logprobs=False).shown("queued")

    def relay(self, call: Call, *, rename: bool) -> ResponseRelay:
        """For a stream."""
        self._relay = ResponseRelay(call, self._begin(call))
        return self._relay

    def gatherer(self, call: Call) -> ResponseGatherer:
        """For a whole body."""
        return ResponseGatherer(call, self._begin(call))

    def _begin(self, call: Call) -> ResponseWriter:
        own = "resp_" + call.request.id.removeprefix("req_") if self._thread is None else self._thread.id
        self._writer = ResponseWriter(self._head, self._thread, own, logprobs=self._logprobs)
        return self._writer

    def error_event(self, error: ForebayError) -> bytes:
        """What went wrong, and the response that has failed of it."""
        assert self._relay is not None
        assert self._writer is not None
        return self._relay.render(self._writer.fail(error))

    def error_body(self, error: ForebayError) -> Any:
        """The JSON of an answer that is an error."""
        if error.param == "messages":
            error.param = "input"
        return body_of(error)
