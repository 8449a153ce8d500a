"""Tokens and nothing more: POST /tokenize and /detokenize, and how an engine's one JSON answer to such a question is read.

It refuses engines that have no way to say; it counts nothing by itself.
"""

from typing import Annotated, Any

from pydantic import Field
from pydantic_core import from_json, to_json

from forebay.dialects.answer import Progress
from forebay.dialects.openai.call import Call, Context, Wire
from forebay.dialects.openai.events import Generation
from forebay.dialects.openai.forms import TOKEN_IDS_MAX, Token
from forebay.errors import EngineGarbled, InvalidRequest
from forebay.inference import Capability, Request, Usage

TOKENIZE_PATH = "/tokenize"
DETOKENIZE_PATH = "/detokenize"
ANSWER_BYTES_MAX = 64 * 2**20
_COUNT_PATHS = {"llama.cpp": "/v1/chat/completions/input_tokens", "vllm": TOKENIZE_PATH}
_Model = Annotated[str, Field(min_length=1, max_length=256)]


class TokenizeBody(Wire):
    """The body of POST /tokenize: `content` as llama.cpp calls the text, or `prompt` as vLLM does."""

    model: _Model
    content: str | None = None
    prompt: str | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(Wire):
    """The body of POST /detokenize."""

    model: _Model
    tokens: Annotated[tuple[Token, ...], Field(max_length=TOKEN_IDS_MAX, fail_fast=True)]


def count_path(context: Context) -> str:
    """Where the engine counts the tokens of a chat. Raises InvalidRequest if it does not."""
    return _COUNT_PATHS[_tokenizer(context)]


def tokenize_call(body: TokenizeBody, context: Context) -> Call:
    """The call that asks for the tokens of a text. Raises InvalidRequest."""
    text = body.content if body.prompt is None else body.prompt
    if text is None or (body.content is not None and body.prompt is not None):
        raise InvalidRequest("Send `content` or `prompt`, and not both.", param="content")
    special = bool(body.add_special or body.add_special_tokens)
    fields = (
        {"content": text, "add_special": special, "parse_special": True}
        if _tokenizer(context) == "llama.cpp"
        else {"model": context.remote_model or body.model, "prompt": text, "add_special_tokens": special}
    )
    return _call(TOKENIZE_PATH, fields, body.model, context)


def detokenize_call(body: DetokenizeBody, context: Context) -> Call:
    """The call that asks for the text of tokens. Raises InvalidRequest."""
    _tokenizer(context)
    return _call(
        DETOKENIZE_PATH, {"model": context.remote_model or body.model, "tokens": body.tokens}, body.model, context
    )


class TokensGatherer:
    """Takes an engine's JSON answer in, and gives what was asked for in our words."""

    def __init__(self, call: Call) -> None:
        self.progress = Progress()
        self._model = call.request.model
        self._parts: list[bytes] = []
        self._bytes = 0

    def feed(self, data: bytes) -> None:
        """Take in `data`. Raises EngineGarbled for more than any list of tokens can be."""
        self._bytes += len(data)
        if self._bytes > ANSWER_BYTES_MAX:
            raise EngineGarbled
        self._parts.append(data)

    def body(self) -> bytes:
        """The tokens or the text. Raises EngineGarbled if neither is there."""
        answer = self.answer()
        if isinstance(tokens := answer.get("tokens"), list) and all(isinstance(token, int) for token in tokens):
            return to_json({"object": "tokens", "model": self._model, "tokens": tokens, "count": len(tokens)})
        text = answer.get("content", answer.get("prompt"))
        if not isinstance(text, str):
            raise EngineGarbled
        return to_json({"object": "text", "model": self._model, "content": text, "prompt": text})

    def count(self) -> int:
        """How many tokens there are, where that was the question. Raises EngineGarbled if it does not say."""
        answer = self.answer()
        count = answer.get("input_tokens", answer.get("count"))
        if not isinstance(count, int) or count < 0:
            raise EngineGarbled
        return count

    def answer(self) -> dict[str, Any]:
        """The JSON object of the engine. Raises EngineGarbled for anything else."""
        try:
            answer = from_json(b"".join(self._parts))
        except ValueError:
            raise EngineGarbled from None
        if not isinstance(answer, dict):
            raise EngineGarbled
        self.progress.usage = Usage()  # it has written nothing
        return answer


class Tokens(Generation):
    """The shape of /tokenize and /detokenize, which are never streamed."""

    def gatherer(self, call: Call) -> TokensGatherer:  # type: ignore[override]  # no stream to put together
        """For a whole body."""
        return TokensGatherer(call)


TOKENS = Tokens()


def _tokenizer(context: Context) -> str:
    if context.extensions is None:
        raise InvalidRequest(
            "The engine of this model does not count tokens for others.", param="model", code="capability_not_supported"
        )
    return context.extensions


def _call(path: str, fields: dict[str, Any], model: str, context: Context) -> Call:
    request = Request(
        id=context.request_id,
        project=context.project,
        model=model,
        capability=Capability.COMPLETION,
        path=path,
        body=to_json(fields),
        traceparent=context.traceparent,
    )
    return Call(request, "completion", False, False, "default", TOKENS)
