"""The settings of what every server has: its door and keys, the hallway, the engine room, what is kept and what is written.

It refuses unknown keys, and knows neither files nor the environment: `config` reads the tree.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from forebay.engine_options import Bytes, Count, Seconds, Section
from forebay.errors import InvalidRequest
from forebay.quotas import Quota, parse_quotas


class HttpSettings(Section):
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
        20,
        description="A reader for whom bytes wait and who takes fewer than 64 KiB of them in this long, and not all, is cut off and its work cancelled.",
    )
    connections_max: Count = Field(4096, description="Open connections in all; further ones are closed at once.")
    connections_per_address_max: Count = Field(
        1024, description="Open connections from one address; further ones are closed at once."
    )
    public_url: Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.:\[\]-]+(/[A-Za-z0-9._~/-]*)?$")] | None = Field(
        None,
        description="What addresses in answers begin with, such as `https://api.example.com`; without it, the host that the caller asked.",
    )


class SchedulerSettings(Section):
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


class PaceSettings(Section):
    """Online first: how batch work makes room on a device (`cpu`, `gpu0`, …) for the online work of all its models."""

    enabled: bool = Field(
        True, description="Bound batch work beside online work on the same device, and pause the engines that do it."
    )
    resume_seconds: Annotated[float, Field(ge=0, le=60)] = Field(
        0.02, description="Engines that were paused go on when nobody has been online on their device for this long."
    )
    quiet_seconds: Seconds = Field(
        2,
        description="After this long, batch work is let in without a bound that cannot be paused: that of a model with online traffic of its own.",
    )
    brief_seconds: Annotated[float, Field(ge=0, le=60)] = Field(
        0.05,
        description="So much of it is let in before, whenever nobody is online, as has lately ended within this long.",
    )
    tolerance_good: Annotated[float, Field(ge=1, le=10)] = Field(
        1.1,
        description="The bound grows while online tokens take at most so many times as long as without batch work.",
    )
    tolerance_bad: Annotated[float, Field(ge=1, le=10)] = Field(
        1.25, description="The bound is halved when they take more than so many times as long."
    )
    probe_seconds_min: Seconds = Field(
        20, description="Wait before a bound that did harm is tried again; it doubles each time that it does."
    )
    probe_seconds_max: Seconds = Field(300, description="Longest such wait.")
    baseline_seconds: Seconds = Field(
        600, description="How long it is remembered what online tokens took without batch work."
    )
    hold_seconds_max: Seconds = Field(
        120, description="Batch work that has been held for this long runs for a while whoever is online."
    )
    floor_seconds: Annotated[float, Field(gt=0, le=600)] = Field(1, description="How long it then runs.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.tolerance_bad < self.tolerance_good:
            raise ValueError("`tolerance_bad` has to be at least `tolerance_good`")
        if self.probe_seconds_max < self.probe_seconds_min:
            raise ValueError("`probe_seconds_max` has to be at least `probe_seconds_min`")
        return self


class SupervisorSettings(Section):
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
        300,
        description="How long an engine runs with half its slots after it ran out of memory, and an `onnx` engine with "
        "batches half as large.",
    )
    quarantine_seconds: Seconds = Field(
        600, description="How long an input that was in flight at two engine deaths is refused."
    )
    quarantine_entries_max: Count = Field(10_000, description="How many suspect inputs are remembered.")
    log_lines_max: Count = Field(200, description="Lines of an engine's output that are kept for its post-mortem.")
    log_line_bytes_max: Bytes = Field(2048, description="Longest engine line; the rest is cut.")


class MemorySettings(Section):
    """The memory of the machine: how much models may take of it, and who leaves for whom."""

    host_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="Share of the machine's memory, or of the container's limit, that engines may take in all."
    )
    host_bytes: Bytes | None = Field(None, description="Memory that engines may take in all, in place of a share.")
    gpu_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="Share of a GPU's memory that engines may take in all; what others hold there is taken off."
    )
    residency_seconds: Seconds = Field(
        10, description="A model that was used stays loaded for this long at least before it leaves for another."
    )
    swap_wait_seconds: Seconds = Field(
        20,
        description="Whoever has waited for memory this long makes a model leave that is at work or has a line: it "
        "finishes what it runs and gets nothing new.",
    )
    batch_wait_seconds: Seconds = Field(
        120, description="The same for batch work, which swaps less often, so that it does not load more than it works."
    )
    online_seconds: Seconds = Field(
        60, description="Batch work never makes a model leave that had online traffic in this long."
    )
    measure_seconds: Seconds = Field(2, description="How often the memory of engines and of the machine is measured.")
    peak_days: Annotated[int, Field(ge=1, le=3650)] = Field(
        30, description="How long it counts what a model once came to, if it has not come to it again."
    )
    available_min_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05,
        description="With less than this share of its memory available, the machine loads nothing; batch work waits.",
    )
    available_resume_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.08, description="Share of available memory at which the machine loads again."
    )
    gpu_celsius_max: Annotated[float, Field(gt=0, le=150)] = Field(
        90, description="With a GPU hotter than this, the machine loads nothing; batch work waits."
    )
    gpu_celsius_resume: Annotated[float, Field(gt=0, le=150)] = Field(
        83, description="Temperature of the hottest GPU at which the machine loads again."
    )

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.available_resume_share < self.available_min_share:
            raise ValueError("`available_resume_share` is at least `available_min_share`")
        if self.gpu_celsius_resume > self.gpu_celsius_max:
            raise ValueError("`gpu_celsius_resume` is at most `gpu_celsius_max`")
        return self


class AuthSettings(Section):
    """Keys and rates."""

    key_cache_seconds: Seconds = Field(
        5, description="How long a key that was looked up is trusted; also the longest a revoked key works on."
    )
    key_cache_entries_max: Count = Field(10_000, description="Keys, known and unknown, that are kept in memory.")
    failures_per_minute_max: Count = Field(600, description="Failed key checks from one address in a minute; then 429.")


class EmbeddingSettings(Section):
    """Vectors and scores that are kept, so that the same text is not computed twice."""

    cache_bytes: Annotated[int, Field(ge=0, le=2**40)] = Field(
        128 * 2**20, description="Memory of each process for kept vectors and scores; 0 keeps none."
    )


class RehearsalSettings(Section):
    """For rehearsing a crash, never for service."""

    kill_at: str | None = Field(
        None, description="Commit point, or `name:n` for its n-th passing, at which the process kills itself."
    )


class LogSettings(Section):
    """What is written to standard error."""

    format: Literal["text", "json"] = Field("text", description="`text` for people, `json` for machines.")
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level that is written."
    )
    access: bool = Field(True, description="One line for each request.")


class UsageSettings(Section):
    """What was used: how it is written down, and how long it is kept."""

    fold_seconds: Annotated[float, Field(gt=0, le=60)] = Field(
        1, description="How often the journal of a process is added up in the database, and limits are read there."
    )
    journal_bytes_max: Bytes = Field(
        4 * 2**20, description="Size of a journal at which the next one is begun; it is removed when it is added up."
    )
    keep_days: Annotated[int, Field(ge=62, le=36_500)] = Field(400, description="How long the usage of a day is kept.")


class QuotaSettings(Section):
    """What a project may use, and hold, that has no quota of its own for it."""

    defaults: Annotated[tuple[str, ...], Field(max_length=16)] = Field(
        (),
        description="Quotas such as `requests=10000/day`, `tokens=5000000/month`, `audio_seconds=36000/day`, "
        "`megapixel_steps=100000/day`, `stored_bytes=10000000000` and `queued_lines=50000`. Without any there is no bound.",
    )

    @field_validator("defaults")
    @classmethod
    def _are_quotas(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            parse_quotas(value)
        except InvalidRequest as error:
            raise ValueError(str(error).rstrip(".")) from None
        return value

    @property
    def parsed(self) -> tuple[Quota, ...]:
        """The same as values."""
        return parse_quotas(self.defaults)
