"""What the fake engine answers: the directive and the request read, the tokens, the SSE events.

Pure functions of the request body; only the creation time comes from outside. It refuses to do anything: misbehaving is
`fake`'s business.

The last user message (or the prompt) may hold one directive, `[[fake k=v k=v]]`:

    tokens=N delay_ms=N token_ms=N rate=N     how much, and how fast
    echo=1 tool=NAME                          what: the words of the prompt; a call of the tool
    think=N calls=N stop=TEXT                 thoughts before it; calls of the tool; what sequence stopped it
    images=1                                  what: for each image its type, size and SHA-256
    status=NNN context_error=1                an error instead of an answer
    crash_at=N crash=segv|kill|exit oom_at=N  the process dies before token N
    hang_at=N freeze_at=N block_at=N          the answer stops; the process is stopped; it runs and turns no longer
    garbage_at=N truncate_at=N refuse_stop=1  not SSE; a cut stream; computing goes on after a cancel
"""

import base64
import hashlib
import json
import re
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

_MAX_TOKENS = 1_000_000
_DEFAULT_TOKENS = 16
_MAX_THOUGHTS = 1_000
_MARK = "<token>"
_IMAGE_TOKENS = 64
_IMAGE = re.compile(r"data:image/(png|jpeg);base64,")
DIRECTIVE = re.compile(r"\[\[fake([^\]]*)\]\]")


@dataclass(slots=True)
class Directive:
    """What one request asks of the engine. Counts below zero mean never."""

    tokens: int = -1
    delay_ms: float = 0.0
    token_ms: float = 0.0
    rate: float = 0.0
    echo: int = 0
    tool: str = ""
    calls: int = 1
    think: int = 0
    stop: str = ""
    images: int = 0
    status: int = 0
    context_error: int = 0
    crash_at: int = -1
    crash: str = "kill"
    oom_at: int = -1
    hang_at: int = -1
    freeze_at: int = -1
    block_at: int = -1
    garbage_at: int = -1
    truncate_at: int = -1
    refuse_stop: int = 0

    @property
    def interval_seconds(self) -> float:
        """Seconds from one token to the next."""
        return 1.0 / self.rate if self.rate > 0 else max(self.token_ms, 0.0) / 1000

    @property
    def troubled(self) -> bool:
        """Whether something goes wrong in the middle of the answer."""
        halts = (self.hang_at, self.freeze_at, self.block_at)
        return max(self.crash_at, self.oom_at, *halts, self.garbage_at, self.truncate_at) >= 0


_READERS: dict[str, Callable[[str], Any]] = {
    field.name: {"int": int, "float": float, "str": str, int: int, float: float, str: str}[field.type]
    for field in fields(Directive)
}


