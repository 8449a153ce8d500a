import base64
import contextlib
import http.client
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer

from forebay.engine_options import OnnxOptions
from forebay.engines.onnx_text import Spec
from forebay.model_config import OnnxModel
from forebay.replicas import figures
from forebay.replicas.commands import command_for
from tests.support import tiny_onnx
from tests.support.engines import KEY, Engine, eventually, ready
from tests.support.models import minilm_path, minilm_weights
from tests.support.reference import Reference, unit

EMBEDDINGS = "/v1/embeddings"
ODD_TEXTS = (
    "a", "Zürich, größer als Köln?", "東京は日本の首都です。", "def f(x):\n    return x ** 2  # squared", "🙂🙃", "   spaced   out   ",
    "1234567890 " * 20, "!?;:" * 30, "Привет, мир", "naïve café résumé", "<html><body>&amp;</body></html>", "SELECT * FROM t;",
)  # fmt: skip
WORDS = (
    "river", "market", "engine", "silver", "quantum", "the", "of", "to", "banana", "justice", "harbour", "slowly", "bright",
    "seven", "winter", "music", "policy", "doctor", "climb", "yellow", "protein", "contract", "whisper", "bridge", "and",
)  # fmt: skip


def _texts(count: int, seed: int, longest: int = 120) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, longest))) for _ in range(count)]


def _vectors(answer: dict[str, Any]) -> np.ndarray:
    assert [each["index"] for each in answer["data"]] == list(range(len(answer["data"])))
    return np.stack([np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in answer["data"]])


def _engine(model: Path | None = None, **more: Any) -> contextlib.AbstractContextManager[Engine]:
    spec = {"name": "m", "model_path": str(model or minilm_path()), "slots": 64, **more}
    return ready("onnx_text", {"tokenizer_path": str(minilm_path().with_name("tokenizer.json")), **spec})


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with _engine() as found:
        yield found


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer.from_file(str(minilm_path().with_name("tokenizer.json")))
    found.no_padding()
    found.no_truncation()
    return found


def _embed(engine: Engine, given: Any, **more: Any) -> np.ndarray:
    status, answer = engine.ask("POST", EMBEDDINGS, {"input": given, **more})
    assert status == 200, answer
    return _vectors(answer)


@pytest.fixture(scope="module")
def integers() -> Iterator[Engine]:
    with _engine(int8=True) as found:
        yield found


