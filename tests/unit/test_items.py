"""Embeddings and rankings on the wire: forms of input, digests, what an engine may answer, and how it is written."""

import json
import math
import time
from array import array
from base64 import b64encode
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.dialects.items import Item, ItemRules, Items
from forebay.dialects.openai.call import Call, Context, parse
from forebay.dialects.openai.embeddings import EmbeddingBody, embedding_call
from forebay.dialects.rerank import CohereBody, RerankBody, cohere_call, rerank_call
from forebay.dialects.whole import WHOLE
from forebay.errors import EngineGarbled, ForebayError, InvalidRequest
from forebay.inference import Usage

RULES = ItemRules("print", counted=True, truncation=("truncate", True), logits=True)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)
VECTORS = st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=5)
TEXTS = st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=8)


def context(rules: ItemRules = RULES, project: str = "web") -> Context:
    return Context("req_1", project, None, 16, 4, items=rules)


def embedding(rules: ItemRules = RULES, project: str = "web", **fields: Any) -> Call:
    body = parse(EmbeddingBody, json.dumps({"model": "m", **fields}).encode())
    return embedding_call(body, context(rules, project))


def ranking(rules: ItemRules = RULES, **fields: Any) -> Call:
    body = parse(RerankBody, json.dumps({"model": "m", "query": "q", "documents": ["a", "b"], **fields}).encode())
    return rerank_call(body, context(rules))


def items_of(call: Call) -> Items:
    assert call.items is not None
    return call.items


def packed(vector: list[float]) -> str:
    return b64encode(array("f", vector).tobytes()).decode()


def answer(vectors: list[Any], **fields: Any) -> bytes:
    data = [{"index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    return json.dumps({"data": data, "usage": {"prompt_tokens": 7}, **fields}).encode()


def written(items: Items, found: list[Item], usage: Usage | None = None) -> Any:
    return json.loads(b"".join(items.render(found, usage or Usage(3))))


@given(TEXTS)
def test_equal_contents_and_no_others_have_equal_digests(texts: list[str]) -> None:
    digests = list(items_of(embedding(input=texts)).contents.digests())
    assert len(set(digests)) == len(set(texts))
    assert [digests.index(each) for each in digests] == [texts.index(each) for each in texts]


def test_a_digest_is_of_one_project_model_and_way_to_compute() -> None:
    calls = [
        embedding(input="a"),
        embedding(input="a", project="other"),
        embedding(ItemRules("another print", counted=True, truncation=("truncate", True)), input="a"),
        embedding(input="a", dimensions=3),
        embedding(input="a", truncate=True),
        embedding(input=[97]),
        ranking(documents=["a"]),
        ranking(documents=["a"], query="another"),
    ]
    digests = [next(items_of(call).contents.digests()) for call in calls]
    assert len(set(digests)) == len(digests)
    same = embedding(input=["a", "b"], encoding_format="base64", user="u")
    assert next(items_of(same).contents.digests()) == digests[0], "how it is written, and for whom, changes no vector"


def test_the_engine_is_asked_for_what_is_needed_alone() -> None:
    call = embedding(input=["a", "b", "c"], dimensions=2, truncate=True, user="u")
    assert json.loads(call.request.body) == {
        "model": "m", "encoding_format": "base64", "truncate": True, "dimensions": 2, "input": ["a", "b", "c"],
    }  # fmt: skip
    assert json.loads(items_of(call).contents.body_for([2, 0]))["input"] == ["c", "a"]
    assert json.loads(embedding(input=[1, 2]).request.body)["input"] == [[1, 2]]
    assert json.loads(ranking(top_n=1).request.body) == {"model": "m", "query": "q", "documents": ["a", "b"]}
    assert json.loads(ranking(mode="bi-encoder").request.body)["input"] == ["q", "a", "b"]


@given(VECTORS, st.booleans(), st.booleans())
def test_a_vector_is_the_same_to_the_bit_however_it_comes_and_goes(
    vectors: list[list[float]], comes_packed: bool, goes_packed: bool
) -> None:
    form = "base64" if goes_packed else "float"
    items = items_of(embedding(input=["x"] * len(vectors), encoding_format=form))
    raw = answer([packed(each) if comes_packed else each for each in vectors], tokens=[1] * len(vectors))
    found = list(items.read(raw, len(vectors)).items)
    expected = [packed(each) if goes_packed else each for each in vectors]
    assert [entry["embedding"] for entry in written(items, found)["data"]] == expected


def test_an_answer_in_another_order_is_put_right() -> None:
    data = [{"index": 1, "embedding": packed([2.0])}, {"index": 0, "embedding": packed([1.0])}]
    items = items_of(embedding(input=["a", "b"]))
    found = list(items.read(json.dumps({"data": data}).encode(), 2).items)
    assert [entry["embedding"] for entry in written(items, found)["data"]] == [[1.0], [2.0]]
    assert [item.tokens for item in found] == [None, None]


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b"{}", b'{"data": 7}', answer([]), answer([[1.0], [2.0]]), answer([""]), answer(["!!"]),
        answer(["AAAA"]), answer([None]), answer([[]]), answer([["x"]]), answer([7]), answer([[1e39]]),
        answer([packed([math.nan])]), answer([packed([math.inf])]), answer([[1.0]], tokens=[1, 2]),
        answer([[1.0]], tokens=5), b'{"data": [{"index": -1, "embedding": [1.0]}]}', b'{"data": [3]}',
        b'{"data": [{"index": 9, "embedding": [1.0]}]}',
    ],
)  # fmt: skip
def test_what_is_no_answer_is_garbled(raw: bytes) -> None:
    with pytest.raises(EngineGarbled):
        list(items_of(embedding(input="a")).read(raw, 1).items)


