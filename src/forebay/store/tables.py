"""Every table of the store, as the newest migration leaves it.

It refuses to know what is done with them: statements are kept beside their nouns. Times are seconds since the epoch.
"""

import sqlalchemy as sa

metadata = sa.MetaData()

NO_DEADLINE = 253_402_300_799.0  # the last second of the year 9999, so that a deadline can always be compared

projects = sa.Table(
    "projects",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(64), nullable=False, unique=True),
    sa.Column("created_at", sa.Double, nullable=False),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("project_id", sa.String(64), sa.ForeignKey("projects.id"), nullable=False, index=True),
    sa.Column("prefix", sa.String(16), nullable=False, unique=True),
    sa.Column("hash", sa.LargeBinary(32), nullable=False),
    sa.Column("last4", sa.String(4), nullable=False),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("scopes", sa.String(512), nullable=False),
    sa.Column("expires_at", sa.Double),
    sa.Column("revoked_at", sa.Double),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("requests_per_minute", sa.BigInteger),
    sa.Column("tokens_per_minute", sa.BigInteger),
    sa.Index("ix_api_keys_created_at", "created_at", "id"),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("project_id", sa.String(64), sa.ForeignKey("projects.id"), nullable=False),
    sa.Column("parent_id", sa.String(64), index=True),  # the batch of a chunk, the job that a webhook tells of
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("stage", sa.String(32), nullable=False, default=""),
    sa.Column("priority", sa.Integer, nullable=False, default=0),  # the lower value goes first
    sa.Column("model", sa.String(128)),  # for grouping; none where a job is not about one model
    sa.Column("attempt", sa.Integer, nullable=False, default=0),  # the fence: grows with every lease
    sa.Column("failures", sa.Integer, nullable=False, default=0),  # failed attempts since the last progress
    sa.Column("rescues", sa.Integer, nullable=False, default=0),  # lost leases since the last progress
    sa.Column("run_at", sa.Double, nullable=False),  # not before
    sa.Column("deadline_at", sa.Double, nullable=False, default=NO_DEADLINE),
    sa.Column("node", sa.String(64)),  # who holds the lease
    sa.Column("lease_expires_at", sa.Double),
    sa.Column("cancel_requested_at", sa.Double),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("finished_at", sa.Double),
    sa.Column("progress_at", sa.Double),  # the last sign of progress, for the alarm on stuck jobs
    sa.Column("total", sa.Integer, nullable=False, default=0),
    sa.Column("completed", sa.Integer, nullable=False, default=0),
    sa.Column("failed", sa.Integer, nullable=False, default=0),
    sa.Column("step", sa.Integer),  # of its stage, and of how many; none where a stage has no steps
    sa.Column("steps", sa.Integer),
    sa.Column("payload", sa.JSON, nullable=False),  # the kind's own input
    sa.Column("errors", sa.JSON, nullable=False),  # the last failed attempts, oldest first
    sa.Column("error_code", sa.String(64)),
    sa.Column("error_message", sa.Text),
    sa.Column("webhook_url", sa.Text),
    sa.Column("webhook_secret", sa.String(128)),
    sa.Column("key_id", sa.String(64)),  # whose key asked for it, where one did
    sa.Index("ix_jobs_available", "state", "kind", "priority", "deadline_at", "created_at"),
    sa.Index("ix_jobs_running", "state", "lease_expires_at"),
    sa.Index("ix_jobs_project", "project_id", "created_at", "id"),
    sa.Index("ix_jobs_finished", "finished_at"),
)