@pytest.fixture(scope="module")
def wanted(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The vectors of varied texts by the authors' weights."""
    reference = Reference(minilm_weights())
    texts = [*ODD_TEXTS, *(f"{number} {text}" for number, text in enumerate(_texts(188, seed=1, longest=30)))]
    return {text: unit(reference.hidden(tokenizer.encode(text).ids).mean(0)) for text in texts}


@pytest.mark.parametrize("numbers", ["engine", "integers"])
def test_vectors_are_those_of_the_authors_weights(
    numbers: str, request: pytest.FixtureRequest, wanted: dict[str, np.ndarray]
) -> None:
    engine: Engine = request.getfixturevalue(numbers)
    found = _embed(engine, list(wanted))
    assert found.shape == (len(wanted), 384)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    for (text, expected), vector in zip(wanted.items(), found, strict=True):
        assert float(vector @ expected) >= 0.98, text


def test_a_vector_does_not_depend_on_its_batch(integers: Engine) -> None:
    texts = _texts(24, seed=11, longest=30)
    together = _embed(integers, texts)
    for text, vector in zip(texts, together, strict=True):
        assert float(vector @ _embed(integers, text)[0]) > 0.9999


def test_order_is_kept_under_mixed_requests(engine: Engine) -> None:
    requests = [_texts(1 + number % 7, seed=100 + number) for number in range(192)]
    alone = {text: vector for texts in requests for text, vector in zip(texts, _embed(engine, texts), strict=True)}
    with ThreadPoolExecutor(64) as pool:
        for texts, found in zip(requests, pool.map(lambda each: _embed(engine, each), requests), strict=True):
            for text, vector in zip(texts, found, strict=True):
                assert float(vector @ alone[text]) > 0.9999
    assert engine.metric("requests_running") == 0


def test_the_same_text_in_all_four_forms(engine: Engine, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the silver river").ids
    forms: list[Any] = ["the silver river", ["the silver river"], ids, [ids], ids[1:-1]]
    vectors = [_embed(engine, form)[0] for form in forms]
    for vector in vectors:
        np.testing.assert_allclose(vector, vectors[0], atol=1e-6)


def test_usage_counts_the_tokens_of_each_input(engine: Engine, tokenizer: Tokenizer) -> None:
    texts = _texts(5, seed=3)
    _, answer = engine.ask("POST", EMBEDDINGS, {"input": texts})
    counts = [len(tokenizer.encode(text).ids) for text in texts]
    assert answer["tokens"] == counts
    assert answer["usage"] == {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}
    assert (answer["object"], answer["model"]) == ("list", "m")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"input": ""}, "Input 0 is empty"),
        ({"input": []}, "not empty"),
        ({"input": ["a", ""]}, "Input 1 is empty"),
        ({"input": [[1], []]}, "Input 1 is empty"),
        ({"input": [1, 30_522]}, "not in the vocabulary"),
        ({"input": [-1]}, "not in the vocabulary"),
        ({"input": [True]}, "neither a text nor"),
        ({"input": {"a": 1}}, "has to be a text"),
        ({"input": None}, "has to be a text"),
        ({"input": "a", "dimensions": 64}, "not trained for fewer"),
        ({"input": "a", "truncate": 1}, "true or false"),
        ([], "JSON object"),
    ],
)
def test_what_is_no_input_is_refused(engine: Engine, body: Any, said: str) -> None:
    status, answer = engine.ask("POST", EMBEDDINGS, body)
    assert status == 400
    assert said in answer["error"]["message"]


def test_a_text_that_is_too_long_is_refused_by_its_index_or_cut(engine: Engine, tokenizer: Tokenizer) -> None:
    long = "river " * 600
    status, answer = engine.ask("POST", EMBEDDINGS, {"input": ["short", long]})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert (answer["error"]["index"], answer["error"]["n_prompt_tokens"], answer["error"]["n_ctx"]) == (1, 602, 512)
    assert "`input[1]` has 602 tokens" in answer["error"]["message"]
    cut = _embed(engine, long, truncate=True)
    np.testing.assert_allclose(cut, _embed(engine, "river " * 510), atol=1e-5)
    np.testing.assert_allclose(cut, _embed(engine, tokenizer.encode(long).ids, truncate=True), atol=1e-5)


def test_the_key_is_needed(engine: Engine) -> None:
    for path in ("/slots", "/metrics", "/nowhere"):
        assert engine.ask("GET", path, key=None)[0] == 401
        assert engine.ask("GET", path, key="wrong")[0] == 401
    assert engine.ask("GET", "/health", key=None) == (200, {"status": "ok"})
    assert engine.get("/nowhere")[0] == 404
    assert engine.ask("POST", "/v1/rerank", {"query": "a", "documents": ["b"]})[0] == 404


def test_every_request_leaves_a_line_with_its_names(engine: Engine) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    def ask(number: int, body: Any) -> int:
        connection = http.client.HTTPConnection(*engine.address, timeout=60)
        named = {"X-Request-ID": f"req_{number}", "traceparent": trace}
        with contextlib.closing(connection):
            connection.request("POST", EMBEDDINGS, json.dumps(body), {"Authorization": f"Bearer {KEY}", **named})
            return connection.getresponse().status

    bodies = (
        {"input": "a"},
        {"input": ["a", "river " * 600]},
        {"input": [[40_000_000]]},
        {"input": "secret", "dimensions": 3},
    )
    assert [ask(number, body) for number, body in enumerate(bodies)] == [200, 400, 400, 400]
    for number, said in (
        (0, "event=finished {} inputs=1 tokens=3 seconds="),
        (1, "event=refused {} reason=`input[1]` has 602 tokens"),
        (2, "event=refused {} reason=A token id is not"),
        (3, "event=refused {} reason=This model has 384 dimensions"),
    ):
        assert said.format(f"request_id=req_{number} traceparent={trace}") in engine.log
    assert "secret" not in engine.log


