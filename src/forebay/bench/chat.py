"""Throughput of a real model through the server, beside the same engine driven directly: P5.

It refuses to compare different engines: both sides run the same program with the same settings.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from forebay.bench.report import Measure, Report, percentile
from forebay.bench.stage import Stage, place_of, staged
from forebay.bench.wire import Reply, Target, now
from forebay.config import Settings
from forebay.errors import SetupError
from forebay.model_config import LlamaCppModel
from forebay.replicas.catalog import Catalog

_TOPICS = (
    "a lighthouse",
    "the tides",
    "a long train",
    "two rivers",
    "an old map",
    "the first snow",
    "a harbour",
    "bees",
)
_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Size:
    """How much to measure for each seed: streams and how many rounds of them."""

    rounds: tuple[tuple[int, int], ...]
    tokens: int


FULL = Size(((1, 6), (8, 3), (32, 1)), 64)
QUICK = Size(((1, 1), (2, 1)), 8)


def _names(streams: int) -> dict[str, str]:
    plural = f"{streams} stream{'s' if streams > 1 else ''}"
    return {
        "ratio": f"throughput through / direct, {plural}",
        "through": f"tokens per second through, {plural}",
        "direct": f"tokens per second direct, {plural}",
        "first through": f"time to first token through, p50, {plural}",
        "first direct": f"time to first token direct, p50, {plural}",
        "each through": f"time per output token through, p50, {plural}",
        "each direct": f"time per output token direct, p50, {plural}",
    }


def measures(size: Size) -> dict[str, Measure]:
    """What a run fills in."""
    found = []
    for streams, _ in size.rounds:
        names = _names(streams)
        found.append(Measure("P5", names["ratio"], "", floor=0.95, goal=0.98, more_is_better=True))
        found += [Measure("P5", names[name], "/s") for name in ("through", "direct")]
        found += [Measure("P5", name, "ms") for key, name in names.items() if key.startswith(("first", "each"))]
    return {measure.name: measure for measure in found}


async def run(settings: Settings, name: str, seeds: int, size: Size, say: Callable[[str], None]) -> Report:
    """Measure each number of streams with an engine that has a slot for each of them."""
    model = Catalog(settings).get(name)
    if not isinstance(model, LlamaCppModel) or model.options.embeddings:
        raise SetupError(f"{name} is no llama.cpp chat model. Choose one with `forebay models list`.")
    path = place_of(settings, name)
    report = Report("chat", seeds, measures(size))
    for streams, rounds in size.rounds:
        sized = model.model_copy(update={"slots": max(model.slots, streams), "source": f"file:{path}"})
        async with staged(name, sized, path, _settings(name, sized)) as stage:
            await _once(stage.engine, "warm", streams, _WARM_UP_TOKENS)
            await _once(stage.server, "warm", streams, _WARM_UP_TOKENS)
            for seed in range(1, seeds + 1):
                say(f"seed {seed}: {streams} streams, {sized.slots} slots")
                await _measure(stage, seed, streams, rounds, size.tokens, report)
    report.notes += [
        f"{name}, default settings, {size.tokens} new tokens each, no prompt twice on one engine.",
        "There are as many slots as in the catalogue, or as many as streams where these are more.",
        "Client, server and both engines share the machine's cores; one engine is idle while the other is measured.",
    ]
    return report


def _settings(name: str, model: LlamaCppModel) -> str:
    lines = [
        "default_models = false",
        f'[models."{name}"]',
        'engine = "llama.cpp"',
        f'source = "{model.source}"',
        "preload = true",
        f"slots = {model.slots}",
        f'[models."{name}".options]',
        f"context = {model.options.context}",
    ]
    return "\n".join(lines) + "\n"


async def _measure(stage: Stage, seed: int, streams: int, rounds: int, tokens: int, report: Report) -> None:
    """Rounds on both sides in turns; each round asks both for the same."""
    replies: dict[str, list[Reply]] = {"through": [], "direct": []}
    seconds = {"through": 0.0, "direct": 0.0}
    for number in range(rounds):
        order = (stage.engine, stage.server) if (number + seed) % 2 else (stage.server, stage.engine)
        for target in order:
            got, took = await _once(target, f"{seed}.{number}", streams, tokens)
            replies[target.name] += got
            seconds[target.name] += took
    names, rates = _names(streams), {}
    for side, got in replies.items():
        report.count(reply.trouble for reply in got)
        rates[side] = sum(reply.tokens for reply in got) / seconds[side]
        report.add(names[side], rates[side])
        report.add(names[f"first {side}"], 1000 * percentile([reply.first_token_seconds for reply in got], 0.5))
        report.add(names[f"each {side}"], 1000 * percentile([reply.token_seconds for reply in got], 0.5))
    report.add(names["ratio"], rates["through"] / rates["direct"])


async def _once(target: Target, salt: str, streams: int, tokens: int) -> tuple[list[Reply], float]:
    """All streams at once; the replies and the seconds until the last one ended."""
    began = now()
    requests = [
        target.request(
            f"{salt}.{number}: Write a long and detailed story about {_TOPICS[number % len(_TOPICS)]}.",
            tokens,
            stream=True,
        )
        for number in range(streams)
    ]
    replies = await asyncio.gather(*(target.ask(request) for request in requests))
    return replies, now() - began
