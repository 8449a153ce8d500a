"""Every log event and metric by name, in one table each.

It refuses labels that a client chooses freely: only configured model names, fixed words and status codes become labels.
"""

import asyncio
import json
import logging
import sys
from collections.abc import Iterable, MutableMapping
from contextvars import ContextVar
from typing import Any, Literal

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

request_id: ContextVar[str] = ContextVar("request_id", default="")

EVENTS = {
    "server.started": "The server listens.",
    "server.ready": "Every preloaded model is up.",
    "server.stopping": "A stop was asked for; running requests may finish.",
    "server.stopped": "Everything is closed.",
    "request.finished": "One HTTP request, with its status and times.",
    "request.failed": "A request ended in a fault of the server or an engine.",
    "request.bug": "A request ended in an exception that nobody foresaw. This is a bug.",
    "engine.starting": "An engine process was launched.",
    "engine.ready": "An engine answers its readiness probe.",
    "engine.died": "An engine process ended without being asked to; its last lines are attached.",
    "engine.stopped": "An engine process ended as asked.",
    "engine.asleep": "An engine has given the memory of its device to another model, and keeps its process.",
    "engine.woken": "An engine that slept serves again.",
    "engine.sleepless": "An engine that was to sleep does not; it ends instead.",
    "engine.condemned": "An engine is to be replaced because it did not stop a request or does not answer.",
    "engine.held_back": "An engine that died is not started again before the machine is well; the reason says why it is not.",
    "engine.slots_halved": "An engine ran out of memory and starts again with fewer slots.",
    "engine.slots_restored": "The cool-down after running out of memory is over.",
    "engine.paused": "An engine with batch work alone stands still for online work on its device.",
    "engine.resumed": "An engine that stood still goes on.",
    "pace.changed": "How much batch work may run beside online work on a device.",
    "engine.line": "A line that an engine printed, with the ids of the requests in flight on it.",
    "engine.no_tools_probe": "An engine did not say what its chat template can do.",
    "model.state": "A model changed its state.",
    "model.waiting": "A model waits for memory, and for whom.",
    "model.refused": "There will be no memory for a model, whoever leaves; the reason has the arithmetic.",
    "model.swapped": "A model leaves its memory to another.",
    "model.idle": "A model is unloaded because nobody has asked for it.",
    "memory.gate_closed": "The machine has little memory left, or a hot GPU: it loads nothing, and batch work waits.",
    "memory.gate_opened": "The machine loads models again.",
    "memory.crowded": "Models that are loaded at the start came to more together than there is; they take turns.",
    "memory.unmeasured": "The memory of this machine cannot be measured; the last figures count on.",
    "memory.peaks_away": "What models came to hold cannot be read from the database or written to it; it is tried again.",
    "model.pulling": "A model's file is being fetched.",
    "model.pull_failed": "A model's file could not be fetched.",
    "upstream.circuit_opened": "A provider failed several times in a row and is left alone for a while.",
    "upstream.circuit_closed": "A provider answers again.",
    "input.quarantined": "An input was in flight at two engine deaths and is refused for a while.",
    "supervisor.bug": "A step of the supervisor ended in an exception that nobody foresaw. This is a bug.",
    "key.created": "A first API key was made.",
    "intake.token_refused": "A signed token of a push platform was refused, and why.",
    "intake.keys_away": "The keys that a push platform signs with cannot be fetched; those that are known count on.",
    "job.attempt_failed": "An attempt at a job failed; the job is tried again, or given up.",
    "job.lease_lost": "Another worker has the job; what this one did of it since its last segment is dropped.",
    "job.rescued": "Jobs were taken back from a worker that is gone.",
    "job.bug": "An attempt at a job ended in an exception that nobody foresaw. This is a bug.",
    "worker.store_away": "The database does not answer; the worker tries again.",
    "worker.store_back": "The database answers again.",
    "store.cut_off": "Sessions of processes that stand still in the middle of a statement were ended.",
    "usage.journal_failed": "What was used cannot be appended to the journal; it waits in memory for the database.",
    "usage.fold_failed": "What was used cannot be added up in the database; the next round tries again.",
    "usage.torn": "The journal of a dead process ends in something that is no record.",
    "usage.unknown_project": "The journal of a dead process tells of projects that the database does not have; they are left out.",
    "pruner.removed": "What had outlived its time was removed.",
    "pruner.failed": "A sweep met trouble; the next round tries again.",
}

