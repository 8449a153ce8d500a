"""Settings: one frozen tree, read once from `forebay.toml` and `FOREBAY_*`, passed down by value.

It refuses an unknown key, naming the nearest known one, and no other room reads the environment.
"""

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self, get_origin
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from forebay.engine_options import Bytes, Count, Seconds, Section, UpstreamOptions
from forebay.errors import SetupError
from forebay.model_config import ENGINES, MODEL_NAME, Model, UpstreamModel
from forebay.server_config import (
    AuthSettings,
    EmbeddingSettings,
    HttpSettings,
    LogSettings,
    MemorySettings,
    PaceSettings,
    QuotaSettings,
    RehearsalSettings,
    SchedulerSettings,
    SupervisorSettings,
    UsageSettings,
)

_SECRET_BYTES_MAX = 65_536
_STORE_URL = r"^(s3://|file:)"
_PROJECT_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class PullSettings(Section):
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
    folder_bytes_max: Bytes = Field(
        200 * 2**30, description="Size of all files of a model that is a whole folder; a larger one is not pulled."
    )


class JobSettings(Section):
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
        description="Chunks of batches that one worker runs at once, and one more for a project of which none runs, or a model of which none does, if it is loaded or after `jobs.group_wait_seconds`; one for a model whose chunks fail, until one of them gets on.",
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
        60,
        description="Longest time that chunks of models that are not loaded wait while a worker stays with those that are.",
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
    watchers_max: Count = Field(
        200,
        description="Open streams of job events; further ones get 429, and one project leaves a quarter to the others.",
    )
    watch_seconds: Seconds = Field(0.5, description="How often a stream of job events looks for news.")


class BatchSettings(Section):
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
    resume_prefix: bool = Field(
        True,
        description="Lines at temperature 0 that gave their slot to online requests go on from what they had written, "
        "where the engine still has it in its cache; otherwise they begin anew.",
    )


class FileSettings(Section):
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


class StoreSettings(Section):
    """A store of objects, and how it is reached."""

    url: str | None = Field(None, pattern=_STORE_URL, description="`s3://bucket/prefix` or `file:/folder`.")
    endpoint: str | None = Field(None, description="Address of an S3-compatible store; Amazon's own if absent.")
    region: str | None = Field(None, description="Region of the bucket.")
    access_key_id: str | None = Field(None, description="Access key; the usual AWS variables and roles if absent.")
    secret_access_key: SecretStr | None = Field(None, description="Secret of the access key.")
    secret_access_key_file: Path | None = Field(None, description="File that holds the secret of the access key.")
    allow_http: bool = Field(False, description="Speak plain HTTP to the endpoint.")
    timeout_seconds: Seconds = Field(30, description="Longest wait for one answer of the store.")
    retries_max: Annotated[int, Field(ge=0, le=20)] = Field(3, description="Further tries after an answer of 5xx.")


class BlobSettings(StoreSettings):
    """The cellar: where the bytes of files and results are."""

    url: str | None = Field(
        None,
        pattern=_STORE_URL,
        description="`s3://bucket/prefix` or `file:/folder`; `blobs` inside the data folder if absent.",
    )


