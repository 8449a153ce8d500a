"""Messages written from what a chat streams: event by event, or put together into one.

Both come from the same `MessageWriter`, so that they say the same. It refuses to pass on a call of a tool whose input is
not a JSON object: the caller's client would fail on it.
"""

from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json, to_json

from forebay.dialects.answer import Gatherer, Progress, count
from forebay.dialects.anthropic.errors import body_of
from forebay.dialects.openai.call import Call
from forebay.dialects.openai.events import ANSWER_BYTES_MAX, EVENT_BYTES_MAX, EventReader, tool_call_from
from forebay.dialects.tokens import TokensGatherer
from forebay.errors import EngineGarbled, ForebayError
from forebay.inference import Usage

_STOP_REASONS = {
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
_DELTAS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
_NO_INPUT = "The model wrote a call of a tool whose input is not a JSON object. Try again."
Event = dict[str, Any]


class _Text:
    """A text that comes in pieces, up to a bound."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._chars = 0

    def add(self, piece: str) -> None:
        """One more piece. Raises EngineGarbled where it is too much."""
        self._chars += len(piece)
        if self._chars > EVENT_BYTES_MAX:
            raise EngineGarbled
        self._pieces.append(piece)

    @property
    def whole(self) -> str:
        """What has come so far."""
        return "".join(self._pieces)


class MessageWriter:
    """Turns the events of a chat into those of a message: one block after the other, each closed before the next."""

    def __init__(self, call: Call, *, shows_thinking: bool) -> None:
        self.progress = Progress(prompt_estimate=call.tokens_estimate)
        self._call = call
        self._shows_thinking = shows_thinking
        self._started = False
        self._answered = False
        self._blocks = 0
        self._open: str | None = None
        self._tools: set[int] = set()
        self._tool = -1
        self._input = _Text()
        self._forced = _Text()
        self._finish_reason = ""
        self._stop_sequence: str | None = None

    def take(self, event: Event) -> Iterator[Event]:
        """The events that `event` becomes. Raises EngineGarbled."""
        self.progress.events += 1
        self.progress.note_usage(event)
        if not self._started:
            self._started = True
            yield {"type": "message_start", "message": self._head()}
            yield {"type": "ping"}
        for choice in event["choices"]:
            if count(choice.get("index")):
                raise EngineGarbled
            self._answered = True
            yield from self._take_delta(choice.get("delta") or {})
            self._note_finish(choice, event.get("__verbose"))

    def finish(self) -> Iterator[Event]:
        """The last events, once the engine has said that it is done. Raises EngineGarbled if it has said nothing."""
        if not self._answered:
            raise EngineGarbled
        if self._forced.whole:
            yield from self._forced_call()
        yield from self._close()
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": self._stop_sequence}
        yield {"type": "message_delta", "delta": delta, "usage": self._usage(self.progress.used)}
        yield {"type": "message_stop"}

    def _head(self) -> Event:
        return {
            "id": f"msg_{self._call.request.id.removeprefix('req_')}",
            "type": "message",
            "role": "assistant",
            "model": self._call.request.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(self.progress.usage or Usage()),
        }

    def _usage(self, usage: Usage) -> Event:
        """What was read from a cache is counted apart."""
        return {
            "input_tokens": max(0, usage.prompt_tokens - usage.cached_tokens),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
            "service_tier": "priority" if self._call.tier == "priority" else "standard",
        }

    def _stop_reason(self) -> str:
        if self._stop_sequence is not None:
            return "stop_sequence"
        if self._tools and self._finish_reason != "length":
            return "tool_use"
        return _STOP_REASONS.get(self._finish_reason, "end_turn")

    def _note_finish(self, choice: Event, verbose: Any) -> None:
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self._finish_reason = reason
            self._stop_sequence = _stop_sequence_of(choice, verbose) if reason == "stop" else None

    def _take_delta(self, delta: Event) -> Iterator[Event]:
        thought = _text(delta.get("reasoning_content")) or _text(delta.get("reasoning"))
        text = _text(delta.get("content"))
        calls = delta.get("tool_calls") or ()
        if thought or text or calls:
            self.progress.content_seen = True
        if thought and self._shows_thinking:
            yield from self._say("thinking", {"thinking": "", "signature": ""}, "thinking_delta", thought)
        if text and self._call.forced_tool:
            self._forced.add(text)
        elif text:
            yield from self._say("text", {"text": ""}, "text_delta", text)
        for call in calls:
            yield from self._call_tool(count(call.get("index")), call)

    def _say(self, kind: str, empty: Event, delta: str, text: str) -> Iterator[Event]:
        if self._open != kind:
            yield from self._begin(kind, empty)
        yield self._delta(delta, text)

    def _call_tool(self, index: int, wire: Event) -> Iterator[Event]:
        function = wire.get("function") or {}
        if index not in self._tools:
            if not function.get("name"):
                raise EngineGarbled
            identity = wire.get("id") or f"toolu_{self._call.request.id.removeprefix('req_')}_{index}"
            yield from self._begin("tool_use", {"id": identity, "name": function["name"], "input": {}})
            self._tools.add(index)
            self._tool = index
        arguments = function.get("arguments") or ""
        if arguments:
            if self._open != "tool_use" or index != self._tool:
                raise EngineGarbled  # its block is closed, and a client knows it as it was
            self._input.add(arguments)
            yield self._delta("input_json_delta", arguments)

    def _forced_call(self) -> Iterator[Event]:
        call = tool_call_from(self._forced.whole, self._call.request.id, 0)
        if call is not None:
            yield from self._call_tool(0, call)
        else:
            yield from self._say("text", {"text": ""}, "text_delta", self._forced.whole)

    def _begin(self, kind: str, fields: Event) -> Iterator[Event]:
        yield from self._close()
        self._open = kind
        yield {"type": "content_block_start", "index": self._blocks, "content_block": {"type": kind, **fields}}

    def _delta(self, kind: str, text: str) -> Event:
        delta = {"type": kind, _DELTAS[kind]: text}
        return {"type": "content_block_delta", "index": self._blocks, "delta": delta}

    def _close(self) -> Iterator[Event]:
        if self._open is None:
            return
        if self._open == "tool_use":
            input_of(self._input.whole)
            self._input = _Text()
        yield {"type": "content_block_stop", "index": self._blocks}
        self._open = None
        self._blocks += 1


class MessageRelay:
    """Turns an engine's stream into that of a message."""

    def __init__(self, call: Call, *, shows_thinking: bool) -> None:
        self._writer = MessageWriter(call, shows_thinking=shows_thinking)
        self._reader = EventReader()
        self._finished = False
        self.progress = self._writer.progress

    @property
    def done(self) -> bool:
        """Whether the engine has said [DONE]."""
        return self._reader.done

    def feed(self, data: bytes) -> bytes:
        """The bytes to send on for `data`; may be empty. Raises EngineGarbled, or what an error event means."""
        out = b"".join(sse(written) for event in self._reader.feed(data) for written in self._writer.take(event))
        if self._reader.done and not self._finished:
            self._finished = True
            out += b"".join(sse(written) for written in self._writer.finish())
        return out


class MessageGatherer:
    """Puts the events of a message together."""

    def __init__(self, call: Call, *, shows_thinking: bool) -> None:
        self._writer = MessageWriter(call, shows_thinking=shows_thinking)
        self._reader = EventReader()
        self._bytes = 0
        self._message: Event = {}
        self._texts: list[list[str]] = []
        self.progress = self._writer.progress

    def feed(self, data: bytes) -> None:
        """Take in `data`. Raises EngineGarbled, or what an error event means."""
        self._bytes += len(data)
        if self._bytes > ANSWER_BYTES_MAX:
            raise EngineGarbled("The engine's answer is larger than this server puts together. Ask for a stream.")
        for event in self._reader.feed(data):
            for written in self._writer.take(event):
                self._add(written)

    def body(self) -> bytes:
        """The whole message as JSON. Raises EngineGarbled if there is none."""
        if not self._reader.done:
            raise EngineGarbled
        for written in self._writer.finish():
            self._add(written)
        for block, texts in zip(self._message["content"], self._texts, strict=True):
            text = "".join(texts)
            if block["type"] == "tool_use":
                block["input"] = input_of(text)
            else:
                block[block["type"]] = text
        return to_json(self._message)

    def _add(self, event: Event) -> None:
        match event["type"]:
            case "message_start":
                self._message = event["message"]
            case "content_block_start":
                self._message["content"].append(event["content_block"])
                self._texts.append([])
            case "content_block_delta":
                self._texts[-1].append(event["delta"][_DELTAS[event["delta"]["type"]]])
            case "message_delta":
                self._message |= {**event["delta"], "usage": event["usage"]}


class Messages:
    """The shape of /v1/messages. Before there is a call it writes errors."""

    def __init__(self, request_id: str, *, shows_thinking: bool = True) -> None:
        self._request_id = request_id
        self._shows_thinking = shows_thinking

    def relay(self, call: Call, *, rename: bool) -> MessageRelay:
        """For a stream; a message always says our name of the model."""
        return MessageRelay(call, shows_thinking=self._shows_thinking)

    def gatherer(self, call: Call) -> Gatherer:
        """For a whole body."""
        return MessageGatherer(call, shows_thinking=self._shows_thinking)

    def error_event(self, error: ForebayError) -> bytes:
        """The last event of a stream that went wrong, in the form that the official client raises."""
        return b"event: error\ndata: " + to_json(body_of(error, self._request_id)) + b"\n\n"

    def error_body(self, error: ForebayError) -> Any:
        """The JSON of an answer that is an error."""
        return body_of(error, self._request_id)


class _CountGatherer(TokensGatherer):
    def body(self) -> bytes:
        """The count alone."""
        return to_json({"input_tokens": self.count()})


class CountedTokens(Messages):
    """The shape of /v1/messages/count_tokens."""

    def gatherer(self, call: Call) -> Gatherer:
        """For a whole body."""
        return _CountGatherer(call)


def sse(event: Event) -> bytes:
    """`event` as it goes over the wire, where it is named twice."""
    return b"event: %b\ndata: " % str(event["type"]).encode() + to_json(event) + b"\n\n"


def input_of(text: str) -> Event:
    """The input of a tool as far as it is written. Raises EngineGarbled for what is no JSON object."""
    try:
        wire = from_json(text or "{}", allow_partial="trailing-strings")
    except ValueError:
        raise EngineGarbled(_NO_INPUT) from None
    if not isinstance(wire, dict):
        raise EngineGarbled(_NO_INPUT)
    return wire


def _stop_sequence_of(choice: Event, verbose: Any) -> str | None:
    """Which sequence has stopped it: vLLM says so beside the reason (a number is the end of a turn), llama.cpp if asked."""
    if isinstance(verbose, dict) and verbose.get("stop_type") == "word":
        return _text(verbose.get("stopping_word")) or None
    return _text(choice.get("stop_reason")) or None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
