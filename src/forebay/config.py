"""Settings: one frozen tree, read once from `forebay.toml` and `FOREBAY_*`, passed down by value.

It refuses an unknown key, naming the nearest known one, and no other room reads the environment.
"""

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from forebay.errors import SetupError
from forebay.inference import Capability

MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$"
FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"
_SECRET_BYTES_MAX = 65_536

Seconds = Annotated[float, Field(gt=0, le=604_800)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Bytes = Annotated[int, Field(ge=1, le=2**50)]
Capabilities = Annotated[tuple[Capability, ...], Field(min_length=1)]
_TEXT = (Capability.CHAT, Capability.COMPLETION)
_SERVED = "What it serves: `chat`, `completion`, `embedding`, `rerank`."
_LOGITS = "Its rerank scores are raw logits, and not between 0 and 1 already."


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class HttpSettings(_Section):
    """The front door: sizes, deadlines and numbers of connections."""

    body_bytes_max: Bytes = Field(8 * 2**20, description="Largest request body; a larger one gets 413.")
    header_bytes_max: Bytes = Field(32 * 2**10, description="Largest request head (request line and headers).")
    header_timeout_seconds: Seconds = Field(
        10, description="Time for a whole request head to arrive; then the connection closes."
    )
    body_timeout_seconds: Seconds = Field(
        25, description="Time for a whole request body to arrive, counted from the first byte of the request."
    )
    keep_alive_seconds: Seconds = Field(15, description="How long an idle connection is kept.")
    write_stall_seconds: Seconds = Field(
        20, description="A reader that takes no bytes for this long is cut off and its work cancelled."
    )
    connections_max: Count = Field(4096, description="Open connections in all; further ones are closed at once.")
    connections_per_address_max: Count = Field(
        1024, description="Open connections from one address; further ones are closed at once."
    )


class SchedulerSettings(_Section):
    """The hallway: how those who wait are ordered."""

    ageing_seconds: Seconds = Field(
        15, description="A waiting request gains one priority level each time this long has passed, so nobody starves."
    )
    retry_after_seconds_max: Annotated[float, Field(gt=0, le=120)] = Field(
        60, description="Upper bound of the Retry-After header; clients give up above 120."
    )
    headroom_seconds: Seconds = Field(
        10, description="Batch work leaves free what online traffic asked for at once in this long, and one place more."
    )
    preempt: bool = Field(
        True,
        description="Take places back from batch work, which runs again later, when online requests wait for them.",
    )
    batch_floor_seconds: Seconds = Field(
        120, description="Batch work that has not been served for this long gets one place, and keeps it to the end."
    )


class SupervisorSettings(_Section):
    """The machine room: how engines are started, watched, stopped and replaced."""

    tick_seconds: Seconds = Field(0.5, description="How often desired and actual state are compared.")
    start_timeout_seconds: Seconds = Field(
        300, description="Time for an engine to become ready; then it is killed and counted as a failed start."
    )
    stall_seconds: Seconds = Field(
        30,
        description="An engine that answers no probe, or a stream that makes no progress, for this long is taken for hung.",
    )
    cancel_grace_seconds: Seconds = Field(
        10, description="Time for an engine to stop a cancelled request; after it the engine is replaced."
    )
    stop_grace_seconds: Seconds = Field(
        5, description="Time for an engine process to exit after SIGTERM before SIGKILL."
    )
    backoff_seconds_min: Seconds = Field(
        0.25, description="Wait before the first restart of a dead engine; it doubles with each death in a row."
    )
    backoff_seconds_max: Seconds = Field(60, description="Longest wait before a restart.")
    healthy_seconds: Seconds = Field(60, description="An engine that lived this long starts again without back-off.")
    oom_cooldown_seconds: Seconds = Field(
        300, description="How long an engine runs with half its slots after it ran out of memory."
    )
    quarantine_seconds: Seconds = Field(
        600, description="How long an input that was in flight at two engine deaths is refused."
    )
    quarantine_entries_max: Count = Field(10_000, description="How many suspect inputs are remembered.")
    log_lines_max: Count = Field(200, description="Lines of an engine's output that are kept for its post-mortem.")
    log_line_bytes_max: Bytes = Field(2048, description="Longest engine line; the rest is cut.")


class AuthSettings(_Section):
    """Keys and rates."""

    key_cache_seconds: Seconds = Field(
        5, description="How long a key that was looked up is trusted; also the longest a revoked key works on."
    )
    key_cache_entries_max: Count = Field(10_000, description="Keys, known and unknown, that are kept in memory.")
    failures_per_minute_max: Count = Field(600, description="Failed key checks from one address in a minute; then 429.")


class PullSettings(_Section):
    """Getting model files."""

    auto: bool = Field(True, description="Pull a model on first use; otherwise only `forebay models pull` does.")
    hub_url: str = Field("https://huggingface.co", description="Where `hf:` sources are fetched from.")
    hub_token: SecretStr | None = Field(None, description="Token for gated `hf:` sources.")
    hub_token_file: Path | None = Field(None, description="File that holds the hub token.")
    timeout_seconds: Seconds = Field(
        60, description="Longest silence of a download before it is tried again from where it stopped."
    )
    attempts_max: Annotated[int, Field(ge=1, le=100)] = Field(
        5, description="Attempts in a row that bring less than 16 MiB each before the pull fails."
    )
    free_bytes_min: Annotated[int, Field(ge=0)] = Field(
        512 * 2**20, description="Disk space that must be left over after a pull."
    )


class JobSettings(_Section):
    """The back office: who works on durable jobs, how long, how often."""

    enabled: bool = Field(
        True, description="Work on jobs inside `forebay serve`; otherwise only `forebay worker` does."
    )
    lease_seconds: Seconds = Field(
        15, description="How long a worker that is not heard of keeps a job; it renews three times as often."
    )
    poll_seconds: Seconds = Field(1, description="How often a worker looks for jobs that nobody told it of.")
    live_max: Count = Field(
        100_000,
        description="Unfinished jobs in all; a submit beyond it gets 429. Processes that share a database count each other's once a second.",
    )
    batches_at_once: Annotated[int, Field(ge=1, le=64)] = Field(
        2, description="Batches that one worker checks or puts together at once."
    )
    chunks_at_once: Annotated[int, Field(ge=1, le=256)] = Field(
        4,
        description="Chunks of batches that one worker runs at once; one for a model whose chunks fail, until one of them gets on.",
    )
    webhooks_at_once: Annotated[int, Field(ge=1, le=256)] = Field(
        16,
        description="Webhooks that one worker delivers at once; the project with the fewest on their way goes first.",
    )
    attempts_max: Annotated[int, Field(ge=1, le=100)] = Field(
        5, description="Failed attempts without progress before a job is given up."
    )
    rescues_max: Annotated[int, Field(ge=1, le=1000)] = Field(
        20, description="Workers that may die on a job without progress before it is given up."
    )
    backoff_seconds_min: Seconds = Field(1, description="Wait after a first failed attempt; it doubles with each.")
    backoff_seconds_max: Seconds = Field(300, description="Longest wait between attempts.")
    group_wait_seconds: Seconds = Field(
        60, description="Longest time that chunks of other models wait while a worker stays with a loaded one."
    )
    stuck_seconds: Seconds = Field(300, description="A running job without progress for this long raises the alarm.")
    drain_seconds: Annotated[float, Field(ge=0, le=25)] = Field(
        5, description="Time for running jobs to write down what they have at shutdown; the rest runs again."
    )
    keep_seconds: Annotated[float, Field(gt=0, le=315_360_000)] = Field(
        2_592_000, description="How long finished jobs, their logs and dead letters are kept."
    )
    prune_seconds: Seconds = Field(60, description="How often what has expired is removed.")
    prune_rows_max: Count = Field(1000, description="Rows of a kind that are removed at once.")
    log_lines_max: Count = Field(200, description="Log lines that are kept of one job.")
    watchers_max: Count = Field(200, description="Open streams of job events; further ones get 429.")
    watch_seconds: Seconds = Field(0.5, description="How often a stream of job events looks for news.")


class BatchSettings(_Section):
    """Batches: how large, how they are cut, how often a line is tried."""

    lines_max: Count = Field(50_000, description="Lines of one batch.")
    bytes_max: Bytes = Field(200 * 2**20, description="Size of one input file.")
    line_bytes_max: Bytes = Field(8 * 2**20, description="Size of one line.")
    live_per_project_max: Count = Field(100, description="Unfinished batches of one project; a further one gets 429.")
    chunk_lines: Annotated[int, Field(ge=1, le=10_000)] = Field(256, description="Lines that are leased together.")
    segment_lines: Annotated[int, Field(ge=1, le=10_000)] = Field(
        128,
        description="Results of one worker that are not written yet, at most; a crash makes these lines run again.",
    )
    segment_bytes: Bytes = Field(4 * 2**20, description="Size of such results at which they are written at once.")
    segment_seconds: Seconds = Field(1, description="Longest time that a result waits to be written.")
    line_attempts_max: Annotated[int, Field(ge=1, le=20)] = Field(
        3, description="Attempts at a line whose engine fails; then it is an error line and a dead letter."
    )
    line_backoff_seconds: Seconds = Field(0.5, description="Wait before a line is tried again; it doubles with each.")
    window_seconds_min: Seconds = Field(10, description="Shortest `completion_window`.")


class FileSettings(_Section):
    """Files and Uploads."""

    bytes_max: Bytes = Field(512 * 2**20, description="Size of one file; a larger one gets 413.")
    upload_bytes_max: Bytes = Field(8 * 2**30, description="Size of a file that is put together from parts.")
    part_bytes_max: Bytes = Field(64 * 2**20, description="Size of one part.")
    parts_max: Annotated[int, Field(ge=1, le=10_000)] = Field(1024, description="Parts of one upload.")
    project_bytes_max: Bytes = Field(256 * 2**30, description="Bytes in files of one project; more gets 507.")
    free_bytes_min: Annotated[int, Field(ge=0)] = Field(
        256 * 2**20, description="Disk space that must be left over; a file that would go below it gets 507."
    )
    batch_keep_seconds: Annotated[int, Field(ge=3600, le=315_360_000)] = Field(
        2_592_000, description="How long files for batches are kept where their creator does not say."
    )
    upload_keep_seconds: Seconds = Field(3600, description="How long an upload may take.")
    receive_bytes_per_second_min: Bytes = Field(
        16_384,
        description="Slowest sender of a file or part, after `http.body_timeout_seconds`; a slower one is cut off.",
    )


class BlobSettings(_Section):
    """The cellar: where the bytes of files and results are."""

    url: str | None = Field(
        None,
        pattern=r"^(s3://|file:)",
        description="`s3://bucket/prefix` or `file:/folder`; `blobs` inside the data folder if absent.",
    )
    endpoint: str | None = Field(None, description="Address of an S3-compatible store; Amazon's own if absent.")
    region: str | None = Field(None, description="Region of the bucket.")
    access_key_id: str | None = Field(None, description="Access key; the usual AWS variables and roles if absent.")
    secret_access_key: SecretStr | None = Field(None, description="Secret of the access key.")
    secret_access_key_file: Path | None = Field(None, description="File that holds the secret of the access key.")
    allow_http: bool = Field(False, description="Speak plain HTTP to the endpoint.")
    timeout_seconds: Seconds = Field(30, description="Longest wait for one answer of the store.")
    retries_max: Annotated[int, Field(ge=0, le=20)] = Field(3, description="Further tries after an answer of 5xx.")


class ResponseSettings(_Section):
    """Responses that are kept, and those that run in the background."""

    keep_seconds: Annotated[float, Field(gt=0, le=315_360_000)] = Field(
        2_592_000, description="How long a response is kept after it was made or last continued."
    )
    per_project_max: Count = Field(10_000, description="Responses of one project that are kept; the oldest go first.")
    project_bytes_max: Bytes = Field(
        1 * 2**30, description="Bytes in responses of one project that are kept; the oldest go first."
    )
    bytes_max: Bytes = Field(
        16 * 2**20, description="Size of one response with its request and its events; a larger one is not kept."
    )
    turns_max: Annotated[int, Field(ge=1, le=10_000)] = Field(
        500, description="Responses of one conversation that `previous_response_id` goes back."
    )
    conversation_bytes_max: Bytes = Field(
        8 * 2**20, description="Size of the conversation that `previous_response_id` brings back."
    )
    background_at_once: Annotated[int, Field(ge=1, le=256)] = Field(
        4, description="Responses that one worker runs in the background at once."
    )
    live_per_project_max: Count = Field(
        1000, description="Unfinished responses in the background of one project; a further one gets 429."
    )
    background_seconds_max: Seconds = Field(
        86_400, description="How long a response in the background may wait for its model before it fails."
    )
    events_seconds: Annotated[float, Field(gt=0, le=10)] = Field(
        0.2, description="How often the events of a response in the background are written down."
    )


class WebhookSettings(_Section):
    """Telling others that a job has ended."""

    endpoints_max: Annotated[int, Field(ge=1, le=1000)] = Field(20, description="Webhook endpoints of one project.")
    timeout_seconds: Seconds = Field(20, description="Time for a receiver to answer.")
    response_bytes_max: Bytes = Field(16_384, description="Bytes of an answer that are read.")
    secret_overlap_seconds: Annotated[float, Field(ge=0, le=604_800)] = Field(
        86_400, description="How long an old secret still signs after a rotation."
    )


class OutboundSettings(_Section):
    """The one way out to addresses that users supply."""

    allowed_networks: tuple[str, ...] = Field(
        (), description="Networks such as `10.0.0.0/8` that may be reached although they are not public."
    )
    connect_timeout_seconds: Seconds = Field(5, description="Time to resolve and to reach an address.")


class MediaSettings(_Section):
    """Images in requests: where they may come from, and what one may be and cost."""

    fetch_hosts: tuple[str, ...] = Field(
        (),
        description="Hosts that images are fetched from: `images.example.com`, `*.example.com`, or `*` for every public one. Without any, nothing is fetched.",
    )
    fetch_timeout_seconds: Seconds = Field(10, description="Time to fetch one image.")
    fetches_at_once: Annotated[int, Field(ge=1, le=256)] = Field(8, description="Images that are fetched at once.")
    images_max: Annotated[int, Field(ge=1, le=256)] = Field(16, description="Images of one request.")
    image_bytes_max: Bytes = Field(20 * 2**20, description="Size of one image file; a larger one gets 413.")
    request_bytes_max: Bytes = Field(50 * 2**20, description="Size of all image files of one request.")
    pixels_max: Annotated[int, Field(ge=1, le=2**30)] = Field(
        40_000_000, description="Pixels of one image, by its header; more gets 413."
    )
    frames_max: Annotated[int, Field(ge=1, le=10_000)] = Field(
        1, description="Frames of one animation; a model sees the first."
    )
    edge_pixels_max: Annotated[int, Field(ge=64, le=16_384)] = Field(
        2048, description="Longest side that an engine is given; a larger image is scaled down."
    )
    low_edge_pixels_max: Annotated[int, Field(ge=64, le=16_384)] = Field(
        512, description="The same for an image with `detail` `low`."
    )
    checks_at_once: Annotated[int, Field(ge=1, le=64)] = Field(
        2, description="Images that are decoded at once, each in a process of its own."
    )
    check_seconds_max: Annotated[int, Field(ge=1, le=60)] = Field(
        10, description="Processor time for one image; the wait for it is twice as long at most."
    )
    check_memory_bytes_max: Annotated[int, Field(ge=128 * 2**20, le=2**36)] = Field(
        768 * 2**20, description="Address space for decoding one image."
    )


class EmbeddingSettings(_Section):
    """Vectors and scores that are kept, so that the same text is not computed twice."""

    cache_bytes: Annotated[int, Field(ge=0, le=2**40)] = Field(
        128 * 2**20, description="Memory of each process for kept vectors and scores; 0 keeps none."
    )


class RehearsalSettings(_Section):
    """For rehearsing a crash, never for service."""

    kill_at: str | None = Field(
        None, description="Commit point, or `name:n` for its n-th passing, at which the process kills itself."
    )


class LogSettings(_Section):
    """What is written to standard error."""

    format: Literal["text", "json"] = Field("text", description="`text` for people, `json` for machines.")
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level that is written."
    )
    access: bool = Field(True, description="One line for each request.")


