"""POST /v1/completions: the body that we accept, and the engine's body made from it.

It refuses `best_of` above `n`, `suffix` and fan-out over more prompts than the model has slots.
"""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag
from pydantic_core import to_json

from forebay.dialects.openai.call import Call, Context, Sampling, check_places, engine_fields, tier_of
from forebay.dialects.openai.events import GENERATION
from forebay.errors import InvalidRequest
from forebay.inference import Capability, Request

PROMPTS_MAX = 64
TOKEN_IDS_MAX = 1_048_576
_Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Tokens = Annotated[tuple[_Token, ...], Field(min_length=1, max_length=TOKEN_IDS_MAX, fail_fast=True)]
_Texts = Annotated[tuple[str, ...], Field(min_length=1, max_length=PROMPTS_MAX, fail_fast=True)]
_TokenLists = Annotated[tuple[_Tokens, ...], Field(min_length=1, max_length=PROMPTS_MAX, fail_fast=True)]


def _form_of(prompt: Any) -> str:
    """The form of `prompt` by its first item: trying all forms on millions of items would take minutes."""
    if not isinstance(prompt, list | tuple):
        return "str"
    first = prompt[0] if prompt else ""
    return "texts" if isinstance(first, str) else "token_lists" if isinstance(first, list | tuple) else "tokens"


_Prompt = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[_Texts, Tag("texts")]
    | Annotated[_Tokens, Tag("tokens")]
    | Annotated[_TokenLists, Tag("token_lists")],
    Discriminator(_form_of),
]


class CompletionBody(Sampling):
    """The body of POST /v1/completions."""

    prompt: _Prompt
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=8)] | None = None
    echo: bool | None = None
    suffix: str | None = None


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
        GENERATION,
        legacy_logprobs=body.logprobs is not None,
    )


def _check(body: CompletionBody) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest("`best_of` is not supported; leave it out.", param="best_of")
    if body.suffix:
        raise InvalidRequest("`suffix` is not supported; leave it out.", param="suffix")
    if body.echo:
        raise InvalidRequest("`echo` is not supported; leave it out.", param="echo")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("`stream_options` needs `stream` to be true.", param="stream_options")