class IntakeSettings(StoreSettings):
    """Work that is pushed to us: messages that name objects of a store; `images` says what these may be."""

    url: str | None = Field(
        None,
        pattern=_STORE_URL,
        description="`s3://bucket/prefix` or `file:/folder` whose objects are read and written; without it no message is taken.",
    )
    model: Annotated[str, Field(pattern=MODEL_NAME)] | None = Field(
        None, description="Model of a message that names none."
    )
    output_name: str = Field(
        "edited.jpg",
        description="Name of a result where the message gives none, beside its image; `{stem}` is the image's own without its ending.",
    )
    preview_name: str = Field("preview.jpg", description="The same of its preview, which is always a JPEG.")
    output_compression: Annotated[int, Field(ge=0, le=100)] = Field(
        95, description="Quality of a JPEG or WebP where the message says nothing of it."
    )
    message_bytes_max: Bytes = Field(2**20, description="Size of one message as it is pushed; a larger one gets 413.")
    dedupe_seconds: Annotated[int, Field(ge=60, le=31_536_000)] = Field(
        604_800,
        description="How long a message is remembered, so that one that is delivered again makes no second job.",
    )
    attempts_max: Annotated[int, Field(ge=1, le=100)] = Field(
        4,
        description="How often a message that cannot be used is refused, by its `deliveryAttempt`; then it is kept as a dead letter.",
    )
    token_audience: str | None = Field(
        None,
        description="Audience of the platform's signed tokens; without it and `token_email` only API keys are taken.",
    )
    token_email: str | None = Field(None, description="Service account that these tokens are made for.")
    token_issuer: str = Field("https://accounts.google.com", description="Who makes these tokens.")
    token_keys_url: str = Field(
        "https://www.googleapis.com/oauth2/v3/certs",
        description="Where the public keys of their signatures are (JWKS).",
    )
    token_project: Annotated[str, Field(pattern=_PROJECT_NAME)] = Field(
        "default", description="Project that these tokens act for, as members; its API keys may push, too."
    )
    projects: Annotated[tuple[Annotated[str, Field(pattern=_PROJECT_NAME)], ...], Field(max_length=100)] = Field(
        (), description="Further projects whose API keys may push: each reads and writes every object of the store."
    )

    @field_validator("output_name", "preview_name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not value.isprintable() or not 0 < len(value) <= 128 or value[0] == "." or set("/\\") & set(value):
            raise ValueError("a name beside the image has no slash and no dot in front")
        return value

    @model_validator(mode="after")
    def _token_is_whole(self) -> Self:
        if (self.token_audience is None) != (self.token_email is None):
            raise ValueError("`token_audience` and `token_email` go together")
        return self


class ResponseSettings(Section):
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


class WebhookSettings(Section):
    """Telling others that a job has ended."""

    endpoints_max: Annotated[int, Field(ge=1, le=1000)] = Field(20, description="Webhook endpoints of one project.")
    timeout_seconds: Seconds = Field(20, description="Time for a receiver to answer.")
    response_bytes_max: Bytes = Field(16_384, description="Bytes of an answer that are read.")
    secret_overlap_seconds: Annotated[float, Field(ge=0, le=604_800)] = Field(
        86_400, description="How long an old secret still signs after a rotation."
    )


class OutboundSettings(Section):
    """The one way out to addresses that users supply."""

    allowed_networks: tuple[str, ...] = Field(
        (), description="Networks such as `10.0.0.0/8` that may be reached although they are not public."
    )
    connect_timeout_seconds: Seconds = Field(5, description="Time to resolve and to reach an address.")


class MediaSettings(Section):
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
    inlined_bytes_max: Bytes = Field(
        32 * 2**20,
        description="Size of all images of one request as an engine is given them, in base64; more gets 413.",
    )
    held_bytes_max: Bytes = Field(
        512 * 2**20,
        description="The same of all requests at the front door, running and waiting; a further one gets 429, and one project leaves a quarter to the others.",
    )
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


class AudioSettings(Section):
    """Recordings in requests and jobs: where they may come from, what one may be and cost, and how it is cut up."""

    bytes_max: Bytes = Field(
        512 * 2**20, description="Size of one recording as it is sent, stored or fetched; a larger one gets 413."
    )
    seconds_max: Annotated[int, Field(ge=1, le=172_800)] = Field(
        21_600, description="Length of one recording once it is decoded; a longer one gets 413."
    )
    online_seconds_max: Annotated[int, Field(ge=1, le=172_800)] = Field(
        1800, description="A longer recording becomes a job, and its answer tells which."
    )
    uploads_at_once: Annotated[int, Field(ge=1, le=1024)] = Field(
        16,
        description="Requests with a recording that are received or worked on at once; more get 429, and one project leaves a quarter to the others.",
    )
    fetch_hosts: tuple[str, ...] = Field(
        (),
        description="Hosts that recordings are fetched from: `audio.example.com`, `*.example.com`, or `*` for every public one. Without any, nothing is fetched.",
    )
    fetch_timeout_seconds: Seconds = Field(300, description="Time to fetch one recording.")
    decodes_at_once: Annotated[int, Field(ge=1, le=64)] = Field(
        2, description="Recordings that are decoded at once, each in a process of its own."
    )
    decode_seconds_max: Annotated[int, Field(ge=1, le=86_400)] = Field(
        600, description="Processor time for decoding one recording; the wait for it is twice as long at most."
    )
    decode_memory_bytes_max: Annotated[int, Field(ge=256 * 2**20, le=2**36)] = Field(
        512 * 2**20, description="Address space for decoding one recording; what needs more gets 413."
    )
    stretch_seconds: Annotated[int, Field(ge=30, le=600)] = Field(
        240,
        description="Recordings are worked on in stretches of at most so many seconds: a job goes on from the last that is finished, and others get their turn in between.",
    )
    diarization_model: str = Field(
        "speakers-ge2e", description="Model that tells speakers apart where a request names none."
    )
    jobs_at_once: Annotated[int, Field(ge=1, le=64)] = Field(
        2, description="Recordings of jobs that one worker fetches, decodes and works on at once."
    )
    lines_at_once: Annotated[int, Field(ge=1, le=64)] = Field(
        4, description="Recordings of lines of batches that one worker fetches, decodes and works on at once."
    )
    live_per_project_max: Count = Field(
        1000, description="Unfinished transcription jobs of one project; a further one gets 429."
    )
    background_seconds_max: Seconds = Field(
        86_400, description="How long a transcription job may take, its time in line included, before it is given up."
    )


class ImageSettings(Section):
    """Edits of images and new ones: what may be sent, what one may cost, how results are kept; `media` says what is fetched."""

    image_bytes_max: Bytes = Field(50 * 2**20, description="Size of one image file; a larger one gets 413.")
    mask_bytes_max: Bytes = Field(16 * 2**20, description="Size of one mask file; a larger one gets 413.")
    request_bytes_max: Bytes = Field(128 * 2**20, description="Size of all files of one request.")
    pixels_max: Annotated[int, Field(ge=1, le=2**30)] = Field(
        25_000_000, description="Pixels of one image, by its header; more gets 413."
    )
    ratio_max: Annotated[float, Field(ge=1, le=1000)] = Field(
        8, description="Longest side of an image over its shortest; a narrower one is refused."
    )
    mask_pixels_min: Annotated[int, Field(ge=1, le=2**30)] = Field(
        16, description="Fewest pixels of a mask once it is cleaned up; a smaller one is refused."
    )
    mask_coverage_max: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Largest share of the image that a mask may cover; a larger one is refused."
    )
    preview_pixels: Annotated[int, Field(ge=32, le=4096)] = Field(
        512, description="Longest side of the preview that a job keeps beside each picture."
    )
    requests_at_once: Annotated[int, Field(ge=1, le=1024)] = Field(
        16,
        description="Requests for pictures that are received or worked on at once; more get 429, and one project leaves a quarter to the others.",
    )
    held_bytes_max: Bytes = Field(
        1024 * 2**20,
        description="Pixels of all requests at the front door, before and after, and pictures in answers until they are sent; more gets 429, and one project leaves a quarter to the others.",
    )
    prepares_at_once: Annotated[int, Field(ge=1, le=64)] = Field(
        2, description="Images that are decoded, cut out or put together at once, each in a process of its own."
    )
    prepare_seconds_max: Annotated[int, Field(ge=1, le=600)] = Field(
        30, description="Processor time for each of these; the wait for it is twice as long at most."
    )
    prepare_memory_bytes_max: Annotated[int, Field(ge=512 * 2**20, le=2**36)] = Field(
        1152 * 2**20, description="Address space for each of these; what needs more gets 413."
    )
    url_seconds: Seconds = Field(3600, description="How long the address of a picture in an answer can be read.")
    keep_seconds: Annotated[int, Field(ge=3600, le=315_360_000)] = Field(
        2_592_000, description="How long the pictures of a job, or of a line of a batch, are kept as files."
    )
    jobs_at_once: Annotated[int, Field(ge=1, le=64)] = Field(
        2, description="Requests for pictures of jobs that one worker works on at once."
    )
    lines_at_once: Annotated[int, Field(ge=1, le=64)] = Field(
        4, description="Requests for pictures of lines of batches that one worker works on at once."
    )
    live_per_project_max: Count = Field(
        1000, description="Unfinished image jobs of one project; a further one gets 429."
    )
    background_seconds_max: Seconds = Field(
        86_400, description="How long an image job may take, its time in line included, before it is given up."
    )