class LlamaCppOptions(_Section):
    """Options of the `llama.cpp` engine."""

    context: Annotated[int, Field(ge=256, le=4_194_304)] = Field(2048, description="Context in tokens of each slot.")
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(0, description="CPU threads; 0 takes one per core.")
    gpu_layers: Annotated[int, Field(ge=-1, le=10_000)] = Field(
        -1, description="Layers on the GPU; -1 lets llama.cpp fit as many as there is room for."
    )
    tensor_split: tuple[Annotated[float, Field(ge=0)], ...] = Field((), description="Share of the model on each GPU.")
    main_gpu: Annotated[int, Field(ge=0, le=127)] = Field(0, description="GPU for a model that is not split.")
    kv_type: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = Field(
        "f16", description="Number type of the KV cache."
    )
    flash_attention: Literal["auto", "on", "off"] = Field(
        "auto", description="Flash attention; a quantised KV cache needs it."
    )
    batch: Annotated[int, Field(ge=32, le=65_536)] = Field(
        512, description="Most tokens in one decoding step; a cancelled prompt stops after one."
    )
    cache_ram_bytes: Annotated[int, Field(ge=0)] = Field(
        512 * 2**20, description="Memory for cached prompts outside the slots."
    )
    chat_template_file: Path | None = Field(None, description="Jinja chat template that replaces the model's own.")
    embeddings: bool = Field(False, description="Serve embeddings instead of text.")
    rerank: bool = Field(
        False, description="Serve rerank instead of text; for models that score a query with a document."
    )
    pooling: Literal["model", "mean", "cls", "last"] = Field(
        "model", description="How the vectors of tokens become that of a text; `model` leaves it to the file."
    )
    mmproj_file: Path | None = Field(
        None,
        description="GGUF file of the image encoder (`mmproj`) that belongs to the model; with it, it takes images.",
    )


