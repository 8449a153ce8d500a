"""Asks engines that count for themselves for their figures, and gives them labels.

It refuses to pass on anything but numbers under the names of its table, and to wait for an engine that does not answer.
"""

import asyncio
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import aiohttp
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from forebay.replicas.replica import Replica

NAMES = {
    "forebay_engine_requests_total": "Requests of which a batch took something.",
    "forebay_engine_wait_seconds_total": "Time until a batch first took something of a request, summed over requests.",
    "forebay_engine_batches_total": "Batches.",
    "forebay_engine_items_total": "Texts in batches, or chunks of recordings.",
    "forebay_engine_tokens_total": "Tokens in batches, without padding.",
    "forebay_engine_padded_tokens_total": "Tokens in batches, with padding.",
    "forebay_engine_step_seconds_total": "Time spent on batches that were computed.",
    "forebay_engine_out_of_memory_total": "Batches that needed more memory than there was.",
    "forebay_engine_cancelled_total": "Requests given up before their end.",
    "forebay_engine_items_waiting": "Texts or chunks of recordings that no batch has taken yet.",
    "forebay_engine_requests_running": "Requests that are not finished.",
    "forebay_engine_batch_budget_tokens": "Padded tokens that a batch may have now.",
    "forebay_engine_batch_budget_chunks": "Chunks of recordings that a batch may have now.",
    "forebay_engine_batch_budget_windows": "Windows of voices that a batch may have now.",
    "forebay_engine_audio_seconds_total": "Seconds of speech that were written down, or in which voices were looked for.",
    "forebay_engine_pictures_total": "Pictures that were painted.",
    "forebay_engine_pictures_running": "Pictures that are being painted.",
    "forebay_engine_pictures_waiting": "Pictures that are not begun yet.",
    "forebay_engine_steps_total": "Steps, each of a whole batch of pictures.",
    "forebay_engine_picture_steps_total": "Steps of each picture.",
    "forebay_engine_paint_seconds_total": "Time spent painting.",
    "forebay_engine_savings": "Ways to do with less memory that are on now.",
    "forebay_engine_savings_total": "Ways to do with less memory that were switched on.",
    "forebay_engine_failed_total": "Requests for pictures that failed in the engine.",
    "forebay_engine_child_restarts_total": "Compute processes that ended or were ended, and started again.",
}
_SECONDS = 1.0
_BYTES_MAX = 65_536
_LABELS = ("model", "replica")
_LINE = re.compile(r"(forebay_engine_[a-z_]+) (\d+(?:\.\d+)?(?:e[+-]?\d+)?)")


async def gather(asked: Iterable[tuple[Replica, aiohttp.ClientSession]]) -> bytes:
    """The figures of all that answer, as text for Prometheus; empty when there are none."""
    asked = list(asked)
    texts = await asyncio.gather(*(_ask(*each) for each in asked))
    told = {(replica.model, replica.id): read(text) for (replica, _), text in zip(asked, texts, strict=True)}
    registry = CollectorRegistry()
    registry.register(_Told(told))
    return generate_latest(registry)


def read(text: str) -> dict[str, float]:
    """The known figures in what an engine says."""
    found = (_LINE.fullmatch(line) for line in text.splitlines())
    return {match[1]: float(match[2]) for match in found if match and match[1] in NAMES}


async def _ask(replica: Replica, session: aiohttp.ClientSession) -> str:
    """What the engine says; nothing when it says nothing in time, or too much."""
    url, said = replica.address + replica.traits.metrics_path, b""
    timeout = aiohttp.ClientTimeout(total=_SECONDS)
    try:
        async with session.get(url, headers=replica.headers, timeout=timeout, allow_redirects=False) as response:
            if response.status != 200:
                return ""
            async for piece in response.content.iter_any():
                said += piece
                if len(said) > _BYTES_MAX:
                    return ""
    except (aiohttp.ClientError, OSError, TimeoutError):
        return ""
    return said.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True, eq=False)
class _Told:
    """What engines told, by model and replica, as Prometheus wants to collect it."""

    figures: Mapping[tuple[str, str], Mapping[str, float]]

    def collect(self) -> Iterator[Metric]:
        for name, meaning in NAMES.items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            metric = family(name, meaning, labels=_LABELS)
            for labels, figures in self.figures.items():
                if name in figures:
                    metric.add_metric(labels, figures[name])
            if metric.samples:
                yield metric
