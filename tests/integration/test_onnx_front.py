"""Embeddings of the default model through the whole server: the front door and the engine agree on limits and errors."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

from forebay.replicas.figures import NAMES
from tests.support.items import EMBEDDINGS, RERANK, cosine, embed, outcomes, rerank, send, vectors
from tests.support.models import minilm_path, minilm_weights
from tests.support.reference import Reference, unit
from tests.support.server import Server, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONFIG = """
default_models = false
[models.embedder]
engine = "onnx"
source = "file:{path}"
preload = true
slots = 16
queue_places = 100
input_tokens_max = 1000
[models.prefixed]
engine = "onnx"
source = "file:{path}"
preload = true
options = {{ query_prefix = "query: ", document_prefix = "passage: " }}
"""
NOT_OF_TEXTS = {
    "forebay_engine_batch_budget_chunks",
    "forebay_engine_batch_budget_windows",
    "forebay_engine_audio_seconds_total",
    "forebay_engine_pictures_total",
    "forebay_engine_pictures_running",
    "forebay_engine_pictures_waiting",
    "forebay_engine_steps_total",
    "forebay_engine_picture_steps_total",
    "forebay_engine_paint_seconds_total",
    "forebay_engine_savings",
    "forebay_engine_savings_total",
    "forebay_engine_failed_total",
    "forebay_engine_child_restarts_total",
}
ODD_TEXTS = (
    "a",
    " ",
    "\x00",
    "!?;:" * 30,
    "-" * 200,
    "x" * 300,
    "東京は日本の首都です。",
    "🙂🙃",
    "สวัสดีชาวโลก",
    "def f(x):\n    return x",
)
TEXTS = ["A cat sits on the mat.", "A kitten sits on a rug.", "Stock prices fell sharply on Monday."]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(CONFIG.format(path=minilm_path())) as running:
        yield running
        assert "request.bug" not in running.log


async def test_vectors_say_what_is_alike_and_are_kept(server: Server) -> None:
    plain = await embed(server, TEXTS, encoding_format="float")
    assert vectors(plain) == vectors(await embed(server, TEXTS, encoding_format="base64"))
    assert await outcomes(server) == (3, 0, 3)
    cat, kitten, stocks = vectors(plain)
    assert len(cat) == 384
    assert cosine(cat, kitten) > 0.6
    assert cosine(cat, stocks) < 0.2
    ranked = await rerank(server, TEXTS[0], TEXTS[1:], model="embedder", mode="bi-encoder")
    assert [each["index"] for each in ranked["results"]] == [0, 1]
    assert (await outcomes(server))[2] == 3, "a ranking by embeddings knows the texts already"


async def test_two_hundred_varied_texts_of_many_clients_are_as_the_authors_weights_have_them(server: Server) -> None:
    """Every text is another, so a vector in the wrong place is none of its own."""
    chance = random.Random(5)
    texts = [*ODD_TEXTS, *(_text(chance, number) for number in range(200 - len(ODD_TEXTS)))]
    tokenizer = Tokenizer.from_file(str(minilm_path().with_name("tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    requests = [[*texts[client::64], *texts[client : client + client % 5]] for client in range(64)]
    answers = await asyncio.gather(*[embed(server, each, encoding_format="float") for each in requests])
    packed = await asyncio.gather(*[embed(server, each, encoding_format="base64") for each in requests])
    assert list(map(vectors, answers)) == list(map(vectors, packed))
    reference = Reference(minilm_weights())
    wanted = {text: unit(reference.hidden(tokenizer.encode(text).ids).mean(0)) for text in texts}
    for asked, answer in zip(requests, answers, strict=True):
        for text, vector in zip(asked, vectors(answer), strict=True):
            assert cosine(vector, wanted[text].tolist()) >= 0.98, text


def _text(chance: random.Random, number: int) -> str:
    words = (
        " ".join(TEXTS).lower() + " 12 % « » straße κόσμος мир 世界 مرحبا 🙂 x=1; https://example.org/?q=1 [MASK]"
    ).split()
    return f"{number} " + " ".join(chance.choices(words, k=chance.choice([1, 2, 4, 8, 16])))


async def test_the_operator_sees_how_well_batches_are_filled(server: Server) -> None:
    before = await _figures(server)
    await asyncio.gather(*(embed(server, f"number {number} of a hundred") for number in range(100)))
    after = await _figures(server)
    more = {name: after[name] - before.get(name, 0) for name in after}
    assert (more["requests_total"], more["items_total"]) == (100, 100)
    assert more["items_total"] / more["batches_total"] > 1
    assert 0 < more["tokens_total"] <= more["padded_tokens_total"]
    assert more["wait_seconds_total"] > 0
    assert (after["items_waiting"], after["requests_running"], after["out_of_memory_total"]) == (0, 0, 0)


async def _figures(server: Server) -> dict[str, float]:
    """The figures of the engine by their names without the prefix, from an exposition that Prometheus can read."""
    async with server.session.get(f"{server.url}/metrics", headers=server.headers) as response:
        families = list(text_string_to_metric_families(await response.text()))
    assert len({family.name for family in families}) == len(families)
    samples = [sample for family in families for sample in family.samples if sample.name.startswith("forebay_engine_")]
    own = [each for each in samples if each.labels["model"] == "embedder" and "replica" in each.labels]
    assert {each.name for each in own} == set(NAMES) - NOT_OF_TEXTS
    assert len(own) == len(NAMES) - len(NOT_OF_TEXTS)
    return {each.name.removeprefix("forebay_engine_"): each.value for each in own}


async def test_limits_of_the_model_are_the_callers_business(server: Server) -> None:
    long = "word " * 900
    await embed(server, "short")
    for fields, code, param, words in (
        ({"input": ["short", long]}, "context_length_exceeded", "input[1]", "holds 512 tokens, and the input has 902"),
        ({"input": ["short", "new", "word " * 3000]}, "context_length_exceeded", "input[2]", "has at least 1"),
        ({"input": long}, "context_length_exceeded", "input", "has 902"),
        ({"input": [f"{number} " + "word " * 400 for number in range(3)]}, "invalid_request", "input", "has 1209 tok"),
        ({"input": "x", "dimensions": 8}, "invalid_request", "dimensions", "384 dimensions"),
        ({"input": ["short", [40_000_000]]}, "invalid_value", "input[1]", "valid string"),
        ({"input": [[5], [6], [40_000_000]]}, "invalid_request", "input[2]", "vocabulary"),
    ):
        status, answer = await send(server, EMBEDDINGS, {"model": "embedder", **fields})
        error = answer["error"]
        assert (status, error["code"], error["param"]) == (400, code, param), answer
        assert words in error["message"]
    for query, param in ((long, "query"), ("short", "documents[1]")):
        body = {"model": "embedder", "query": query, "documents": ["short", long], "mode": "bi-encoder"}
        status, answer = await send(server, RERANK, body)
        assert (status, answer["error"]["param"]) == (400, param), answer
    assert (await embed(server, long, truncate=True))["usage"]["prompt_tokens"] == 512


async def test_a_model_with_prefixes_reads_queries_in_another_way(server: Server) -> None:
    plain = vectors(await embed(server, ["query: cat", "passage: cat"]))
    query = vectors(await embed(server, "cat", model="prefixed", input_type="query"))[0]
    document = vectors(await embed(server, "cat", model="prefixed", input_type="document"))[0]
    assert cosine(query, plain[0]) > 0.999
    assert cosine(document, plain[1]) > 0.999
    ranked = await rerank(server, "cat", ["cat", "dog"], model="prefixed", mode="bi-encoder", raw_scores=True)
    assert ranked["results"][0]["relevance_score"] == pytest.approx(cosine(query, document), abs=1e-5)