@given(st.binary(max_size=40) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["data", "index", "embedding", "tokens", "usage", "scores", "results", "relevance_score",
                         "prompt_tokens", "error", "code"]), inner, max_size=4),
    max_leaves=12,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_no_answer_of_an_engine_breaks_the_reader(raw: bytes) -> None:
    for call in (embedding(input="a"), ranking(documents=["a"]), ranking(documents=["a"], mode="bi-encoder")):
        try:
            list(items_of(call).read(raw, 1).items)
        except ForebayError:
            continue


@pytest.mark.usefixtures("no_collections")
def test_lists_of_numbers_are_read_one_by_one() -> None:
    """By the thread's own time: an answer of 2 million numbers is looked at at once, and each list by itself."""
    raw = answer([[number / 7 for number in range(1024)]] * 2048, usage={"prompt_tokens": 5})
    items = items_of(embedding(input=["a"] * 2048))
    before = time.thread_time()
    json.loads(raw)
    parsed = time.thread_time()
    part = items.read(raw, 2048)
    read = time.thread_time()
    assert len(list(part.items)) == 2048
    print(
        f"{len(raw)} bytes: {1000 * (read - parsed):.1f} ms at once; {1000 * (parsed - before):.0f} ms by the library"
    )
    assert read - parsed < (parsed - before) / 5
    spaced = json.dumps({"data": [{"embedding": [1.5, 2], "index": 1}, {"index": 0, "embedding": [3, 4.5]}]}, indent=3)
    assert [item.value for item in items.read(spaced.encode(), 2).items] == [
        array("f", numbers).tobytes() for numbers in ([3, 4.5], [1.5, 2])
    ]


def test_the_memory_of_a_large_answer_is_given_back() -> None:
    process, kept = psutil.Process(), []
    before = process.memory_info().rss
    gatherer = WHOLE.gatherer(embedding(input="a"))
    for _ in range(2000):
        gatherer.feed(b"0123456789abcdef" * 4000)
        kept.append(bytes(3000))  # others go on in between
    assert len(gatherer.body()) == 128_000_000
    del gatherer
    assert process.memory_info().rss - before < 64_000_000


@pytest.mark.parametrize("vectors", [[[1.0, 2.0], [1.0]], [packed([1.0]), packed([1.0, 2.0])], [[0.0] * 65_537] * 2])
def test_vectors_of_one_answer_have_one_length_that_vectors_have(vectors: list[Any]) -> None:
    with pytest.raises(EngineGarbled):
        list(items_of(embedding(input=["a", "b"])).read(answer(vectors), 2).items)


def test_vectors_of_another_length_than_asked_for_are_refused() -> None:
    items = items_of(embedding(input="a", dimensions=2))
    with pytest.raises(InvalidRequest) as refused:
        list(items.read(answer([[1.0, 2.0, 3.0]]), 1).items)
    assert (refused.value.param, refused.value.code) == ("dimensions", "capability_not_supported")