def test_what_the_library_says_of_a_batch_is_in_the_log_alone(tmp_path: Path) -> None:
    """The table of the model has fewer rows than its tokenizer has tokens."""
    with _engine(tiny_onnx.encoder(tmp_path / "model.onnx", rows=10_000)) as tiny:
        assert tiny.ask("POST", EMBEDDINGS, {"input": [[5]]})[0] == 200
        status, answer = tiny.ask("POST", EMBEDDINGS, {"input": [[20_000]]})
        assert (status, answer["error"]["code"]) == (500, "engine_error")
        assert answer["error"]["message"] == "The engine failed on this input."
        assert re.search(r"^onnx: event=failed .* reason=.*Gather.*out of.*$", tiny.log, re.MULTILINE), tiny.log


def test_its_figures_are_those_that_the_server_passes_on(engine: Engine) -> None:
    lines = engine.metrics().splitlines()
    assert len(lines) > 10
    assert set(figures.read("\n".join(lines))) == {line.split()[0] for line in lines}


def test_a_request_that_is_given_up_stops_between_two_batches(engine: Engine) -> None:
    before = engine.metric("items_total")
    stream = engine.open({"input": ["river " * 200] * 1000}, EMBEDDINGS)
    eventually(lambda: engine.metric("items_total") > before, 30)
    stream.half_close()
    assert stream.read_to_end() == b""
    done = engine.metric("items_total") - before
    assert done < 500
    assert (engine.metric("items_waiting"), engine.metric("requests_running")) == (0, 0)
    _embed(engine, "still there")
    assert engine.metric("items_total") - before == done + 1
    assert "event=cancelled request_id=req_test inputs=1000" in engine.log


def _paused(engine: Engine, texts: list[str]) -> tuple[bool, np.ndarray]:
    """Whether it was still at work on them when it was paused, and the vectors."""
    before = engine.metric("items_total")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(_embed, engine, texts)
        eventually(lambda: engine.metric("items_total") > before, 30)
        with engine.paused():
            at_work = not answer.done()
        return at_work, answer.result()


def test_a_request_that_was_paused_gets_the_same_vectors(engine: Engine) -> None:
    texts = _texts(60, seed=3)
    wanted, at_work = _embed(engine, texts), False
    for _ in range(3):  # it may have come to its end before the pause: it is short
        if not at_work:
            at_work, found = _paused(engine, texts)
            assert np.allclose(found, wanted, atol=1e-6)
    assert at_work


def test_who_has_gone_altogether_is_stopped_as_well(engine: Engine) -> None:
    before = engine.metric("cancelled_total")
    stream = engine.open({"input": ["river " * 200] * 1000}, EMBEDDINGS)
    eventually(lambda: engine.metric("requests_running") == 1, 30)
    stream.close()
    eventually(lambda: engine.metric("requests_running") == 0, 30)
    assert engine.metric("cancelled_total") == before + 1


def test_short_texts_are_answered_while_a_long_request_runs(engine: Engine) -> None:
    stream = engine.open({"input": ["river " * 100] * 2048}, EMBEDDINGS)
    eventually(lambda: engine.metric("items_waiting") > 0, 30)
    for number in range(20):
        _embed(engine, f"short text {number}")
    assert engine.metric("items_waiting") > 1000
    stream.half_close()
    stream.read_to_end()


