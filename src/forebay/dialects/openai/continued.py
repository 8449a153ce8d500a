"""A generation that was stopped and goes on: the engine is asked for the rest, and both parts become one answer.

It refuses to join what the engine has not shown to be one: a text that is read again may be cut into other tokens than it
was written in, and what is computed in one step differs in its last bits from what was computed token by token. So the
engine has to count the same tokens, and to have had all of them but the last in its cache.
"""

from dataclasses import dataclass, replace
from typing import Any

from pydantic_core import from_json, to_json

from forebay.dialects.answer import count
from forebay.dialects.openai.call import Call
from forebay.dialects.openai.events import GENERATION, Generation, GenerationGatherer
from forebay.errors import EngineGarbled, Preempted
from forebay.inference import Usage

_BORDER_EVENTS = 16  # at the end of a text, among which a border of words is looked for


@dataclass(frozen=True, slots=True)
class Written:
    """What a stopped generation had written: `tokens` of it are `text`. The others say what it had read for it."""

    text: str
    tokens: int
    prompt_tokens: int
    cached_tokens: int


def can_continue(call: Call) -> bool:
    """Whether the answer is one plain text that comes out the same each time, so that its parts can be joined."""
    request = call.request
    if call.shape is not GENERATION or request.places != 1 or request.tools or call.forced_tool or call.image_chars:
        return False
    body = from_json(request.body)
    if body.get("temperature") != 0 or "logprobs" in body:
        return False
    if body.get("response_format", {"type": "text"})["type"] != "text":
        return False
    if call.kind == "chat":
        return bool(body["messages"][-1]["role"] != "assistant")  # that one would be gone on with
    return isinstance(body["prompt"], str)


class Continued(Generation):
    """The shape of an answer of which a part may be `before`, and of which a part is kept if it is stopped."""

    def __init__(self, before: Written | None) -> None:
        self.before = before
        self._gatherer: ContinuedGatherer | None = None
        self._prompt_estimate = 0  # of the call from its beginning

    def of(self, call: Call) -> Call:
        """`call` in this shape, for what is left of it. It is one for which `can_continue` is true."""
        self._prompt_estimate = call.tokens_estimate
        body = from_json(call.request.body)
        body["timings_per_token"] = True
        if self.before is not None:
            body["max_tokens"] -= self.before.tokens
            if call.kind == "chat":
                body["messages"].append({"role": "assistant", "content": self.before.text})
            else:
                body["prompt"] += self.before.text
        return replace(call, request=replace(call.request, body=to_json(body)), shape=self)

    def gatherer(self, call: Call) -> GenerationGatherer:
        """For a whole body."""
        self._gatherer = ContinuedGatherer(call, self.before)
        self._gatherer.progress.prompt_estimate = self._prompt_estimate
        return self._gatherer

    @property
    def joined(self) -> bool:
        """Whether the engine has gone on with what there was before."""
        return self.before is not None and self._gatherer is not None and self._gatherer.joined

    @property
    def refused(self) -> bool:
        """Whether the engine has begun with something else than what there was before."""
        return self._gatherer is not None and self._gatherer.refused

    def written(self, tokens_min: int) -> Written | None:
        """What can be gone on with, if it is so many tokens and some are left to write."""
        found = self.before if self._gatherer is None else self._gatherer.written()
        return found if found is not None and found.tokens >= tokens_min else None


class ContinuedGatherer(GenerationGatherer):
    """Puts the rest of an answer together with what there was before; without that, the whole of it."""

    def __init__(self, call: Call, before: Written | None) -> None:
        super().__init__(call)
        self.joined = before is None
        self.refused = False
        self._before = before
        self._before_text = "" if before is None else before.text
        self._before_tokens = 0 if before is None else before.tokens
        self.progress.events = self._before_tokens
        self._tokens_max = from_json(call.request.body)["max_tokens"]
        self._read: Written | None = before
        self._pieces: list[tuple[str, int]] = []
        self._plain = True

    def note(self, event: dict[str, Any]) -> None:
        """Look at an event before it is added. Raises Preempted where the engine goes on with something else."""
        timings = event.get("timings")
        timings = timings if isinstance(timings, dict) else {}
        if timings:
            self._note_prompt(count(timings.get("prompt_n")), count(timings.get("cache_n")))
        for choice in event["choices"]:
            delta = choice.get("delta") or choice
            text = delta.get("content") or delta.get("text")
            if isinstance(text, str) and text:
                self._pieces.append((text, count(timings.get("predicted_n"))))
            if delta.get("reasoning_content") or delta.get("tool_calls"):
                self._plain = False
        used, before = self.progress.usage, self._before
        if used is not None and before is not None and event.get("usage"):
            completion = before.tokens + used.completion_tokens
            self.progress.usage = Usage(before.prompt_tokens, completion, before.cached_tokens)

    def body(self) -> bytes:
        """The whole answer as JSON. Raises EngineGarbled if there is none, or if its parts do not belong together."""
        if not self.joined:
            raise EngineGarbled
        return super().body()

    def text_of(self, index: int, text: str) -> str:
        """The choice from its beginning."""
        return self._before_text + text

    def written(self) -> Written | None:
        """What can be gone on with; None if that is nothing."""
        if self.refused or not self._plain or self._read is None:
            return None
        end = self._border()
        if end == 0:
            return self._before
        tokens = self._pieces[end - 1][1]
        if not 0 < tokens < self._tokens_max:
            return None
        text = self._before_text + "".join(piece for piece, _ in self._pieces[:end])
        return replace(self._read, text=text, tokens=self._before_tokens + tokens)

    def _note_prompt(self, computed: int, cached: int) -> None:
        if self._read is None:
            self._read = Written("", 0, computed + cached, cached)
        if self.joined or self._before is None:
            return
        # The number of tokens tells that the last one is the same as well: what comes before it is in the cache.
        if computed + cached != self._before.prompt_tokens + self._before.tokens or computed > 1:
            self.refused = True
            raise Preempted("The engine cannot go on with what it had written.")
        self.joined = True

    def _border(self) -> int:
        """The number of events to keep: up to the last whole word, for in the middle of one its tokens may be others."""
        pieces = [piece for piece, _ in self._pieces]
        least = max(0, len(pieces) - _BORDER_EVENTS)
        for end in range(len(pieces) - 1, least - 1, -1):
            last = pieces[end - 1] if end else self._before_text
            if pieces[end][0].isspace() and last and not last[-1].isspace():
                return end
        while pieces and pieces[-1][-1].isspace():
            pieces.pop()
        return len(pieces)
