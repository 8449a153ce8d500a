"""Server-sent events of a generation: relayed as bytes, or gathered into one body.

Relaying looks at events only where it must: reads that are plainly well-formed pass whole, as they came. It refuses to
pass on what is not an event, whatever an engine sends.
"""

from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json, to_json

from forebay.dialects.answer import Progress, count
from forebay.dialects.openai.call import Call
from forebay.dialects.openai.errors import body_of, from_engine
from forebay.errors import EngineGarbled, ForebayError

EVENT_BYTES_MAX = 4 * 2**20
ANSWER_BYTES_MAX = 64 * 2**20  # of events, where they are put together into one body
DONE = b"data: [DONE]\n\n"
_HEAD = b"data: {"
_LEGACY_COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
_CONTENT_MARKS = (b'"content":"', b'"text":"', b'"tool_calls"', b'"reasoning_content"')


class EventReader:
    """Cuts bytes into events and parses them. Raises EngineGarbled, or what an error event means."""

    def __init__(self) -> None:
        self.done = False
        self._rest = b""

    @property
    def empty(self) -> bool:
        """Whether nothing is left over from the last bytes."""
        return not self._rest

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The events that `data` completes."""
        *blocks, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(self._rest) > EVENT_BYTES_MAX:
            raise EngineGarbled
        events = [self._parse(block) for block in blocks]
        return [event for event in events if event is not None]

    def _parse(self, block: bytes) -> dict[str, Any] | None:
        payload = b""
        for line in block.split(b"\n"):
            if line.startswith(b"data:"):
                payload += line[5:].strip()
            elif line.startswith(b"error:"):
                payload = b'{"error":' + line[6:].strip() + b"}"
            elif line and not line.startswith((b":", b"event:", b"id:", b"retry:")):
                raise EngineGarbled
        if payload == b"[DONE]":
            self.done = True
            return None
        if payload in {b"", b"null"}:
            return None
        try:
            event = from_json(payload)
        except ValueError:
            raise EngineGarbled from None
        return self._check(event, payload)

    def _check(self, event: Any, payload: bytes) -> dict[str, Any]:
        if not isinstance(event, dict):
            raise EngineGarbled
        if event.get("error"):
            code = event["error"].get("code") if isinstance(event["error"], dict) else None
            raise from_engine(code if isinstance(code, int) and 400 <= code < 600 else 500, payload)
        choices = event.get("choices")
        if not isinstance(choices, list) or not all(_is_sound(choice) for choice in choices):
            raise EngineGarbled
        return event


class GenerationRelay:
    """Turns an engine's stream into that of a chat or a completion."""

    def __init__(self, call: Call, *, rename: bool) -> None:
        self.progress = Progress(prompt_estimate=call.tokens_estimate)
        self._call = call
        self._reader = EventReader()
        self._first = True
        self._parses_all = rename or call.legacy_logprobs or call.forced_tool
        self._tool_texts: dict[int, str] = {}

    @property
    def done(self) -> bool:
        """Whether the engine has said [DONE]."""
        return self._reader.done

    def feed(self, data: bytes) -> bytes:
        """The bytes to send on for `data`; may be empty. Raises EngineGarbled, or what an error event means."""
        if self._passes_whole(data):
            self.progress.events += data.count(b"\n\n")
            if not self.progress.content_seen:
                self.progress.content_seen = any(mark in data for mark in _CONTENT_MARKS)
            return data
        out = b"".join(self.render(event) for event in self._reader.feed(data))
        return out + DONE if self._reader.done else out

    def _passes_whole(self, data: bytes) -> bool:
        """Whether `data` is whole events that need no change: no usage, no error, no end, nothing left over."""
        return (
            not self._first
            and not self._parses_all
            and data.startswith(_HEAD)
            and data.endswith(b"}\n\n")
            and self._reader.empty
            and b'"usage"' not in data
            and b'"error"' not in data
            and data.count(b"\n\n") == data.count(b"}\n\ndata: {") + 1
        )

    def render(self, event: dict[str, Any]) -> bytes:
        """What `event` becomes on the wire."""
        self.progress.events += 1
        self.progress.note_usage(event)
        self.progress.content_seen = self.progress.content_seen or _has_content(event)
        if not event["choices"] and not self._call.include_usage:
            return b""
        event.pop("timings", None)
        if self._first or not event["choices"]:
            event["service_tier"] = self._call.tier
        usage = event.pop("usage", None) if event["choices"] else None
        self._first = False
        event["model"] = self._call.request.model
        for choice in event["choices"]:
            if self._call.legacy_logprobs:
                choice["logprobs"] = legacy_logprobs(choice.get("logprobs"))
            if self._call.forced_tool:
                self._hold_tool_text(choice)
        out = b"data: " + to_json(event) + b"\n\n"
        if usage and self._call.include_usage:
            # Some engines put the usage beside the last choice; clients look for it in a chunk of its own.
            out += (
                b"data: " + to_json({**event, "choices": [], "usage": usage, "service_tier": self._call.tier}) + b"\n\n"
            )
        return out

    def _hold_tool_text(self, choice: dict[str, Any]) -> None:
        """Keep the text of a forced tool call until it is whole, then turn it into the call."""
        index, delta = _index(choice, self._call), choice.get("delta") or {}
        choice["delta"] = delta
        content = delta.pop("content", None)
        self._tool_texts[index] = text = self._tool_texts.get(index, "") + (content if isinstance(content, str) else "")
        if len(text) > EVENT_BYTES_MAX:
            raise EngineGarbled
        if choice.get("finish_reason") is None:
            return
        call = tool_call_from(text, self._call.request.id, index)
        if call is None:
            delta["content"] = text
        else:
            delta["tool_calls"] = [{"index": 0, **call}]
            choice["finish_reason"] = "tool_calls"