def test_a_shortage_of_memory_halves_the_batches_and_they_recover(engine: Engine) -> None:
    texts = _texts(60, seed=5, longest=20)
    with _engine(batch_tokens=1024, rehearse_tokens_max=300, oom_cooldown_seconds=0.5) as small:
        found = _embed(small, texts)
        assert small.metric("out_of_memory_total") >= 1
        halved = re.findall(r"^event=batch_halved budget_tokens=(\d+)$", small.log, re.MULTILINE)
        assert min(map(int, halved)) <= 300  # by now it may have grown again
        eventually(lambda: _embed(small, "a").size and small.metric("batch_budget_tokens") == 1024, 60)
        status, answer = small.ask("POST", EMBEDDINGS, {"input": ["fine", "river " * 400]})
        assert (status, answer["error"]["code"]) == (500, "out_of_memory")
        _embed(small, "still there")
    assert np.min(np.sum(found * _embed(engine, texts), axis=1)) > 0.9999


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling(tmp_path: Path, tokenizer: Tokenizer, pooling: str) -> None:
    pick: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "mean": lambda rows: rows.mean(0),
        "cls": lambda rows: rows[0],
        "last": lambda rows: rows[-1],
    }
    texts = ["a", "silver river bridge", "market"]
    wanted = [pick[pooling](tiny_onnx.TABLE[tokenizer.encode(text).ids]) for text in texts]
    model = tiny_onnx.encoder(tmp_path / "model.onnx")
    with _engine(model, pooling=pooling, normalise=False) as tiny:
        np.testing.assert_allclose(_embed(tiny, texts), wanted, rtol=1e-5)


def test_fewer_dimensions_have_the_length_one_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = tiny_onnx.encoder(tmp_path / "model.onnx")
    rows = tiny_onnx.TABLE[tokenizer.encode("silver").ids].mean(0)
    with _engine(model, matryoshka=True, dimensions_min=2) as tiny:
        np.testing.assert_allclose(_embed(tiny, "silver", dimensions=3)[0], unit(rows[:3]), rtol=1e-4)
        np.testing.assert_allclose(_embed(tiny, "silver", dimensions=8)[0], unit(rows), rtol=1e-4)
        for wrong in (1, 9, "3", True):
            assert tiny.ask("POST", EMBEDDINGS, {"input": "a", "dimensions": wrong})[0] == 400


def test_prefixes(tmp_path: Path) -> None:
    model = tiny_onnx.encoder(tmp_path / "model.onnx")
    with _engine(model, query_prefix="query: ", document_prefix="passage: ") as tiny:
        plain = _embed(tiny, "query: silver")
        np.testing.assert_allclose(_embed(tiny, "silver", input_type="query"), plain, rtol=1e-6)
        assert not np.allclose(_embed(tiny, "silver", input_type="document"), plain)
        assert not np.allclose(_embed(tiny, "silver"), plain)


@pytest.mark.parametrize("classes", [1, 2])
def test_a_cross_encoder_gives_raw_scores_in_order(tmp_path: Path, tokenizer: Tokenizer, classes: int) -> None:
    model = tiny_onnx.cross_encoder(tmp_path / "model.onnx", classes)
    documents = _texts(40, seed=9, longest=60)

    def wanted(query: str, document: str) -> float:
        pair = tokenizer.encode(query, document)
        logits = (tiny_onnx.TABLE[pair.ids] * tiny_onnx.KINDS[pair.type_ids]).sum(0) @ tiny_onnx.head(classes)
        return float(logits[0] if classes == 1 else logits[1] - logits[0])

    with _engine(model, capability="rerank") as tiny:
        for query in ("what is silver", "a bridge"):
            status, answer = tiny.ask("POST", "/v1/rerank", {"query": query, "documents": documents})
            assert status == 200
            np.testing.assert_allclose(
                answer["scores"], [wanted(query, each) for each in documents], rtol=1e-3, atol=1e-3
            )
            counts = [len(tokenizer.encode(query, each).ids) for each in documents]
            assert (answer["tokens"], answer["usage"]["total_tokens"]) == (counts, sum(counts))
        long = {"query": "q", "documents": ["a", "river " * 600]}
        status, answer = tiny.ask("POST", "/v1/rerank", long)
        assert (status, answer["error"]["code"], answer["error"]["index"]) == (400, "context_length_exceeded", 1)
        assert tiny.ask("POST", "/v1/rerank", {**long, "truncate": True})[0] == 200
        status, answer = tiny.ask("POST", "/v1/rerank", {"query": "river " * 600, "documents": ["a", "b"]})
        error = answer["error"]
        assert (status, error["param"], error["index"], error["n_prompt_tokens"]) == (400, "query", None, 602)
        for wrong in (
            {"query": "", "documents": ["a"]},
            {"query": "a", "documents": []},
            {"query": "a", "documents": [1]},
        ):
            assert tiny.ask("POST", "/v1/rerank", wrong)[0] == 400


