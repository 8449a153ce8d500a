"""One text encoder behind HTTP, in a process of its own: embeddings, or the scores of a cross-encoder.

It refuses what the model cannot take, naming the input: longer texts are cut only for who asks for it.
"""

import asyncio
import base64
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from forebay.engines import compute, reports
from forebay.engines.connection import Answer, Refused, Route, Visit
from forebay.engines.parted import json_object
from forebay.engines.reports import one_line
from forebay.engines.serving import Service, run
from forebay.engines.start import check_types, read_spec, refuse_to_start
from forebay.engines.threads import cores

_INPUTS_MAX = 16_384

_say = partial(reports.say, "onnx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """How this engine is set up, from FOREBAY_ENGINE_SPEC."""

    name: str
    model_path: str
    tokenizer_path: str
    slots: int = 1
    capability: str = "embedding"
    provider: str = "cpu"
    threads: int = 0
    int8: bool = False
    batches_at_once: int = 0
    pooling: str = "mean"
    normalise: bool = True
    matryoshka: bool = False
    dimensions_min: int = 32
    context: int = 512
    batch_tokens: int = 256
    small_tokens: int = 128
    query_prefix: str = ""
    document_prefix: str = ""
    input_tokens_max: int = 300_000
    oom_cooldown_seconds: float = 300.0
    rehearse_tokens_max: int = 0  # a batch with more padded tokens runs out of memory; 0 never does

    def __post_init__(self) -> None:
        check_types(self)


class Engine:
    """The routes of one loaded model. Made in the loading thread; `start` and the routes run in the event loop."""

    def __init__(self, spec: Spec, loop: asyncio.AbstractEventLoop) -> None:
        from forebay.engines import onnx_model
        from forebay.engines.onnx_tokens import Tokens

        self._spec = spec
        self._model = onnx_model
        self._tokens = Tokens(spec.tokenizer_path, spec.context)
        threads = spec.threads or cores()
        workers = spec.batches_at_once or (min(2, threads) if spec.provider == "cpu" else 1)
        session = onnx_model.open_session(spec.model_path, spec.provider, max(1, threads // workers), int8=spec.int8)
        pooling = onnx_model.pooled(spec.pooling, normalise=spec.normalise)
        finish = onnx_model.scores if spec.capability == "rerank" else pooling
        encoder = onnx_model.Encoder(session, finish, self._tokens.pad, spec.rehearse_tokens_max)
        self.dimensions = self._warm_up(encoder)
        self._compute = asyncio.run_coroutine_threadsafe(self._start(encoder, workers), loop).result()

    async def _start(self, encoder: Any, workers: int) -> Any:
        spec = self._spec
        return compute.Compute(encoder.encode, spec.batch_tokens, workers, spec.small_tokens, spec.oom_cooldown_seconds)

    def _warm_up(self, encoder: Any) -> int:
        """Compute something once, so that the first request finds everything in its place; the width of a row."""
        from forebay.engines.batcher import Item

        row = encoder.encode([Item(0, 0, self._tokens.of_text("warm up"))])[0]
        return int(row.size)

    @property
    def routes(self) -> Mapping[tuple[str, str], Route]:
        """What this engine answers."""
        found: dict[tuple[str, str], Route] = {
            ("GET", "/slots"): self._slots,
            ("GET", "/metrics"): self._metrics,
        }
        if self._spec.capability == "rerank":
            return {**found, ("POST", "/v1/rerank"): _noted(self._rerank)}
        return {**found, ("POST", "/v1/embeddings"): _noted(self._embed)}

    async def _embed(self, visit: Visit) -> Answer:
        body = json_object(visit.body)
        inputs = _inputs(body.get("input"))
        dimensions = self._dimensions(body.get("dimensions"))
        prefix = self._prefix(body.get("input_type"))
        items = await self._tokens.of_inputs(inputs, prefix, truncate=_flag(body, "truncate"))
        vectors = await self._run(visit, [(tokens, ()) for tokens in items])
        if dimensions is not None:
            vectors = [vector[:dimensions] for vector in vectors]
            if self._spec.normalise:
                vectors = [self._model.normalised(vector) for vector in vectors]
        encoded = (base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors)
        data = [{"object": "embedding", "index": index, "embedding": text} for index, text in enumerate(encoded)]
        return _json(object="list", data=data, model=self._spec.name, **_usage(items))

    async def _rerank(self, visit: Visit) -> Answer:
        body = json_object(visit.body)
        query, documents = body.get("query"), body.get("documents")
        if not isinstance(query, str) or not query:
            raise Refused(400, "`query` has to be a text that is not empty.")
        if not isinstance(documents, list) or not documents or not all(isinstance(each, str) for each in documents):
            raise Refused(400, "`documents` has to be a list of texts that is not empty.")
        if len(documents) > _INPUTS_MAX:
            raise Refused(400, f"`documents` has more than {_INPUTS_MAX} texts.")
        tokens_max = self._spec.input_tokens_max
        pairs = await self._tokens.of_pairs(query, documents, tokens_max, truncate=_flag(body, "truncate"))
        found = await self._run(visit, pairs)
        return _json(
            scores=[float(score) for score in found], model=self._spec.name, **_usage([each for each, _ in pairs])
        )

    async def _run(self, visit: Visit, items: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Any]:
        self._check_total(sum(len(each) for each, _ in items))
        begun = time.monotonic()
        ended, reason = "cancelled", ""
        try:
            results: list[Any] = await self._compute.run(items, visit.proceed)
            ended = "finished"
        except compute.Failed as failed:
            ended, reason = "failed", f" reason={one_line(failed.reason)}"
            raise
        finally:
            tokens = sum(len(each) for each, _ in items)
            seconds = time.monotonic() - begun
            _say(f"event={ended} {visit.ids} inputs={len(items)} tokens={tokens} seconds={seconds:.4f}{reason}")
        return results

    def _check_total(self, tokens: int) -> None:
        most = self._spec.input_tokens_max
        if tokens > most:
            raise Refused(
                400,
                f"The request has {tokens} tokens, and this model takes {most} at once. Send several requests.",
                param="documents" if self._spec.capability == "rerank" else "input",
            )

    def _dimensions(self, wanted: Any) -> int | None:
        if wanted is None or wanted == self.dimensions:
            return None
        if not self._spec.matryoshka:
            raise Refused(
                400,
                f"This model has {self.dimensions} dimensions and is not trained for fewer. Leave `dimensions` out.",
                param="dimensions",
            )
        low = self._spec.dimensions_min
        if not isinstance(wanted, int) or isinstance(wanted, bool) or not low <= wanted <= self.dimensions:
            raise Refused(400, f"`dimensions` has to be a number from {low} to {self.dimensions}.", param="dimensions")
        return wanted

    def _prefix(self, kind: Any) -> str:
        match kind:
            case None:
                return ""
            case "query":
                return self._spec.query_prefix
            case "document":
                return self._spec.document_prefix
            case _:
                raise Refused(400, "`input_type` has to be `query` or `document`.")

    async def _slots(self, visit: Visit) -> Answer:
        return reports.slots(self._spec.slots, self._compute.running)

    async def _metrics(self, visit: Visit) -> Answer:
        now = {
            "items_waiting": self._compute.waiting,
            "requests_running": self._compute.running,
            "batch_budget_tokens": self._compute.budget_tokens,
        }
        return reports.metrics(asdict(self._compute.figures), **now)


def _noted(route: Route) -> Route:
    """`route`, with a line in the log for what it refuses before anything is computed."""

    async def answer(visit: Visit) -> Answer:
        try:
            return await route(visit)
        except compute.Failed:  # it has its line
            raise
        except Refused as refused:
            _say(f"event=refused {visit.ids} reason={one_line(str(refused))}")
            raise

    return answer


def _flag(body: Mapping[str, Any], name: str) -> bool:
    found = body.get(name)
    if not isinstance(found, bool | None):
        raise Refused(400, f"`{name}` has to be true or false.")
    return bool(found)


def _inputs(found: Any) -> list[str | list[int]]:
    """`input` in its four forms as a list of texts or of token lists."""
    inputs = [found] if isinstance(found, str) or (isinstance(found, list) and found and _is_id(found[0])) else found
    if not isinstance(inputs, list) or not inputs:
        raise Refused(400, "`input` has to be a text, a list of texts, or token ids, and not empty.")
    if len(inputs) > _INPUTS_MAX:
        raise Refused(400, f"`input` has more than {_INPUTS_MAX} texts.")
    for index, each in enumerate(inputs):
        if not isinstance(each, str) and not (isinstance(each, list) and all(map(_is_id, each))):
            raise Refused(400, f"Input {index} is neither a text nor a list of token ids.")
        if not each:
            raise Refused(400, f"Input {index} is empty.")
    return inputs


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _usage(items: Sequence[Sequence[int]]) -> dict[str, Any]:
    counts = [len(each) for each in items]
    return {"usage": {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}, "tokens": counts}


def _json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def main() -> None:
    """Load the model and serve until SIGTERM."""
    spec, key = read_spec(Spec, "The engine")
    if min(spec.slots, spec.context, spec.batch_tokens) < 1:
        refuse_to_start(f"{spec.name} needs at least 1 for slots, context and batch_tokens.")

    if spec.int8 and spec.provider != "cpu":
        refuse_to_start(f"{spec.name} can compute with `int8` on a CPU only. Leave it out.")

    def load(loop: asyncio.AbstractEventLoop) -> Service:
        engine = Engine(spec, loop)
        _say(f"event=ready model={spec.name} dimensions={engine.dimensions} provider={spec.provider}")
        return engine

    run(key, load)


if __name__ == "__main__":
    main()