def test_tokens_of_the_only_input_are_those_of_all() -> None:
    part = items_of(embedding(input="a")).read(answer([[1.0]]), 1)
    assert [item.tokens for item in part.items] == [7]


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=2), st.booleans())
def test_scores_come_in_either_shape(scores: list[float], ours: bool) -> None:
    jina = [{"index": index, "relevance_score": score} for index, score in enumerate(scores)][::-1]
    raw = json.dumps({"scores": scores} if ours else {"results": jina}).encode()
    items = items_of(ranking(raw_scores=True))
    results = written(items, list(items.read(raw, 2).items))["results"]
    best = 0 if scores[0] >= scores[1] else 1
    assert [(each["index"], each["relevance_score"]) for each in results] == [
        (best, scores[best]),
        (1 - best, scores[1 - best]),
    ]
    smooth = items_of(ranking())
    for each in written(smooth, list(smooth.read(raw, 2).items))["results"]:
        assert 0 <= each["relevance_score"] <= 1


def test_scores_that_are_no_logits_stay_as_they_are_and_have_no_raw_form() -> None:
    rules = ItemRules("p", logits=False)
    items = items_of(ranking(rules))
    found = list(
        items.read(b'{"results": [{"index": 0, "relevance_score": 0.25}, {"index": 1, "relevance_score": 1}]}', 2).items
    )
    assert [each["relevance_score"] for each in written(items, found)["results"]] == [1, 0.25]
    with pytest.raises(InvalidRequest, match="raw_scores"):
        ranking(rules, raw_scores=True)


def test_cutting_is_asked_for_where_the_engine_can() -> None:
    none = ItemRules("p", truncation=None)
    with pytest.raises(InvalidRequest) as refused:
        embedding(none, input="a", truncate=True)
    assert refused.value.param == "truncate"
    with pytest.raises(InvalidRequest):
        ranking(none, truncate=True)
    body = CohereBody(model="m", query="q", documents=("a",))
    assert "truncate" not in json.loads(cohere_call(body, context(none)).request.body)
    assert json.loads(cohere_call(body, context()).request.body)["truncate"] is True
    vllm = ItemRules("p", truncation=("truncate_prompt_tokens", -1))
    assert json.loads(embedding(vllm, input="a", truncate=True).request.body)["truncate_prompt_tokens"] == -1


def test_a_bi_encoder_compares_with_the_query() -> None:
    items = items_of(ranking(documents=["a", "b", "c"], mode="bi-encoder", return_documents=True))
    vectors = [[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [-1.0, 0.0]]
    found = list(items.read(answer([packed(each) for each in vectors]), 4).items)
    results = written(items, found)["results"]
    assert [(each["index"], each["relevance_score"], each["document"]["text"]) for each in results] == [
        (1, 1.0, "b"), (0, 0.5, "a"), (2, 0.0, "c"),
    ]  # fmt: skip
    with pytest.raises(InvalidRequest):
        ranking(documents=["a", ""], mode="bi-encoder")


def test_a_model_that_reads_queries_in_another_way_is_told_which_is_one() -> None:
    rules = ItemRules("p", counted=True, input_types=True)
    asked = embedding(rules, input=["a"], input_type="query")
    assert json.loads(asked.request.body)["input_type"] == "query"
    assert "input_type" not in json.loads(embedding(input=["a"], input_type="query").request.body)
    items = items_of(ranking(rules, documents=["a", "q"], mode="bi-encoder"))
    digests = list(items.contents.digests())
    assert len(set(digests)) == 3, "a query is not a document with the same words"
    assert digests[0] == next(items_of(embedding(rules, input="q", input_type="query")).contents.digests())
    assert digests[1] == next(items_of(embedding(rules, input="a", input_type="document")).contents.digests())
    assert [items.contents.group(place) for place in range(3)] == [1, 0, 0]
    assert json.loads(items.contents.body_for([0])) == {
        "model": "m", "encoding_format": "base64", "input_type": "query", "input": ["q"],
    }  # fmt: skip
    assert json.loads(items.contents.body_for([1, 2]))["input_type"] == "document"