def test_a_query_of_megabytes_takes_little_memory_and_time(tmp_path: Path) -> None:
    documents = [f"document {number}" for number in range(20)]
    huge = "river a " * 100_000
    with _engine(tiny_onnx.cross_encoder(tmp_path / "model.onnx"), capability="rerank") as tiny:
        before = psutil.Process(tiny.pid).memory_info().rss
        status, answer = tiny.ask("POST", "/v1/rerank", {"query": huge, "documents": documents})
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "context_length_exceeded", "query")
        cut = tiny.ask("POST", "/v1/rerank", {"query": huge, "documents": documents, "truncate": True})
        assert cut == tiny.ask("POST", "/v1/rerank", {"query": huge[:8000], "documents": documents, "truncate": True})
        assert cut[1]["tokens"] == [512] * 20
        mixed = {"query": "river", "documents": ["a", huge, huge + "!"], "truncate": True}
        assert tiny.ask("POST", "/v1/rerank", mixed)[1]["tokens"][1:] == [512, 512]
        status, answer = tiny.ask("POST", "/v1/rerank", {"query": "x" * 1_000_000, "documents": documents})
        assert (status, answer["error"]["code"]) == (400, None)
        grown = psutil.Process(tiny.pid).memory_info().rss - before
        assert grown < 200 * 2**20


def test_an_input_of_megabytes_is_looked_at_by_its_beginning(engine: Engine) -> None:
    before = psutil.Process(engine.pid).memory_info().rss
    huge = "river a " * 500_000
    status, answer = engine.ask("POST", EMBEDDINGS, {"input": ["short", huge]})
    assert (status, answer["error"]["code"], answer["error"]["index"]) == (400, "context_length_exceeded", 1)
    np.testing.assert_array_equal(_embed(engine, huge, truncate=True), _embed(engine, huge[:5000], truncate=True))
    assert psutil.Process(engine.pid).memory_info().rss - before < 100 * 2**20


def _fails_to_start(**spec: Any) -> tuple[str, int]:
    given = {
        "name": "m",
        "model_path": str(minilm_path()),
        "tokenizer_path": str(minilm_path().with_name("tokenizer.json")),
    }
    engine = Engine("onnx_text", {**given, **spec})
    code = engine.guard.wait(60)
    return engine.log, code


def test_a_device_that_is_not_there_is_no_cpu() -> None:
    log, code = _fails_to_start(provider="cuda")
    assert code == 78
    assert "has no cuda provider" in log


@pytest.mark.parametrize("broken", ["model_path", "tokenizer_path"])
def test_what_cannot_be_loaded_says_so_without_its_folder(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "broken.file"
    shutil.copyfile(__file__, path)
    log, code = _fails_to_start(**{broken: str(path)})
    assert code == 78
    assert "broken.file" in log
    assert str(tmp_path) not in log


def test_the_cool_down_of_the_configuration_reaches_the_engine() -> None:
    model = OnnxModel(engine="onnx", source="file:/m.onnx")
    command = command_for("m", model, 3, Path("/m.onnx"), "key", 0, oom_cooldown_seconds=7)
    assert Spec(**json.loads(command.environment["FOREBAY_ENGINE_SPEC"])).oom_cooldown_seconds == 7


def test_the_settings_of_the_program_are_those_of_the_configuration() -> None:
    spec = set(Spec.__dataclass_fields__)
    assert set(OnnxOptions.model_fields) - {"tokenizer_file"} <= spec