_EVENT_WIDTH = 24
_BREAKS = frozenset(" \t=\r\n\"'")  # what has one of these is quoted
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The metrics of one server. Counts are since its start; times are in seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by model and outcome.", "model", "capability", "code")
        self.rejections = self._counter("rejections", "Requests turned away before they ran.", "model", "reason")
        self.cancellations = self._counter("cancellations", "Requests stopped before their end.", "model", "reason")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens read.", "model")
        self.completion_tokens = self._counter("completion_tokens", "Tokens written.", "model")
        self.swaps = self._counter("swaps", "Engines that left memory for another model.", "model")
        self.queue_wait = self._histogram("queue_wait_seconds", "Time in line, of online requests.", "model")
        self.first_token = self._histogram("time_to_first_token_seconds", "Admission to first content.", "model")
        self.token_time = self._histogram("time_per_output_token_seconds", "Mean gap between tokens.", "model")
        self.duration = self._histogram("request_seconds", "Arrival to last byte.", "model")
        self.running = self._gauge("running", "Places in use.", "model")
        self.waiting = self._gauge("waiting", "Online requests in line.", "model")
        self.slots = self._gauge("slots", "Places there are.", "model")
        self.batch_running = self._gauge("batch_running", "Places in use by batch work.", "model")
        self.batch_waiting = self._gauge("batch_waiting", "Lines of batches that wait for a place.", "model")
        self.preemptions = self._counter("preemptions", "Places taken back from batch work.", "model")
        self.resumes = self._counter("resumes", "Lines that went on, or could not.", "model", "outcome")
        self.resumed_tokens = self._counter("resumed_tokens", "Tokens not written twice.", "model")
        self.pace_level = self._gauge(
            "pace_level", "Places of batch work that do no harm beside online work.", "device"
        )
        self.paused = self._gauge("paused_engines", "Engines that stand still for online work.", "device")
        self.paused_seconds = self._counter("paused_seconds", "Time that engines stood still.", "device")
        self.memory_total = self._gauge("memory_total_bytes", "What engines may take in all.", "device")
        self.memory_available = self._gauge("memory_available_bytes", "What nobody has taken.", "device")
        self.memory_measured = self._gauge("memory_measured_bytes", "What engines hold.", "model", "device")
        self.memory_charged = self._gauge("memory_charged_bytes", "What is reserved for engines.", "model", "device")
        self.memory_peak = self._gauge("memory_peak_bytes", "The most one process came to.", "model", "device")
        self.memory_gate = self._gauge("memory_gate_open", "Whether the machine is well enough to load models.")
        self.host_cpu = self._gauge("host_cpu_share", "Share of the processors in use.")
        self.celsius = self._gauge("celsius", "Temperature of the hottest sensor.", "device")
        self.gpu_utilisation = self._gauge("gpu_utilisation_share", "Share of the time that a GPU computes.", "device")
        self.engine_starts = self._counter("engine_starts", "Engine processes launched.", "model")
        self.engine_deaths = self._counter("engine_deaths", "Engine processes that ended unasked.", "model", "kind")
        self.quarantined = self._counter("quarantined_inputs", "Inputs put into quarantine.", "model")
        self.batch_lines = self._counter("batch_lines", "Lines of batches, by outcome.", "model", "outcome")
        self.upstream_circuit = self._gauge(
            "upstream_circuit", "Circuit of a provider: 0 closed, 1 one request tries, 2 open.", "model"
        )
        self.upstream_failures = self._counter("upstream_failures", "Failures of a provider.", "model", "reason")
        self.upstream_retries = self._counter("upstream_retries", "Requests sent to a provider once more.", "model")
        self.fallbacks = self._counter("fallbacks", "Requests that went to another model.", "model", "to")
        self.embedding_items = self._counter(
            "embedding_items", "Inputs and documents: known, computed for another, computed.", "model", "outcome"
        )
        self.embedding_cache_bytes = self._gauge("embedding_cache_bytes", "Memory of kept vectors and scores.")
        self.jobs_live = self._gauge("jobs", "Unfinished jobs, by kind and state.", "kind", "state")
        self.jobs_settled = self._counter("jobs_settled", "Attempts at jobs, by how they ended.", "kind", "outcome")
        self.jobs_rescued = self._counter("jobs_rescued", "Jobs taken back from workers that are gone.")
        self.jobs_stuck = self._gauge("jobs_stuck", "Running jobs without progress for `jobs.stuck_seconds`.")
        self.loop_lag = Histogram(
            "forebay_event_loop_lag_seconds", "Delay of a timer.", registry=self.registry, buckets=_SECONDS
        )
        self.tasks = Gauge("forebay_tasks", "Asyncio tasks alive.", registry=self.registry)
        self.connections = Gauge("forebay_connections", "Open client connections.", registry=self.registry)
        self.connections_closed = self._counter("connections_closed", "Connections closed by a limit.", "reason")

    def render(self) -> bytes:
        """The exposition text for Prometheus."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"forebay_{name}_total", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"forebay_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"forebay_{name}", text, labels, registry=self.registry, buckets=_SECONDS)


class Log:
    """Writes events of the table above; an event that is not in it is a mistake of ours."""

    def __init__(self) -> None:
        self._logger = structlog.get_logger("forebay")

    def debug(self, event: str, **fields: Any) -> None:
        """Write at level debug."""
        self._write("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Write at level info."""
        self._write("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Write at level warning."""
        self._write("warning", event, fields)

    def error(self, event: str, *, exc_info: bool = False, **fields: Any) -> None:
        """Write at level error."""
        if exc_info:
            fields["exc_info"] = True
        self._write("error", event, fields)

    def _write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        assert event in EVENTS, event
        current = request_id.get()
        if current:
            fields.setdefault("request_id", current)
        getattr(self._logger, level)(event, **fields)


def _forms(secret: str) -> set[str]:
    """How `secret` may stand in a line: as it is, or escaped by one of the renderers."""
    return {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]} if secret else set()