class OnnxOptions(_Section):
    """Options of the `onnx` engine: text encoders for embeddings and rerank on ONNX Runtime."""

    capability: Literal["embedding", "rerank"] = Field(
        "embedding", description="What the model is for; `rerank` takes a cross-encoder with one logit or two classes."
    )
    context: Annotated[int, Field(ge=8, le=131_072)] = Field(
        512, description="Longest input in tokens that the model takes."
    )
    pooling: Literal["mean", "cls", "last"] = Field(
        "mean", description="How the vectors of tokens become that of a text; see the model's card."
    )
    normalise: bool = Field(True, description="Give vectors the length 1.")
    matryoshka: bool = Field(False, description="The model is trained for fewer `dimensions`; others refuse them.")
    dimensions_min: Annotated[int, Field(ge=1, le=16_384)] = Field(
        32, description="Fewest `dimensions` of a model with `matryoshka`."
    )
    query_prefix: str = Field("", max_length=1024, description="Put before a text that is sent as a query.")
    document_prefix: str = Field("", max_length=1024, description="Put before a text that is sent as a document.")
    tokenizer_file: Path | None = Field(
        None, description="The model's `tokenizer.json`; the one beside the model if absent."
    )
    provider: Literal["cpu", "cuda", "rocm"] = Field(
        "cpu", description="Device; the installed build of onnxruntime has to have it."
    )
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(0, description="CPU threads; 0 takes one per core.")
    batches_at_once: Annotated[int, Field(ge=0, le=64)] = Field(
        0, description="Batches that are computed at once and share the threads; 0 takes 2 on a CPU and 1 on a GPU."
    )
    batch_tokens: Annotated[int, Field(ge=8, le=1_048_576)] = Field(
        512, description="Tokens of one batch with their padding. On a CPU small ones are fastest; a GPU wants 16384."
    )
    small_tokens: Annotated[int, Field(ge=0, le=65_536)] = Field(
        128, description="A request with at most so many tokens does not wait for a running batch, but runs beside it."
    )

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What the model can be asked for."""
        return (Capability(self.capability),)


class CommandOptions(_Section):
    """Options of the `command` engine: any command line that starts an OpenAI-compatible server."""

    argv: tuple[str, ...] = Field(
        min_length=1,
        description="Program and arguments; `{port}`, `{model}` and `{key}` are filled in. Arguments show in the process list, so prefer FOREBAY_ENGINE_KEY from the environment to `{key}`.",
    )
    environment: dict[str, str] = Field(
        {}, description="Further environment variables; `{port}`, `{model}` and `{key}` are filled in."
    )
    health_path: str = Field("/health", pattern="^/", description="Answers 200 when the engine can serve.")
    capabilities: Capabilities = Field(_TEXT, description=_SERVED)
    logits: bool = Field(False, description=_LOGITS)
    remote_model: str | None = Field(None, description="Model name sent to the engine; the catalogue name if absent.")
    vision: bool = Field(False, description="Whether the model takes images in messages.")


class VllmOptions(_Section):
    """Options of the `vllm` engine, a preset of `command`."""

    context: Annotated[int, Field(ge=256, le=4_194_304)] | None = Field(
        None, description="Longest context in tokens; the model's own if absent."
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="Share of GPU memory that vLLM takes."
    )
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = Field(1, description="GPUs that share the model.")
    arguments: tuple[str, ...] = Field((), description="Further arguments for `vllm serve`.")
    capabilities: Capabilities = Field(_TEXT, description=_SERVED)
    vision: bool = Field(False, description="Whether the model takes images in messages.")


class UpstreamOptions(_Section):
    """Options of the `upstream` engine: a server that somebody else runs."""

    base_url: str = Field(pattern=r"^https?://", description="Base URL up to and including `/v1`.")
    key_env: str | None = Field(None, description="Environment variable that holds the key.")
    key_file: Path | None = Field(None, description="File that holds the key.")
    headers: dict[str, str] = Field({}, description="Further request headers.")
    connect_timeout_seconds: Seconds = Field(10, description="Time to reach it.")
    capabilities: Capabilities = Field(_TEXT, description=_SERVED)
    logits: bool = Field(False, description=_LOGITS)
    remote_model: str | None = Field(None, description="Model name sent upstream; the catalogue name if absent.")
    vision: bool = Field(False, description="Whether the model takes images in messages.")


class FakeOptions(_Section):
    """Options of the `fake` engine, a deterministic program for tests and benchmarks."""

    start_delay_seconds: Annotated[float, Field(ge=0, le=600)] = Field(0, description="Time before it is ready.")
    fail_start: Literal["no", "exit", "oom", "never_ready"] = Field("no", description="How its start goes wrong.")
    memory_slots_max: Annotated[int, Field(ge=0)] = Field(
        0, description="Requests at once above which it runs out of memory; 0 never does."
    )
    tools: bool = Field(True, description="Whether its chat template has tools.")
    capabilities: Capabilities = Field(tuple(Capability), description=_SERVED)
    dimensions: Annotated[int, Field(ge=1, le=16_384)] = Field(384, description="Numbers of an embedding.")
    vision: bool = Field(False, description="Whether the model takes images in messages.")


class ModelSettings(_Section):
    """What every model has, whatever its engine."""

    source: str | None = Field(
        None,
        description="Where its file comes from: `hf:repo@revision/file`, `pypi:package==version/file`, `https:…` or `file:…`.",
    )
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="Checksum of the file.")
    size_bytes: Bytes | None = Field(None, description="Size of the file, shown before it is pulled.")
    description: str = Field("", description="A sentence for people.")
    preload: bool = Field(False, description="Load it before the server calls itself ready.")
    replicas: Annotated[int, Field(ge=1, le=64)] = Field(1, description="Engine processes.")
    slots: Annotated[int, Field(ge=1, le=1024)] = Field(
        8, description="Requests that one engine process works on at once."
    )
    queue_places: Annotated[int, Field(ge=0, le=100_000)] = Field(
        32, description="Requests that may wait in line; more get 429."
    )
    queue_timeout_seconds: Seconds = Field(60, description="Longest wait in line; then 429.")
    request_timeout_seconds: Seconds = Field(600, description="Longest run of one request; then 504.")
    max_tokens: Annotated[int, Field(ge=1, le=4_194_304)] = Field(
        1024, description="Completion tokens when the request does not say."
    )
    inputs_max: Annotated[int, Field(ge=1, le=2048)] = Field(2048, description="Inputs of one embeddings request.")
    documents_max: Annotated[int, Field(ge=1, le=10_000)] = Field(
        10_000, description="Documents of one rerank request."
    )
    input_tokens_max: Annotated[int, Field(ge=1, le=10_000_000)] = Field(
        300_000, description="Tokens of one embeddings or rerank request in all."
    )


class LlamaCppModel(ModelSettings):
    """A model in a llama.cpp process of ours."""

    engine: Literal["llama.cpp"]
    options: LlamaCppOptions = LlamaCppOptions()

    @model_validator(mode="after")
    def _has_source(self) -> Self:
        if self.source is None:
            raise ValueError("a llama.cpp model needs a `source`")
        return self


class ModelFile(_Section):
    """A further file of a model: where it comes from, and what it has to be."""

    source: str = Field(description="Where the file comes from, in the forms of a model's `source`.")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="Checksum of the file.")
    size_bytes: Bytes | None = Field(None, description="Size of the file, shown before it is pulled.")


class OnnxModel(ModelSettings):
    """A text encoder in an ONNX Runtime process of ours."""

    engine: Literal["onnx"]
    files: dict[Annotated[str, Field(pattern=FILE_NAME)], ModelFile] = Field(
        {},
        description="Further files that lie beside the model under these names: `tokenizer.json`, `model.onnx_data`.",
    )
    options: OnnxOptions = OnnxOptions()

    @model_validator(mode="after")
    def _has_files(self) -> Self:
        if self.source is None:
            raise ValueError("an onnx model needs a `source`")
        if self.source.startswith("file:") and self.files:
            raise ValueError("a model that lies on this machine has its further files beside it; leave `files` out")
        return self


class CommandModel(ModelSettings):
    """A model behind a command line that starts an OpenAI-compatible server."""

    engine: Literal["command"]
    options: CommandOptions


class VllmModel(ModelSettings):
    """A model in a `vllm serve` process of ours."""

    engine: Literal["vllm"]
    options: VllmOptions = VllmOptions()

    @model_validator(mode="after")
    def _has_source(self) -> Self:
        if self.source is None:
            raise ValueError("a vllm model needs a `source`: `hf:repo@revision` or `file:` and a folder")
        return self


class UpstreamModel(ModelSettings):
    """A model on a server that somebody else runs."""

    engine: Literal["upstream"]
    options: UpstreamOptions


class FakeModel(ModelSettings):
    """A stand-in for a model, for tests and benchmarks."""

    engine: Literal["fake"]
    options: FakeOptions = FakeOptions()


Model = Annotated[
    LlamaCppModel | OnnxModel | CommandModel | VllmModel | UpstreamModel | FakeModel, Field(discriminator="engine")
]


class Settings(_Section):
    """The whole tree."""

    data_dir: Path = Field(Path("data"), description="Folder of the database and whatever else must last.")
    models_dir: Path | None = Field(
        None, description="Folder of the model files; `models` inside the data folder if absent."
    )
    database_url: SecretStr | None = Field(
        None, description="SQLAlchemy URL (`postgresql+asyncpg://…`); SQLite inside the data folder if absent."
    )
    database_url_file: Path | None = Field(None, description="File that holds the database URL.")
    admin_key: SecretStr | None = Field(
        None,
        description="A key with the admin role that needs no database row, for automation; at least 32 characters.",
    )
    admin_key_file: Path | None = Field(None, description="File that holds the admin key.")
    host: str = Field("127.0.0.1", description="Address to listen on; another than loopback needs a key first.")
    port: Annotated[int, Field(ge=0, le=65_535)] = Field(8000, description="Port to listen on; 0 takes a free one.")
    tls_certificate: Path | None = Field(
        None, description="PEM certificate chain; with `tls_key`, the server speaks HTTPS."
    )
    tls_key: Path | None = Field(None, description="PEM private key.")
    drain_seconds: Annotated[float, Field(ge=0, le=25)] = Field(
        20, description="Time for running requests to finish at shutdown; the whole stop takes less than 30 s."
    )
    default_models: bool = Field(True, description="Whether the built-in catalogue is offered beside `models`.")
    http: HttpSettings = HttpSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    supervisor: SupervisorSettings = SupervisorSettings()
    auth: AuthSettings = AuthSettings()
    pull: PullSettings = PullSettings()
    jobs: JobSettings = JobSettings()
    batches: BatchSettings = BatchSettings()
    files: FileSettings = FileSettings()
    blobs: BlobSettings = BlobSettings()
    responses: ResponseSettings = ResponseSettings()
    webhooks: WebhookSettings = WebhookSettings()
    outbound: OutboundSettings = OutboundSettings()
    media: MediaSettings = MediaSettings()
    embeddings: EmbeddingSettings = EmbeddingSettings()
    rehearsal: RehearsalSettings = RehearsalSettings()
    log: LogSettings = LogSettings()
    models: dict[Annotated[str, Field(pattern=MODEL_NAME)], Model] = Field(
        {}, description="The catalogue, by API name."
    )

    @field_validator("admin_key")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < 32:
            raise ValueError("an admin key has at least 32 characters")
        return value

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("`tls_certificate` and `tls_key` go together")
        return self

    @property
    def models_folder(self) -> Path:
        """Where model files are."""
        return self.models_dir or self.data_dir / "models"

    @property
    def database_address(self) -> str:
        """The SQLAlchemy URL that the store opens; it may hold a password."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite+aiosqlite:///{self.data_dir / 'forebay.db'}"