class Refused(Exception):
    """The request gets an error answer instead of tokens."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", **more: object) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"code": status, "message": message, "type": kind, **more}}


@dataclass(slots=True)
class Job:
    """One completion request, read."""

    id: str
    chat: bool
    stream: bool
    include_usage: bool
    model: str
    choices: int
    prompt_tokens: int
    words: list[str]
    finish: str
    directive: Directive
    created: int

    def usage(self) -> dict[str, Any]:
        """The token counts, as OpenAI names them."""
        done = len(self.words) * self.choices
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": done,
            "total_tokens": self.prompt_tokens + done,
            "prompt_tokens_details": {"cached_tokens": 0},
        }


def read_directive(text: str) -> Directive:
    """The directive inside `text`, or the default one."""
    directive = Directive()
    found = DIRECTIVE.search(text)
    for pair in found[1].split() if found else ():
        name, _, value = pair.partition("=")
        if name in _READERS:
            try:
                setattr(directive, name, _READERS[name](value))
            except ValueError:
                continue
    return directive


def read_job(body: bytes, chat: bool, name: str, slots: int, context: int, *, vision: bool = False) -> Job:
    """Check the request and decide its whole answer, or raise Refused."""
    try:
        wanted = json.loads(body)
        images = _images(wanted["messages"]) if chat else []
        texts = _message_texts(wanted["messages"]) if chat else _prompt_texts(wanted["prompt"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Refused(400, "The body is not a completion request.") from None
    if images and not vision:
        raise Refused(500, "image input is not supported", "server_error")
    last = texts[-1] if texts else ""
    directive = read_directive(last)
    prompt_tokens = sum(len(text.split()) for text in texts) + _IMAGE_TOKENS * len(images)
    if directive.status:
        raise Refused(directive.status, f"Asked to answer {directive.status}.", "server_error")
    if directive.context_error or prompt_tokens > context:
        message = f"request ({prompt_tokens} tokens) exceeds the available context size ({context} tokens)"
        kind = "exceed_context_size_error"
        raise Refused(400, message, kind, n_prompt_tokens=prompt_tokens, n_ctx=context)
    choices = _positive(wanted.get("n"), 1) * (1 if chat else len(_prompts(wanted["prompt"])))
    if choices > slots:
        raise Refused(400, f"{choices} choices need {choices} slots, and there are {slots}.")
    words, finish = _answer(last, directive, wanted, images)
    return Job(
        id=("chatcmpl-" if chat else "cmpl-") + hashlib.sha256(body).hexdigest()[:24],
        chat=chat,
        stream=wanted.get("stream") is True,
        include_usage=bool((wanted.get("stream_options") or {}).get("include_usage")),
        model=name,
        choices=choices,
        prompt_tokens=prompt_tokens,
        words=words,
        finish=finish,
        directive=directive,
        created=int(time.time()),
    )


def _answer(prompt: str, directive: Directive, wanted: dict[str, Any], images: list[str]) -> tuple[list[str], str]:
    """The answer's tokens and why it ends."""
    if directive.tool:
        return ["{", "}"], "tool_calls"
    source = DIRECTIVE.sub("", prompt).split() if directive.echo else images if directive.images else None
    count = directive.tokens
    if count < 0:
        count = len(source) if source is not None else _DEFAULT_TOKENS
    if source is not None:
        count = min(count, len(source))
    limit = _positive(wanted.get("max_completion_tokens") or wanted.get("max_tokens"), _MAX_TOKENS)
    ended = min(count, limit, _MAX_TOKENS)
    words = [f"{word} " for word in source[:ended]] if source is not None else [f"tok{i} " for i in range(ended)]
    return words, "length" if limit < count else "stop"


def _positive(value: object, default: int) -> int:
    return value if isinstance(value, int) and value > 0 else default


def _message_texts(messages: list[dict[str, Any]]) -> list[str]:
    """The text of every message; the last one is the last user message's."""
    texts, last = [], 0
    for message in messages:
        content = message.get("content") or ""
        parts = content if isinstance(content, list) else [{"text": content}]
        texts.append(" ".join(str(part.get("text", "")) for part in parts))
        if message.get("role") == "user":
            last = len(texts) - 1
    texts.append(texts.pop(last))
    return texts


def _images(messages: list[dict[str, Any]]) -> list[str]:
    """What is seen of every image: `png:64x48:` and the checksum of the file. Raises ValueError for what is none."""
    found = []
    for message in messages:
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else []:
            if part.get("type") == "image_url":
                url = part["image_url"]["url"]
                if (match := _IMAGE.match(url)) is None:
                    raise ValueError("an image that is not inlined")
                data = base64.b64decode(url[match.end() :], validate=True)
                size = "x".join(map(str, struct.unpack(">II", data[16:24]))) if match[1] == "png" else ""
                found.append(f"{match[1]}:{size}:{hashlib.sha256(data).hexdigest()}")
    return found


def _prompts(prompt: Any) -> list[Any]:
    return prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]


def _prompt_texts(prompt: Any) -> list[str]:
    return [each if isinstance(each, str) else " ".join(str(token) for token in each) for each in _prompts(prompt)]