@dataclass(slots=True)
class _Choice:
    """One answer as it is put together."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tool_calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    logprobs: list[Any] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    finish_reason: str | None = None


class GenerationGatherer:
    """Puts an engine's stream together into the body of a chat or a completion."""

    def __init__(self, call: Call) -> None:
        self.progress = Progress(prompt_estimate=call.tokens_estimate)
        self._call = call
        self._reader = EventReader()
        self._bytes = 0
        self._head: dict[str, Any] = {}
        self._choices: dict[int, _Choice] = {}

    @property
    def done(self) -> bool:
        """Whether the engine has said [DONE]."""
        return self._reader.done

    def feed(self, data: bytes) -> None:
        """Take in `data`. Raises EngineGarbled, or what an error event means."""
        self._bytes += len(data)
        if self._bytes > ANSWER_BYTES_MAX:
            raise EngineGarbled("The engine's answer is larger than this server puts together. Ask for a stream.")
        for event in self._reader.feed(data):
            self.progress.events += 1
            self.progress.note_usage(event)
            self.note(event)
            self._head = self._head or event
            for choice in event["choices"]:
                self._add(choice)

    def body(self) -> bytes:
        """The whole answer as JSON. Raises EngineGarbled if there is none."""
        if not self._choices or not self._reader.done:
            raise EngineGarbled
        usage = self.progress.used
        return to_json(
            {
                "id": self._head.get("id"),
                "object": "chat.completion" if self._call.kind == "chat" else "text_completion",
                "created": self._head.get("created"),
                "model": self._call.request.model,
                "choices": [self._render(index, self._choices[index]) for index in sorted(self._choices)],
                "usage": {
                    "prompt_tokens": usage.prompt_tokens,
                    "completion_tokens": usage.completion_tokens,
                    "total_tokens": usage.total_tokens,
                    "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
                },
                "service_tier": self._call.tier,
                "system_fingerprint": self._head.get("system_fingerprint"),
            }
        )

    def note(self, event: dict[str, Any]) -> None:
        """Look at an event before it is added."""

    def text_of(self, index: int, text: str) -> str:
        """What a choice says where the engine wrote `text`."""
        return text

    def _add(self, wire: dict[str, Any]) -> None:
        index = _index(wire, self._call)
        choice = self._choices.setdefault(index, _Choice())
        delta = wire.get("delta")
        if isinstance(delta, dict):
            _append(choice.text, delta.get("content"))
            _append(choice.reasoning, delta.get("reasoning_content"))
            for call in delta.get("tool_calls") or ():
                _add_tool_call(choice.tool_calls, call)
        _append(choice.text, wire.get("text"))
        logprobs = wire.get("logprobs")
        if isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):
            choice.logprobs += logprobs["content"]
        elif isinstance(logprobs, dict):  # already in the form of /v1/completions
            for key in _LEGACY_COLUMNS:
                if isinstance(logprobs.get(key), list):
                    choice.columns.setdefault(key, []).extend(logprobs[key])
        choice.finish_reason = wire.get("finish_reason") or choice.finish_reason

    def _render(self, index: int, choice: _Choice) -> dict[str, Any]:
        text = self.text_of(index, "".join(choice.text))
        forced = tool_call_from(text, self._call.request.id, index) if self._call.forced_tool else None
        if forced is not None:
            text, choice.finish_reason, choice.tool_calls = "", "tool_calls", {0: forced}
        logprobs = {"content": choice.logprobs, "refusal": None} if choice.logprobs else None
        head = {"index": index, "finish_reason": choice.finish_reason}
        if self._call.kind == "completion":
            return {
                **head,
                "text": text,
                "logprobs": legacy_logprobs(logprobs) or choice.columns or None,
            }
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if choice.tool_calls else "")}
        message["refusal"] = None
        if choice.reasoning:
            message["reasoning_content"] = "".join(choice.reasoning)
        if choice.tool_calls:
            message["tool_calls"] = [choice.tool_calls[key] for key in sorted(choice.tool_calls)]
        return {**head, "message": message, "logprobs": logprobs}


