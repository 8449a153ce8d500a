"""POST /v1/completions: the body that we accept, and the engine's body made from it.

It refuses `best_of` above `n`, `suffix`, `echo` of what is no text or with log probabilities, and fan-out over more prompts than
the model has slots.
"""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag
from pydantic_core import to_json

from forebay.dialects.openai.call import Call, Context, Sampling, check_places, engine_fields, tier_of
from forebay.dialects.openai.events import GENERATION, Generation, GenerationGatherer, GenerationRelay
from forebay.dialects.openai.forms import Tokens, form_of
from forebay.errors import InvalidRequest
from forebay.inference import Capability, Request

PROMPTS_MAX = 64
_Texts = Annotated[tuple[str, ...], Field(min_length=1, max_length=PROMPTS_MAX, fail_fast=True)]
_TokenLists = Annotated[tuple[Tokens, ...], Field(min_length=1, max_length=PROMPTS_MAX, fail_fast=True)]


_Prompt = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[_Texts, Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[_TokenLists, Tag("token_lists")],
    Discriminator(form_of),
]


class CompletionBody(Sampling):
    """The body of POST /v1/completions."""

    prompt: _Prompt
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=8)] | None = None
    echo: bool | None = None
    suffix: str | None = None


class Echo(Generation):
    """The shape of completions that begin with their prompt. Engines do not send it back, so it is put there."""

    def __init__(self, prompts: tuple[str, ...], choices: int) -> None:
        self._texts = [prompt for prompt in prompts for _ in range(choices)]

    def relay(self, call: Call, *, rename: bool) -> GenerationRelay:
        """For a stream."""
        return _EchoRelay(call, self._texts, rename=rename)

    def gatherer(self, call: Call) -> GenerationGatherer:
        """For a whole body."""
        return _EchoGatherer(call, self._texts)


class _EchoRelay(GenerationRelay):
    def __init__(self, call: Call, texts: list[str], *, rename: bool) -> None:
        super().__init__(call, rename=rename)
        self._texts = texts

    def render(self, event: dict[str, Any]) -> bytes:
        """`event`, and before the first one the prompts."""
        texts, self._texts = self._texts, []
        if not texts:
            return super().render(event)
        plain = {"finish_reason": None, "logprobs": None}
        choices = [{"index": index, "text": text, **plain} for index, text in enumerate(texts)]
        return super().render({**event, "choices": choices, "usage": None}) + super().render(event)


class _EchoGatherer(GenerationGatherer):
    def __init__(self, call: Call, texts: list[str]) -> None:
        super().__init__(call)
        self._texts = texts

    def text_of(self, index: int, text: str) -> str:
        """What the choice says, after its prompt."""
        return self._texts[index] + text


def completion_call(body: CompletionBody, context: Context) -> Call:
    """The call that `body` asks for. Raises InvalidRequest."""
    _check(body)
    prompts = len(body.prompt) if isinstance(body.prompt, tuple) and not isinstance(body.prompt[0], int) else 1
    places = prompts * (body.n or 1)
    check_places(places, context, "prompt" if prompts > 1 else "n")
    fields = engine_fields(body, context)
    fields["prompt"] = body.prompt
    if body.logprobs is not None:
        fields["logprobs"] = body.logprobs
    tier, priority = tier_of(body)
    request = Request(
        id=context.request_id,
        project=context.project,
        model=body.model,
        capability=Capability.COMPLETION,
        path="/v1/completions",
        body=to_json(fields),
        priority=priority,
        places=places,
        traceparent=context.traceparent,
    )
    options = body.stream_options
    return Call(
        request,
        "completion",
        bool(body.stream),
        bool(options and options.include_usage),
        tier,
        Echo(_texts_of(body.prompt), body.n or 1) if body.echo else GENERATION,
        legacy_logprobs=body.logprobs is not None,
    )


def _check(body: CompletionBody) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest("`best_of` is not supported; leave it out.", param="best_of")
    if body.suffix:
        raise InvalidRequest("`suffix` is not supported; leave it out.", param="suffix")
    if body.echo and (body.logprobs is not None or not _texts_of(body.prompt)):
        raise InvalidRequest("`echo` is for prompts that are texts, without `logprobs`.", param="echo")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("`stream_options` needs `stream` to be true.", param="stream_options")


def _texts_of(prompt: Any) -> tuple[str, ...]:
    """The prompts that are texts: all of them or none."""
    return (prompt,) if isinstance(prompt, str) else tuple(each for each in prompt if isinstance(each, str))
