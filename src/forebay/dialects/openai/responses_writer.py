"""Writes one response: chunks of a chat go in, typed events come out, and at the end the response object.

It knows the order of events and nothing of bytes. It refuses to write on once the response has ended.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from forebay.dialects.answer import Progress, count
from forebay.dialects.openai.call import Thread
from forebay.errors import ForebayError, RequestCancelled
from forebay.inference import Usage

Event = dict[str, Any]
_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


@dataclass(slots=True)
class _Item:
    """One item of the output while it is written."""

    kind: Literal["reasoning", "message", "function_call"]
    id: str
    index: int
    text: list[str] = field(default_factory=list)  # or the arguments of a call
    logprobs: list[Any] = field(default_factory=list)
    call_id: str = ""
    name: str = ""
    told: bool = False  # whether the event that begins a call is out

    def part(self, text: str) -> dict[str, Any]:
        """Its one part, with `text` in it."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs}

    def shown(self, status: str) -> dict[str, Any]:
        """The item as it is now; nothing is in it before its end."""
        begun = status == "in_progress"
        text = "" if begun else "".join(self.text)
        head = {"id": self.id, "type": self.kind, "status": status}
        if self.kind == "function_call":
            return {**head, "call_id": self.call_id, "name": self.name, "arguments": text}
        content = [] if begun else [self.part(text)]
        if self.kind == "reasoning":
            return {**head, "summary": [], "content": content}
        return {**head, "role": "assistant", "content": content}