def load(path: Path | None, environment: Mapping[str, str], overrides: Mapping[str, Any] | None = None) -> Settings:
    """Read the tree: file, then `FOREBAY_*`, then command-line `overrides`.

    `path` None means `forebay.toml` of the working folder, if there is one. Raises SetupError with the remedy.
    """
    tree = _read_file(path)
    for keys, value in _from_environment(environment):
        _put(tree, keys, value)
    for key, value in (overrides or {}).items():
        if value is not None:
            tree[key] = value
    _read_secret_files(tree)
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise SetupError(_explain(error)) from None


def setting_names() -> Iterator[tuple[str, FieldInfo]]:
    """Every setting but those of a model, as `section.key`, for the documentation test and the environment."""
    for name, field in Settings.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, _Section):
            for key, inner in section.model_fields.items():
                yield f"{name}.{key}", inner
        elif name != "models":
            yield name, field


def environment_name(setting: str) -> str:
    """`http.body_bytes_max` -> `FOREBAY_HTTP_BODY_BYTES_MAX`."""
    return "FOREBAY_" + setting.replace(".", "_").upper()


def _read_file(path: Path | None) -> dict[str, Any]:
    chosen = path or Path("forebay.toml")
    if path is None and not chosen.exists():
        return {}
    try:
        return tomllib.loads(chosen.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SetupError(f"There is no configuration file {chosen}. Check --config.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"The configuration file {chosen} cannot be read: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise SetupError(f"The configuration file {chosen} is not valid TOML: {error}.") from None


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[list[str], str]]:
    known = {environment_name(setting): setting for setting, _ in setting_names()}
    for name, value in environment.items():
        if not name.startswith("FOREBAY_"):
            continue
        if name not in known:
            raise SetupError(f"The environment has {name}, which is no setting.{_nearest(name, known)}")
        if value:  # an empty variable is an unset one, as in a container's environment file
            yield known[name].split("."), value


def _put(tree: dict[str, Any], keys: list[str], value: str) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            return  # not a section; the schema says so in a sentence
    tree[keys[-1]] = value


def _read_secret_files(tree: dict[str, Any]) -> None:
    """Replace each `*_file` of a secret by what the file holds; giving both is a mistake."""
    places = [(tree, "admin_key"), (tree, "database_url")]
    for section, name in (("pull", "hub_token"), ("blobs", "secret_access_key")):
        table = tree.get(section)
        places.append((table if isinstance(table, dict) else {}, name))
    for table, name in places:
        given = table.get(f"{name}_file")
        if given is None:
            continue
        if table.get(name) is not None:
            raise SetupError(f"Both `{name}` and `{name}_file` are set. Remove one.")
        table[name] = read_secret(Path(str(given)))


def read_secret(path: Path) -> str:
    """The one line that a secret file holds. Raises SetupError without showing it."""
    try:
        with path.open(encoding="utf-8") as file:
            secret = file.read(_SECRET_BYTES_MAX).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"The secret file {path} cannot be read: {type(error).__name__}.") from None
    if not secret:
        raise SetupError(f"The secret file {path} is empty.")
    return secret