job_log = sa.Table(
    "job_log",
    metadata,
    sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("event", sa.String(64), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
)

# A batch is a job of kind `batch` with the same id: its state and its counts are those of the job.
batches = sa.Table(
    "batches",
    metadata,
    sa.Column("id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("project_id", sa.String(64), sa.ForeignKey("projects.id"), nullable=False),
    sa.Column("endpoint", sa.String(64), nullable=False),
    sa.Column("input_file_id", sa.String(64), nullable=False),
    sa.Column("completion_window", sa.String(16), nullable=False),
    sa.Column("metadata", sa.JSON),
    sa.Column("output_expires_after_seconds", sa.Integer),
    sa.Column("errors", sa.JSON),  # of the whole file, from validation
    sa.Column("model", sa.String(128)),  # none where lines name several
    sa.Column("output_file_id", sa.String(64)),
    sa.Column("error_file_id", sa.String(64)),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("in_progress_at", sa.Double),
    sa.Column("finalizing_at", sa.Double),
    sa.Column("input_tokens", sa.BigInteger, nullable=False, default=0),
    sa.Column("cached_tokens", sa.BigInteger, nullable=False, default=0),
    sa.Column("output_tokens", sa.BigInteger, nullable=False, default=0),
    sa.Column("reasoning_tokens", sa.BigInteger, nullable=False, default=0),
    sa.Index("ix_batches_project", "project_id", "created_at", "id"),
)

# A chunk is a job of kind `chunk` whose parent is the batch.
chunks = sa.Table(
    "chunks",
    metadata,
    sa.Column("id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("batch_id", sa.String(64), nullable=False, index=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("lines", sa.LargeBinary, nullable=False),  # packed places of its lines in the input file, in run order
)

# What an attempt at a chunk has written: the lines in it are done, and no other attempt runs them again.
segments = sa.Table(
    "segments",
    metadata,
    sa.Column("chunk_id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("batch_id", sa.String(64), nullable=False, index=True),
    sa.Column("lines", sa.LargeBinary, nullable=False),  # packed line numbers
    sa.Column("output_key", sa.String(256)),
    sa.Column("output_bytes", sa.BigInteger, nullable=False, default=0),
    sa.Column("error_key", sa.String(256)),
    sa.Column("error_bytes", sa.BigInteger, nullable=False, default=0),
)

# Lines a second of each model in batches, measured, for estimates.
line_rates = sa.Table(
    "line_rates",
    metadata,
    sa.Column("model", sa.String(128), primary_key=True),
    sa.Column("lines_per_second", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
)

files = sa.Table(
    "files",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("project_id", sa.String(64), sa.ForeignKey("projects.id"), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),  # uploading, ready, deleted: the last two steps of a file's blob
    sa.Column("filename", sa.String(512), nullable=False),
    sa.Column("purpose", sa.String(32), nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64)),
    sa.Column("blob_key", sa.String(256), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double),
    sa.Index("ix_files_project", "project_id", "created_at", "id"),
    sa.Index("ix_files_expires_at", "state", "expires_at"),
)

uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("project_id", sa.String(64), sa.ForeignKey("projects.id"), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("filename", sa.String(512), nullable=False),
    sa.Column("purpose", sa.String(32), nullable=False),
    sa.Column("mime_type", sa.String(128), nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("file_id", sa.String(64)),
    sa.Column("file_expires_after_seconds", sa.Integer),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
    sa.Index("ix_uploads_expires_at", "status", "expires_at"),
    sa.Index("ix_uploads_project", "project_id", "created_at", "id"),
)

upload_parts = sa.Table(
    "upload_parts",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("upload_id", sa.String(64), sa.ForeignKey("uploads.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("state", sa.String(16), nullable=False),  # as that of a file
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("blob_key", sa.String(256), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)

idempotency_keys = sa.Table(
    "idempotency_keys",
    metadata,
    sa.Column("project_id", sa.String(64), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("fingerprint", sa.String(64), nullable=False),  # of method, path and body
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False, index=True),
)

webhook_endpoints = sa.Table(
    "webhook_endpoints",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("project_id", sa.String(64), sa.ForeignKey("projects.id"), nullable=False, index=True),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("events", sa.JSON, nullable=False),  # names; none means every one
    sa.Column("description", sa.String(512), nullable=False),
    sa.Column("secret", sa.String(128), nullable=False),
    sa.Column("previous_secret", sa.String(128)),
    sa.Column("previous_secret_expires_at", sa.Double),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("disabled_at", sa.Double),
    sa.Column("disabled_reason", sa.String(256)),
)

# A delivery is a job of kind `webhook` with the same id; its parent is the job whose end it tells.
webhook_deliveries = sa.Table(
    "webhook_deliveries",
    metadata,
    sa.Column("id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("project_id", sa.String(64), nullable=False, index=True),
    sa.Column("endpoint_id", sa.String(64), index=True),  # none for the `webhook_url` of a single job
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("secret", sa.String(128)),  # of a `webhook_url`; an endpoint's own is looked up when it is sent
    sa.Column("event_id", sa.String(64), nullable=False),
    sa.Column("event_type", sa.String(64), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)

webhook_attempts = sa.Table(
    "webhook_attempts",
    metadata,
    sa.Column(
        "delivery_id", sa.String(64), sa.ForeignKey("webhook_deliveries.id", ondelete="CASCADE"), primary_key=True
    ),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("duration_seconds", sa.Double, nullable=False),
    sa.Column("status", sa.Integer),  # none where there was no answer
    sa.Column("error", sa.String(256)),
)

dead_letters = sa.Table(
    "dead_letters",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("project_id", sa.String(64), sa.ForeignKey("projects.id"), nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),  # `batch` for a line, otherwise the kind of the job
    sa.Column("job_id", sa.String(64), nullable=False, index=True),  # the batch of a line, otherwise the job
    sa.Column("endpoint", sa.String(64)),
    sa.Column("custom_id", sa.String(512)),
    sa.Column("line", sa.Integer),  # its number in the input file, from 1
    sa.Column("source_file_id", sa.String(64)),  # where a line's input is, so that it is not kept twice
    sa.Column("source_offset", sa.BigInteger),
    sa.Column("source_bytes", sa.Integer),
    sa.Column("error_code", sa.String(64), nullable=False),
    sa.Column("error_message", sa.Text, nullable=False),
    sa.Column("attempts", sa.JSON, nullable=False),  # of each: at, status, code, message
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("requeued_at", sa.Double),
    sa.Column("requeued_as", sa.String(64)),  # the job that took it up again
    sa.Index("ix_dead_letters_project", "project_id", "created_at", "id"),
)

# What POST /v1/responses has answered. One in the background has a job of kind `response` with the same id, whose end says
# how it ended where nothing was written here.
responses = sa.Table(
    "responses",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("project_id", sa.String(64), sa.ForeignKey("projects.id"), nullable=False),
    sa.Column("previous_id", sa.String(64)),  # the response that it continues; that one may be gone
    sa.Column("background", sa.Boolean, nullable=False),
    sa.Column("streamed", sa.Boolean, nullable=False),  # whether its events are kept
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("request", sa.LargeBinary),  # the body with the whole conversation, as long as it has to be run
    sa.Column("input", sa.LargeBinary, nullable=False),  # JSON: its own items
    sa.Column("body", sa.LargeBinary, nullable=False),  # JSON: the response object
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
    sa.Index("ix_responses_project", "project_id", "created_at", "id"),
    sa.Index("ix_responses_expires_at", "expires_at"),
    sa.Index("ix_responses_status", "status", "project_id"),
)

# Events of a response in the background, of its last attempt alone; written many at once.
response_events = sa.Table(
    "response_events",
    metadata,
    sa.Column("response_id", sa.String(64), sa.ForeignKey("responses.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("first", sa.Integer, primary_key=True),  # the numbers of its first and its last event
    sa.Column("last", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("events", sa.LargeBinary, nullable=False),  # JSON: a list
)

# What a job about a recording or pictures, with the same id, has to do and has found or made; it goes when its job is gone.
# What came with the request goes when the job ends: the blob of its own, and the request where media are in it.
media_jobs = sa.Table(
    "media_jobs",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("kind", sa.String(32), nullable=False),  # that of its job
    sa.Column("project_id", sa.String(64), sa.ForeignKey("projects.id"), nullable=False),
    sa.Column("node", sa.String(64), nullable=False),  # who takes the media in
    sa.Column("submitted", sa.Boolean, nullable=False),  # whether there is, or was, a job
    sa.Column("media", sa.String(16), nullable=False),  # none, kept, removing, removed
    sa.Column("bytes", sa.BigInteger, nullable=False),  # of the media
    sa.Column("path", sa.String(64), nullable=False),  # the endpoint that was asked
    sa.Column("request", sa.LargeBinary),  # JSON: what its attempts read, as long as it may be run
    sa.Column("shown", sa.LargeBinary, nullable=False),  # JSON: what of the request says how the result is written
    sa.Column("result", sa.LargeBinary),  # JSON: the transcript, or the pictures
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Index("ix_media_jobs_project", "project_id", "created_at", "id"),
    sa.Index("ix_media_jobs_media", "media"),
    sa.Index("ix_media_jobs_submitted", "submitted"),
)

# Parts of it that are finished, whichever attempt has finished them: stretches of a recording, pictures.
media_parts = sa.Table(
    "media_parts",
    metadata,
    sa.Column("job_id", sa.String(64), sa.ForeignKey("media_jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("stage", sa.String(32), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),  # JSON
)

# Files that a job has stored, or is about to, and that are none before it ends well.
drafted_files = sa.Table(
    "drafted_files",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("job_id", sa.String(64), nullable=False, index=True),
    sa.Column("state", sa.String(16), nullable=False),  # drafted, removing
)

# Keys that all nodes share, made by whoever needs one first.
secrets = sa.Table(
    "secrets",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.LargeBinary, nullable=False),
)

# Messages that were pushed to us and have become jobs, so that one that is delivered again makes no second.
intake_messages = sa.Table(
    "intake_messages",
    metadata,
    sa.Column("project_id", sa.String(64), sa.ForeignKey("projects.id"), primary_key=True),
    sa.Column("source", sa.String(256), primary_key=True),  # the subscription
    sa.Column("message_id", sa.String(256), primary_key=True),
    sa.Column("job_id", sa.String(64), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False, index=True),
)

# What replicas of a model came to hold on a device, by the size of what they worked on.
model_memory = sa.Table(
    "model_memory",
    metadata,
    sa.Column("model", sa.String(128), primary_key=True),
    sa.Column("fingerprint", sa.String(64), primary_key=True),  # of its settings
    sa.Column("device", sa.String(16), primary_key=True),
    sa.Column("input_class", sa.Integer, primary_key=True),  # inputs of 2^(n-1) bytes and more; 0 is none
    sa.Column("peak_bytes", sa.BigInteger, nullable=False),
    sa.Column("load_seconds", sa.Double, nullable=False),
    sa.Column("measured_at", sa.Double, nullable=False),
)

# What was used on a day (UTC, `2026-11-21`). Sound in milliseconds, pictures in pixels times steps.
usage = sa.Table(
    "usage",
    metadata,
    sa.Column("day", sa.String(10), primary_key=True),
    sa.Column("project_id", sa.String(64), sa.ForeignKey("projects.id"), primary_key=True),
    sa.Column("key_id", sa.String(64), primary_key=True),  # empty for a job of old
    sa.Column("model", sa.String(128), primary_key=True),
    sa.Column("capability", sa.String(32), primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("cached_tokens", sa.BigInteger, nullable=False),
    sa.Column("audio_ms", sa.BigInteger, nullable=False),
    sa.Column("pixel_steps", sa.BigInteger, nullable=False),
    sa.Column("images", sa.BigInteger, nullable=False),
    sa.Index("ix_usage_project", "project_id", "day"),
)

# How much of the journal of a process is in `usage`: how many folds, and the place in the file behind the last.
usage_journals = sa.Table(
    "usage_journals",
    metadata,
    sa.Column("id", sa.String(128), primary_key=True),
    sa.Column("node", sa.String(64), nullable=False),
    sa.Column("folds", sa.BigInteger, nullable=False),
    sa.Column("position", sa.BigInteger, nullable=False),
    sa.Column("folded_at", sa.Double, nullable=False),
)

# The share and the quotas of projects that have some of their own.
project_limits = sa.Table(
    "project_limits",
    metadata,
    sa.Column("project_id", sa.String(64), sa.ForeignKey("projects.id"), primary_key=True),
    sa.Column("weight", sa.Double, nullable=False),
    sa.Column("quotas", sa.JSON, nullable=False),  # a list such as ["tokens=1000000/day"]
    sa.Column("updated_at", sa.Double, nullable=False),
)