class ResponseWriter:
    """One response on its way."""

    def __init__(self, head: dict[str, Any], thread: Thread | None, response_id: str, *, logprobs: bool) -> None:
        self.result: dict[str, Any] | None = None
        self._head = head
        self._id = response_id
        self._own = response_id.removeprefix("resp_")
        self._thread = thread
        self._logprobs = logprobs
        self._created_at = thread.created_at if thread is not None else None
        self._items: list[_Item] = []
        self._closed: dict[int, dict[str, Any]] = {}
        self._text: _Item | None = None  # the message or reasoning that is being written
        self._calls: dict[int, _Item] = {}  # by the engine's index
        self._begun = False
        self._finish = ""
        self._reasoning_tokens = 0

    @property
    def has_content(self) -> bool:
        """Whether anything has been said."""
        return bool(self._items)

    def take(self, chunk: dict[str, Any]) -> list[Event]:
        """The events that a chunk of a chat stream means."""
        events = self._begin(chunk)
        details = (chunk.get("usage") or {}).get("completion_tokens_details")
        if isinstance(details, dict):
            self._reasoning_tokens = count(details.get("reasoning_tokens"))
        for choice in chunk["choices"]:
            delta = choice.get("delta") or {}
            events += self._say("reasoning", delta.get("reasoning_content"))
            events += self._say("message", delta.get("content"), choice.get("logprobs"))
            for call in delta.get("tool_calls") or ():
                events += self._call(call)
            self._finish = choice.get("finish_reason") or self._finish
        return events

    def end(self, progress: Progress) -> list[Event]:
        """The engine has said all: what is open is closed, and the response is whole."""
        events = self._begin({})
        why = _INCOMPLETE.get(self._finish)
        if not self._items:
            events += self._open("message")[1]
        events += self._close_all("incomplete" if why else "completed")
        self.result = self.shown(
            "incomplete" if why else "completed",
            incomplete_details={"reason": why} if why else None,
            usage=_usage(progress.used, self._reasoning_tokens),
            completed_at=None if why or self._thread is None else int(self._thread.now()),
        )
        return [*events, {"type": f"response.{self.result['status']}", "response": self.result}]

    def fail(self, error: ForebayError) -> list[Event]:
        """Something went wrong: what is there is kept, and the response has failed or is cancelled."""
        events = self._begin({})
        cancelled = isinstance(error, RequestCancelled)
        for item in self._items:
            self._closed.setdefault(item.index, item.shown("incomplete"))
        facts = None if cancelled else {"code": error.code, "message": str(error)}
        self.result = self.shown("cancelled" if cancelled else "failed", error=facts)
        told = [] if facts is None else [{"type": "error", **facts, "param": error.param}]
        return [*events, *told, {"type": "response.failed", "response": self.result}]

    def shown(self, status: str, **facts: Any) -> dict[str, Any]:
        """The response object; what is not finished is not in it."""
        return {
            "id": self._id,
            "object": "response",
            "created_at": int(self._created_at or 0),
            "status": status,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": [self._closed[index] for index in sorted(self._closed)],
            "usage": None,
            **self._head,
            **facts,
        }

    def _begin(self, chunk: dict[str, Any]) -> list[Event]:
        if self._begun:
            return []
        self._begun = True
        if self._created_at is None:
            self._created_at = count(chunk.get("created"))
        shown = self.shown("in_progress")
        return [{"type": "response.created", "response": shown}, {"type": "response.in_progress", "response": shown}]

    def _open(self, kind: Literal["reasoning", "message", "function_call"]) -> tuple[_Item, list[Event]]:
        """A new item, and the events that begin it; those of a call come once its name is known."""
        index = len(self._items)
        item = _Item(kind, f"{_PREFIXES[kind]}_{self._own}_{index}", index)
        self._items.append(item)
        if kind == "function_call":
            return item, []
        self._text = item
        place = {"item_id": item.id, "output_index": index, "content_index": 0}
        return item, [
            {"type": "response.output_item.added", "output_index": index, "item": item.shown("in_progress")},
            {"type": "response.content_part.added", **place, "part": item.part("")},
        ]

    def _say(self, kind: Literal["reasoning", "message"], text: Any, logprobs: Any = None) -> list[Event]:
        if not isinstance(text, str) or not text:
            return []
        events: list[Event] = []
        if self._text is None or self._text.kind != kind:
            events += self._close_text()
            events += self._open(kind)[1]
        item = self._text
        assert item is not None
        item.text.append(text)
        place = {"item_id": item.id, "output_index": item.index, "content_index": 0}
        if kind == "reasoning":
            return [*events, {"type": "response.reasoning_text.delta", **place, "delta": text}]
        found = _logprobs(logprobs) if self._logprobs else []
        item.logprobs = [*item.logprobs, *found] if found else item.logprobs
        return [*events, {"type": "response.output_text.delta", **place, "delta": text, "logprobs": found}]

    def _call(self, wire: dict[str, Any]) -> list[Event]:
        number, function = count(wire.get("index")), wire.get("function") or {}
        events: list[Event] = []
        item = self._calls.get(number)
        if item is None:
            events += self._close_text()
            item, _ = self._open("function_call")
            self._calls[number] = item
        item.call_id = item.call_id or wire.get("id") or f"call_{self._own}_{item.index}"
        item.name += function.get("name") or ""
        arguments = function.get("arguments") or ""
        if item.name or arguments:
            events += self._tell_call(item)
        if arguments:
            item.text.append(arguments)
            place = {"item_id": item.id, "output_index": item.index}
            events.append({"type": "response.function_call_arguments.delta", **place, "delta": arguments})
        return events

    def _tell_call(self, item: _Item) -> list[Event]:
        """The event that begins a call, once."""
        if item.told:
            return []
        item.told = True
        return [{"type": "response.output_item.added", "output_index": item.index, "item": item.shown("in_progress")}]

    def _close_text(self) -> list[Event]:
        """Close the text that is being written; calls stay open, since engines come back to them."""
        text, self._text = self._text, None
        return [] if text is None else self._close(text, "completed")

    def _close_all(self, status: str) -> list[Event]:
        """Close what is open; only the last item can be cut short."""
        open_items = [item for item in self._items if item.index not in self._closed]
        events: list[Event] = []
        for item in open_items:
            events += self._close(item, status if item is self._items[-1] else "completed")
        return events

    def _close(self, item: _Item, status: str) -> list[Event]:
        shown = self._closed[item.index] = item.shown(status)
        text = "".join(item.text)
        place: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
        done = {"type": "response.output_item.done", "output_index": item.index, "item": shown}
        if item.kind == "function_call":
            whole = {"type": "response.function_call_arguments.done", **place, "name": item.name, "arguments": text}
            return [*self._tell_call(item), whole, done]
        place["content_index"] = 0
        part = {"type": "response.content_part.done", **place, "part": item.part(text)}
        if item.kind == "reasoning":
            return [{"type": "response.reasoning_text.done", **place, "text": text}, part, done]
        said = {"type": "response.output_text.done", **place, "text": text, "logprobs": item.logprobs}
        return [said, part, done]


def _logprobs(wire: Any) -> list[dict[str, Any]]:
    content = wire.get("content") if isinstance(wire, dict) else None
    return [_logprob(entry) | {"top_logprobs": _tops(entry)} for entry in content or () if isinstance(entry, dict)]


def _tops(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [_logprob(top) for top in entry.get("top_logprobs") or () if isinstance(top, dict)]


def _logprob(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "token": entry.get("token") or "",
        "bytes": entry.get("bytes") or [],
        "logprob": entry.get("logprob") or 0.0,
    }


def _usage(usage: Usage, reasoning_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }
