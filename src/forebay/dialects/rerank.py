"""POST /v1/rerank in the shape of Jina and POST /v2/rerank in that of Cohere: one request, one way to score, two answers.

Scores come from a model that reads query and document together. It refuses to pass the similarity of two embeddings off
as such a score: that has to be asked for by name.
"""

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag
from pydantic_core import to_json

from forebay.dialects.items import Contents, Item, Part, answer_of, floats_of, read_vectors, tokens_of, usage_of
from forebay.dialects.openai import embeddings
from forebay.dialects.openai.call import Call, Context, Wire
from forebay.errors import EngineGarbled, InvalidRequest
from forebay.inference import Capability, Usage

PATH = "/v1/rerank"
COHERE_PATH = "/v2/rerank"
DOCUMENTS_MAX = 10_000
BI_ENCODER = "bi-encoder"
_DOCUMENTS_PER_UNIT = 100  # of Cohere's search units


class TextDocument(Wire):
    """A document as an object."""

    text: str


def _form_of(value: Any) -> str:
    return "str" if isinstance(value, str) else "text"


_Document = Annotated[Annotated[str, Tag("str")] | Annotated[TextDocument, Tag("text")], Discriminator(_form_of)]


class _Reranking(Wire):
    """What both shapes share. `mode`, `raw_scores` and `truncate` are ours."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[tuple[_Document, ...], Field(min_length=1, max_length=DOCUMENTS_MAX, fail_fast=True)]
    top_n: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    mode: Literal["cross-encoder", "bi-encoder"] | None = None
    raw_scores: bool | None = None
    truncate: bool | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The documents as texts."""
        return tuple(each if isinstance(each, str) else each.text for each in self.documents)


class RerankBody(_Reranking):
    """The body of POST /v1/rerank."""

    user: Annotated[str, Field(max_length=512)] | None = None


