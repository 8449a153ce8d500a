"""POST /v1/embeddings: the body that we accept, the engine's body made from it, and the answer made of vectors.

It refuses to cut an input that is too long unless it is asked to, and passes on no vector of another length than was asked
for.
"""

from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag
from pydantic_core import to_json

from forebay.dialects.items import (
    DIMENSIONS_MAX,
    PART_ITEMS_MAX,
    Content,
    Contents,
    Item,
    Part,
    floats_of,
    read_vectors,
)
from forebay.dialects.openai.call import Call, Context, Wire
from forebay.dialects.openai.forms import Tokens, form_of
from forebay.dialects.whole import WHOLE
from forebay.errors import InvalidRequest
from forebay.inference import Capability, Request, Usage

PATH = "/v1/embeddings"
_FLOAT_BYTES = 4

InputType = Literal["query", "document"]
_Text = Annotated[str, Field(min_length=1)]
_Texts = Annotated[tuple[_Text, ...], Field(min_length=1, max_length=PART_ITEMS_MAX, fail_fast=True)]
_TokenLists = Annotated[tuple[Tokens, ...], Field(min_length=1, max_length=PART_ITEMS_MAX, fail_fast=True)]


_Input = Annotated[
    Annotated[_Text, Tag("str")]
    | Annotated[_Texts, Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[_TokenLists, Tag("token_lists")],
    Discriminator(form_of),
]


class EmbeddingBody(Wire):
    """The body of POST /v1/embeddings. `truncate` and `input_type` are ours."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: _Input
    dimensions: Annotated[int, Field(ge=1, le=DIMENSIONS_MAX)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    truncate: bool | None = None
    input_type: InputType | None = None

    @property
    def contents(self) -> tuple[Content, ...]:
        """The inputs, each for itself."""
        if isinstance(self.input, str):
            return (self.input,)
        if isinstance(self.input[0], int):
            return (self.input,)  # a list of tokens is one input
        return self.input


@dataclass(frozen=True, slots=True)
class Vectors:
    """The inputs of a call and the vectors that are to be made of them."""

    contents: Contents
    dimensions: int | None
    base64: bool

    def param_of(self, place: int | None) -> str:
        """`input`, or one of several."""
        return self.contents.param_of(place)

    def read(self, raw: bytes, places: int) -> Part:
        """The vectors in an engine's answer."""
        part = read_vectors(raw, places)
        return Part((self._checked(item) for item in part.items), part.usage)

    def render(self, items: Sequence[Item], usage: Usage) -> Iterator[bytes]:
        """The answer, a vector at a time."""
        yield b'{"object":"list","data":['
        for index, item in enumerate(items):
            vector = b'"' + b64encode(item.value) + b'"' if self.base64 else to_json(floats_of(item.value).tolist())
            yield b'%b{"object":"embedding","index":%d,"embedding":%b}' % (b"," if index else b"", index, vector)
        used = to_json({"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.total_tokens})
        yield b'],"model":%b,"usage":%b}' % (to_json(self.contents.model), used)

    def _checked(self, item: Item) -> Item:
        if self.dimensions is not None and len(item.value) != self.dimensions * _FLOAT_BYTES:
            raise InvalidRequest(
                f"This model has {len(item.value) // _FLOAT_BYTES} dimensions and no fewer. Leave `dimensions` out.",
                param="dimensions",
                code="capability_not_supported",
            )
        return item


def embedding_fields(
    context: Context, model: str, truncate: bool | None, input_type: InputType | None
) -> dict[str, Any]:
    """The engine's body without its input. The type of an input is for models that it makes a difference to."""
    fields = {"model": context.remote_model or model, "encoding_format": "base64"}
    if input_type is not None and context.items.input_types:
        fields["input_type"] = input_type
    return {**fields, **context.items.truncating(truncate)}


def embedding_call(body: EmbeddingBody, context: Context) -> Call:
    """The call that `body` asks for. Raises InvalidRequest."""
    rules, inputs = context.items, body.contents
    if len(inputs) > rules.inputs_max:
        raise InvalidRequest(
            f"`input` has more than {rules.inputs_max} inputs. Send them in several requests.",
            param="input",
            code="invalid_value",
        )
    rules.check_size(inputs, "input")
    fields = embedding_fields(context, body.model, body.truncate, body.input_type)
    if body.dimensions is not None:
        fields["dimensions"] = body.dimensions
    contents = Contents(context.project, body.model, rules, "input", fields, inputs)
    vectors = Vectors(contents, body.dimensions, body.encoding_format == "base64")
    return call_for(contents, vectors, context, PATH, Capability.EMBEDDING)


def call_for(contents: Contents, items: Any, context: Context, path: str, capability: Capability) -> Call:
    """A call whose answer is put together from `items`."""
    request = Request(
        id=context.request_id,
        project=context.project,
        model=contents.model,
        capability=capability,
        path=path,
        body=contents.body_for(),
        traceparent=context.traceparent,
    )
    return Call(request, "items", stream=False, include_usage=False, tier="default", shape=WHOLE, items=items)