def read_tokens(path: str, body: bytes) -> dict[str, Any]:
    """The answer to a question about tokens: a message has one for each word, and a text its UTF-8 bytes."""
    try:
        wanted = json.loads(body)
        if path == "/tokenize":
            return {"tokens": list(wanted["content"].encode())}
        if path == "/detokenize":
            return {"content": bytes(wanted["tokens"]).decode(errors="replace")}
        return {"input_tokens": sum(len(text.split()) for text in _message_texts(wanted["messages"]))}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Refused(400, "The body asks for no tokens.") from None


class Chunks:
    """The SSE events of one answer. The parts that every event shares are written once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        kind = "chat.completion.chunk" if job.chat else "text_completion"
        shared = {"id": job.id, "object": kind, "created": job.created, "model": job.model}
        self._open = b"data: " + json.dumps(shared)[:-1].encode() + b', "choices": ['
        sample = self._choice(0, None, content=_MARK)
        if job.directive.tool:
            sample = self._choice(0, None, tool_calls=[{"index": 0, "function": {"arguments": _MARK}}])
        before, _, self._after = sample.partition(json.dumps(_MARK).encode())
        zero = b'"choices": [{"index": 0'
        self._before = [before.replace(zero, zero[:-1] + str(i).encode()) for i in range(job.choices)]

    def _choice(self, index: int, finish: str | None, **delta: Any) -> bytes:
        inner = {"delta": delta} if self._job.chat else {"text": delta.get("content", "")}
        choice = {"index": index, **inner, "finish_reason": finish}
        if finish and self._job.directive.stop:
            choice["stop_reason"] = self._job.directive.stop
        return self._open + json.dumps(choice).encode() + b"]}\n\n"

    def begin(self) -> bytes:
        """The first event of every choice: who speaks, and for a tool call which tool."""
        job, out = self._job, b""
        if not job.chat:
            return out
        for index in range(job.choices):
            out += self._choice(index, None, role="assistant", content=None)
            for thought in thoughts(job.directive):
                out += self._choice(index, None, reasoning_content=thought)
            if job.directive.tool:
                out += self._choice(index, None, tool_calls=[{"index": 0, **tool_call(job, 0, "")}])
        return out

    def token(self, word: str) -> bytes:
        """One token, for every choice."""
        text = json.dumps(word).encode()
        return b"".join([before + text + self._after for before in self._before])

    def end(self) -> bytes:
        """Why each choice ended, the usage if asked for, and the end mark."""
        out = b""
        for index in range(self._job.choices):
            for number in range(1, self._job.directive.calls if self._job.directive.tool else 0):
                out += self._choice(index, None, tool_calls=[{"index": number, **tool_call(self._job, number, "{}")}])
            out += self._choice(index, self._job.finish)
        if self._job.include_usage:
            out += self._open + b'], "usage": ' + json.dumps(self._job.usage()).encode() + b"}\n\n"
        return out + b"data: [DONE]\n\n"


def thoughts(directive: Directive) -> list[str]:
    """What it thinks before it answers."""
    return [f"hm{index} " for index in range(min(directive.think, _MAX_THOUGHTS))]


def tool_call(job: Job, number: int, arguments: str) -> dict[str, Any]:
    """One call of the tool."""
    identity = f"call_{job.id[-24:]}" + (f"_{number}" if number else "")
    return {"id": identity, "type": "function", "function": {"name": job.directive.tool, "arguments": arguments}}


def whole_answer(job: Job) -> bytes:
    """The answer as one JSON body."""
    text = "".join(job.words)
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if job.directive.tool:
        calls = [tool_call(job, 0, text), *(tool_call(job, number, "{}") for number in range(1, job.directive.calls))]
        message = {"role": "assistant", "content": None, "tool_calls": calls}
    if job.directive.think > 0:
        message["reasoning_content"] = "".join(thoughts(job.directive))
    inner = {"message": message} if job.chat else {"text": text}
    choices = [{"index": index, **inner, "finish_reason": job.finish} for index in range(job.choices)]
    kind = "chat.completion" if job.chat else "text_completion"
    answer = {"id": job.id, "object": kind, "created": job.created, "model": job.model}
    return json.dumps({**answer, "choices": choices, "usage": job.usage()}).encode()