class Settings(Section):
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
    pace: PaceSettings = PaceSettings()
    supervisor: SupervisorSettings = SupervisorSettings()
    memory: MemorySettings = MemorySettings()
    auth: AuthSettings = AuthSettings()
    pull: PullSettings = PullSettings()
    jobs: JobSettings = JobSettings()
    batches: BatchSettings = BatchSettings()
    files: FileSettings = FileSettings()
    blobs: BlobSettings = BlobSettings()
    intake: IntakeSettings = IntakeSettings()
    responses: ResponseSettings = ResponseSettings()
    webhooks: WebhookSettings = WebhookSettings()
    outbound: OutboundSettings = OutboundSettings()
    media: MediaSettings = MediaSettings()
    audio: AudioSettings = AudioSettings()
    images: ImageSettings = ImageSettings()
    embeddings: EmbeddingSettings = EmbeddingSettings()
    usage: UsageSettings = UsageSettings()
    quotas: QuotaSettings = QuotaSettings()
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
        if isinstance(section, type) and issubclass(section, Section):
            for key, inner in section.model_fields.items():
                yield f"{name}.{key}", inner
        elif name != "models":
            yield name, field


def environment_name(setting: str) -> str:
    """`http.body_bytes_max` -> `FOREBAY_HTTP_BODY_BYTES_MAX`."""
    return "FOREBAY_" + setting.replace(".", "_").upper()