def upstream_key(options: UpstreamOptions, environment: Mapping[str, str]) -> str | None:
    """The key for an upstream, from its file or its variable. Raises SetupError if either holds none."""
    if options.key_file is not None:
        return read_secret(options.key_file)
    if options.key_env is None:
        return None
    if not environment.get(options.key_env):
        raise SetupError(f"The environment variable {options.key_env} that holds an upstream's key is not set.")
    return environment[options.key_env]


def secrets_of(settings: Settings, environment: Mapping[str, str]) -> list[str]:
    """Every secret that the settings hold or point to, to be struck out of logs."""
    held = (settings.admin_key, settings.database_url, settings.pull.hub_token, settings.blobs.secret_access_key)
    found = [secret.get_secret_value() for secret in held if secret is not None]
    passwords = [urlsplit(url).password or "" for url in found if "://" in url]
    found += passwords + [unquote(password) for password in passwords]
    for model in settings.models.values():
        if isinstance(model, UpstreamModel):
            found += [upstream_key(model.options, environment) or "", *model.options.headers.values()]
    return [secret for secret in found if secret]


def _explain(error: ValidationError) -> str:
    """Every mistake as a sentence; for an unknown key, the nearest known one."""
    return "The configuration is not valid.\n" + "\n".join(f"- {_sentence(dict(item))}" for item in error.errors())