class CohereBody(_Reranking):
    """The body of POST /v2/rerank. `priority` changes nothing here."""

    priority: Annotated[int, Field(ge=0, le=999)] | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """How scores become an answer."""

    id: str
    model: str
    texts: tuple[str, ...]
    top: int
    shows: bool
    cohere: bool

    def render(self, scores: Sequence[float], usage: Usage) -> Iterator[bytes]:
        """The best first; among equals the one that came first."""
        order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))[: self.top]
        yield self._head()
        for number, place in enumerate(order):
            result: dict[str, Any] = {"index": place, "relevance_score": scores[place]}
            if self.shows:
                result["document"] = {"text": self.texts[place]}
            yield (b"," if number else b"") + to_json(result)
        yield b"]," + to_json(self._foot(usage))[1:]

    def _head(self) -> bytes:
        if self.cohere:
            return b'{"id":%b,"results":[' % to_json(self.id)
        return b'{"model":%b,"object":"list","results":[' % to_json(self.model)

    def _foot(self, usage: Usage) -> dict[str, Any]:
        if not self.cohere:
            return {"usage": {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.total_tokens}}
        units = -(-len(self.texts) // _DOCUMENTS_PER_UNIT)
        meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": units}}
        return {"meta": {**meta, "tokens": {"input_tokens": usage.prompt_tokens, "output_tokens": 0}}}


@dataclass(frozen=True, slots=True)
class Scores:
    """Documents and the scores that a model is to give them. The query is a part of what each is computed from."""

    contents: Contents
    ranking: Ranking
    sigmoid: bool

    def param_of(self, place: int | None) -> str:
        """`documents`, or one of several."""
        return self.contents.param_of(place)

    def read(self, raw: bytes, places: int) -> Part:
        """The scores in an engine's answer, ours or in the shape of Jina."""
        answer = answer_of(raw)
        scores = answer["scores"] if "scores" in answer else _by_place(answer.get("results"), places)
        if not isinstance(scores, list) or len(scores) != places or not all(map(_is_score, scores)):
            raise EngineGarbled
        usage = usage_of(answer)
        tokens = tokens_of(answer, places, usage)
        items = (Item(array("d", [score]).tobytes(), each) for score, each in zip(scores, tokens, strict=True))
        return Part(items, usage)

    def render(self, items: Sequence[Item], usage: Usage) -> Iterator[bytes]:
        """The answer, a document at a time."""
        scores = []
        for item in items:
            score = array("d", item.value)[0]
            scores.append(_sigmoid(score) if self.sigmoid else score)
            yield b""
        yield from self.ranking.render(scores, usage)


@dataclass(frozen=True, slots=True)
class Similarities:
    """A query and documents that are to be compared by their embeddings. The query is the first content."""

    contents: Contents
    ranking: Ranking
    raw: bool

    def param_of(self, place: int | None) -> str:
        """`query`, which comes first, or `documents` or one of them."""
        if place == 0:
            return "query"
        return "documents" if place is None else f"documents[{place - 1}]"

    def read(self, raw: bytes, places: int) -> Part:
        """The vectors in an engine's answer."""
        return read_vectors(raw, places)

    def render(self, items: Sequence[Item], usage: Usage) -> Iterator[bytes]:
        """The answer, a document at a time."""
        query = floats_of(items[0].value)
        length = math.hypot(*query)
        scores = []
        for item in items[1:]:
            document = floats_of(item.value)
            if len(document) != len(query):
                raise EngineGarbled
            both = length * math.hypot(*document)
            cosine = min(1.0, max(-1.0, sum(map(mul, query, document)) / both)) if both else 0.0
            scores.append(cosine if self.raw else (1 + cosine) / 2)
            yield b""
        yield from self.ranking.render(scores, usage)


def capability_for(body: _Reranking) -> Capability:
    """What a model needs for `body`."""
    return Capability.EMBEDDING if body.mode == BI_ENCODER else Capability.RERANK


def rerank_call(body: RerankBody, context: Context) -> Call:
    """The call that a body in the shape of Jina asks for. Raises InvalidRequest."""
    return _call(body, context, cohere=False, truncate=body.truncate or body.max_tokens_per_doc is not None)


def cohere_call(body: CohereBody, context: Context) -> Call:
    """The call that a body in the shape of Cohere asks for, where documents are cut by default. Raises InvalidRequest."""
    truncate = context.items.truncation is not None if body.truncate is None else body.truncate
    return _call(body, context, cohere=True, truncate=truncate)


def _call(body: _Reranking, context: Context, *, cohere: bool, truncate: bool) -> Call:
    texts, rules = body.texts, context.items
    if len(texts) > rules.documents_max:
        raise InvalidRequest(
            f"`documents` has more than {rules.documents_max} documents. Send them in several requests.",
            param="documents",
            code="invalid_value",
        )
    rules.check_size((body.query,), "query")
    rules.check_size(texts, "documents")
    top = min(body.top_n or len(texts), len(texts))
    ranking = Ranking(context.request_id, body.model, texts, top, bool(body.return_documents), cohere)
    if body.mode == BI_ENCODER:
        return _compare(body, context, ranking, truncate=truncate)
    if body.raw_scores and not rules.logits:
        raise InvalidRequest(
            "The engine of this model gives scores between 0 and 1 alone. Leave `raw_scores` out.",
            param="raw_scores",
            code="capability_not_supported",
        )
    fields = {"model": context.remote_model or body.model, "query": body.query, **rules.truncating(truncate)}
    contents = Contents(context.project, body.model, rules, "documents", fields, texts)
    scores = Scores(contents, ranking, sigmoid=rules.logits and not body.raw_scores)
    return embeddings.call_for(contents, scores, context, PATH, Capability.RERANK)


def _compare(body: _Reranking, context: Context, ranking: Ranking, *, truncate: bool) -> Call:
    if "" in ranking.texts:
        raise InvalidRequest("An empty document has no embedding.", param="documents", code="invalid_value")
    fields = embeddings.embedding_fields(context, body.model, truncate, "document")
    asking = embeddings.embedding_fields(context, body.model, truncate, "query")
    both, first = (body.query, *ranking.texts), asking if asking != fields else None
    contents = Contents(context.project, body.model, context.items, "input", fields, both, first)
    work = Similarities(contents, ranking, bool(body.raw_scores))
    return embeddings.call_for(contents, work, context, embeddings.PATH, Capability.RERANK)


def _by_place(results: Any, places: int) -> list[Any]:
    """Scores in the order of the documents. Raises EngineGarbled."""
    if not isinstance(results, list) or len(results) != places:
        raise EngineGarbled
    scores: list[Any] = [None] * places
    for result in results:
        place = result.get("index") if isinstance(result, dict) else None
        if not isinstance(place, int) or not 0 <= place < places or scores[place] is not None:
            raise EngineGarbled
        scores[place] = result.get("relevance_score")
    return scores


def _is_score(score: Any) -> bool:
    return isinstance(score, int | float) and not isinstance(score, bool) and abs(score) < 1e300


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))