def _read_file(path: Path | None) -> dict[str, Any]:
    chosen = path or Path("forebay.toml")
    try:
        return tomllib.loads(chosen.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if path is None:
            return {}
        raise SetupError(f"There is no configuration file {chosen}. Check --config.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"The configuration file {chosen} cannot be read: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise SetupError(f"The configuration file {chosen} is not valid TOML: {error}.") from None


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[list[str], str | list[str]]]:
    known = {environment_name(setting): (setting, field) for setting, field in setting_names()}
    for name, value in environment.items():
        if not name.startswith("FOREBAY_"):
            continue
        if name not in known:
            raise SetupError(f"The environment has {name}, which is no setting.{_nearest(name, known)}")
        if value:  # an empty variable is an unset one, as in a container's environment file
            setting, field = known[name]
            yield setting.split("."), _items(value) if get_origin(field.annotation) is tuple else value


def _items(value: str) -> list[str]:
    """A list in one variable: its items between commas."""
    return [item.strip() for item in value.split(",") if item.strip()]


def _put(tree: dict[str, Any], keys: list[str], value: str | list[str]) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            return  # not a section; the schema says so in a sentence
    tree[keys[-1]] = value


def _read_secret_files(tree: dict[str, Any]) -> None:
    """Replace each `*_file` of a secret by what the file holds; giving both is a mistake."""
    places = [(tree, "admin_key"), (tree, "database_url")]
    for section, name in (("pull", "hub_token"), ("blobs", "secret_access_key"), ("intake", "secret_access_key")):
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
        key, where = read_secret(options.key_file), f"secret file {options.key_file}"
    elif options.key_env is not None:
        key, where = environment.get(options.key_env, "").strip(), f"environment variable {options.key_env}"
        if not key:
            raise SetupError(f"The {where} that holds an upstream's key is not set.")
    else:
        return None
    if not (key.isascii() and key.isprintable()):
        raise SetupError(f"The {where} holds no key that could travel in a header: it has to be one line of ASCII.")
    return key


def secrets_of(settings: Settings, environment: Mapping[str, str]) -> list[str]:
    """Every secret that the settings hold or point to, to be struck out of logs."""
    stores = (settings.blobs.secret_access_key, settings.intake.secret_access_key)
    held = (settings.admin_key, settings.database_url, settings.pull.hub_token, *stores)
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
        kind = ENGINES[location[2]]
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