def _sentence(item: dict[str, Any]) -> str:
    location = [str(part) for part in item["loc"]]
    where = ".".join(location)
    if item["type"] == "extra_forbidden":
        return f"`{where}` is no setting.{_nearest(location[-1], _known_keys(location[:-1]))}"
    return f"`{where}`: {item['msg'].removeprefix('Value error, ')}."


def _known_keys(location: list[str]) -> list[str]:
    if location[:1] == ["models"] and len(location) > 2:
        kinds: dict[str, type[ModelSettings]] = {
            "llama.cpp": LlamaCppModel, "onnx": OnnxModel, "command": CommandModel, "vllm": VllmModel,
            "upstream": UpstreamModel, "fake": FakeModel,
        }  # fmt: skip
        kind = kinds[location[2]]
        inner: Any = kind.model_fields["options"].annotation if location[3:4] == ["options"] else kind
        return list(inner.model_fields) if isinstance(inner, type) and issubclass(inner, BaseModel) else []
    section = Settings.model_fields[location[0]].annotation if location else Settings
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []


def _nearest(name: str, known: Mapping[str, Any] | list[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f" Did you mean `{match[0]}`?" if match else ""


def environment_for_others() -> dict[str, str]:
    """The environment without our own settings, secrets among them, for programs that are not ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("FOREBAY_")}


def environment() -> dict[str, str]:
    """The process environment: the only place that reads it."""
    return dict(os.environ)