class Generation:
    """The shape of chats and completions."""

    def relay(self, call: Call, *, rename: bool) -> GenerationRelay:
        """For a stream."""
        return GenerationRelay(call, rename=rename)

    def gatherer(self, call: Call) -> GenerationGatherer:
        """For a whole body."""
        return GenerationGatherer(call)

    def error_event(self, error: ForebayError) -> bytes:
        """The last event of a stream that went wrong, in the form that the official client raises."""
        return b"data: " + to_json(body_of(error)) + b"\n\n"

    def error_body(self, error: ForebayError) -> Any:
        """The JSON of an answer that is an error."""
        return body_of(error)


GENERATION = Generation()


def tool_call_from(text: str, request_id: str, index: int) -> dict[str, Any] | None:
    """The tool call that `text` holds as `{"name": …, "arguments": {…}}`; None if it was cut short."""
    try:
        wire = from_json(text)
    except ValueError:
        return None
    if not isinstance(wire, dict) or "name" not in wire:
        return None
    arguments = to_json(wire.get("arguments", {})).decode()
    identity = f"call_{request_id.removeprefix('req_')}_{index}"
    return {"id": identity, "type": "function", "function": {"name": wire["name"], "arguments": arguments}}


def legacy_logprobs(logprobs: Any) -> dict[str, Any] | None:
    """The log probabilities of /v1/completions, from an engine's chat-shaped ones."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list):
        return logprobs if isinstance(logprobs, dict) else None
    entries = [entry for entry in content if isinstance(entry, dict)]
    offsets, position = [], 0
    for entry in entries:
        offsets.append(position)
        position += len(str(entry.get("token", "")))
    return {
        "tokens": [entry.get("token") for entry in entries],
        "token_logprobs": [entry.get("logprob") for entry in entries],
        "top_logprobs": [
            {top.get("token"): top.get("logprob") for top in entry.get("top_logprobs") or ()} for entry in entries
        ],
        "text_offset": offsets,
    }


def _has_content(event: dict[str, Any]) -> bool:
    for choice in event["choices"]:
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("tool_calls") or delta.get("reasoning_content"):
            return True
    return False


def _is_sound(choice: Any) -> bool:
    """Whether what is read of a choice further on has the shape that it is taken to have there."""
    if not isinstance(choice, dict):
        return False
    delta, logprobs = choice.get("delta"), choice.get("logprobs")
    if delta is not None and not (isinstance(delta, dict) and _are_tool_calls(delta.get("tool_calls"))):
        return False
    entries = logprobs.get("content") if isinstance(logprobs, dict) else None
    return not isinstance(entries, list) or all(
        _are_dicts(entry.get("top_logprobs"), token=str) for entry in entries if isinstance(entry, dict)
    )


def _are_tool_calls(calls: Any) -> bool:
    if not _are_dicts(calls, id=str, function=dict):
        return False
    return _are_dicts([call.get("function") or {} for call in calls or ()], name=str, arguments=str)


def _are_dicts(value: Any, **kinds: type) -> bool:
    """Whether `value` is absent or a list of objects whose fields of these names, where they are set, are of these kinds."""
    if value is None:
        return True
    return isinstance(value, list) and all(
        isinstance(item, dict) and all(isinstance(item.get(key), kind | None) for key, kind in kinds.items())
        for item in value
    )


def _add_tool_call(calls: dict[int, dict[str, Any]], wire: dict[str, Any]) -> None:
    call = calls.setdefault(
        count(wire.get("index")), {"id": None, "type": "function", "function": {"name": "", "arguments": ""}}
    )
    call["id"] = wire.get("id") or call["id"]
    function = wire.get("function") or {}
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""


def _append(parts: list[str], text: Any) -> None:
    if isinstance(text, str) and text:
        parts.append(text)


def _index(choice: dict[str, Any], call: Call) -> int:
    """Which of the answers that were asked for this is a part of; raises EngineGarbled for any other."""
    index = count(choice.get("index"))
    if index >= call.request.places:
        raise EngineGarbled
    return index