def text_line(_logger: Any, _method: str, fields: MutableMapping[str, Any]) -> str:
    """A line as structlog's own renderer writes it without colours, which takes as long as all else that is done for it."""
    trouble = fields.pop("exception", None)
    line = f"{fields.pop('timestamp')} [{fields.pop('level'):<9}] {fields.pop('event'):<{_EVENT_WIDTH}} "
    line += " ".join(f"{name}={_word(fields[name])}" for name in sorted(fields))
    line = line.rstrip(" ")
    return line if trouble is None else f"{line}\n{trouble}"


def _word(value: Any) -> str:
    return value if isinstance(value, str) and _BREAKS.isdisjoint(value) else repr(value)


def configure(form: Literal["text", "json"], level: str, secrets: Iterable[str] = ()) -> None:
    """Set up logging for the process; `secrets` are struck out wherever they turn up in a line."""
    hidden = sorted({form for secret in secrets for form in _forms(secret)}, key=len, reverse=True)
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if form == "json"
        else structlog.dev.ConsoleRenderer(colors=True, pad_event_to=_EVENT_WIDTH)
        if sys.stderr.isatty()
        else text_line
    )

    def strike_out(_logger: Any, _method: str, rendered: Any) -> str:
        line = str(rendered)
        for secret in hidden:
            line = line.replace(secret, "***")
        return line

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
            strike_out,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_trouble)


def _is_trouble(record: logging.LogRecord) -> bool:
    """Not what a library writes of a caller who left in the middle: it has tidied up, and an operator can do nothing."""
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)
