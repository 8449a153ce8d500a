"""Image jobs: what transcriptions have, for both, steps of a stage, keys for signed addresses, messages pushed to us."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Rename the tables of transcriptions, add columns, and create what is new."""
    for index in ("project", "sound", "submitted"):
        op.drop_index(f"ix_transcriptions_{index}", table_name="transcriptions")
    op.rename_table("transcriptions", "media_jobs")
    op.alter_column("media_jobs", "sound", new_column_name="media")
    op.drop_column("media_jobs", "duration")  # it is in the result
    op.add_column("media_jobs", sa.Column("kind", sa.String(32), nullable=False, server_default="transcription"))
    op.create_index("ix_media_jobs_project", "media_jobs", ["project_id", "created_at", "id"])
    op.create_index("ix_media_jobs_media", "media_jobs", ["media"])
    op.create_index("ix_media_jobs_submitted", "media_jobs", ["submitted"])
    op.rename_table("stretches", "media_parts")
    op.alter_column("media_parts", "transcription_id", new_column_name="job_id")
    op.create_table(
        "drafted_files",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
    )
    op.create_index("ix_drafted_files_job_id", "drafted_files", ["job_id"])
    op.add_column("jobs", sa.Column("step", sa.Integer))
    op.add_column("jobs", sa.Column("steps", sa.Integer))
    op.create_table(
        "secrets",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "intake_messages",
        sa.Column("project_id", sa.String(64), sa.ForeignKey("projects.id"), primary_key=True),
        sa.Column("source", sa.String(256), primary_key=True),
        sa.Column("message_id", sa.String(256), primary_key=True),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
    )
    op.create_index("ix_intake_messages_created_at", "intake_messages", ["created_at"])


def downgrade() -> None:
    """Take all of it away again; what is about pictures goes with it."""
    op.drop_table("intake_messages")
    op.drop_table("secrets")
    op.drop_column("jobs", "steps")
    op.drop_column("jobs", "step")
    op.drop_table("drafted_files")
    op.alter_column("media_parts", "job_id", new_column_name="transcription_id")
    op.rename_table("media_parts", "stretches")
    for index in ("project", "media", "submitted"):
        op.drop_index(f"ix_media_jobs_{index}", table_name="media_jobs")
    op.execute("DELETE FROM media_jobs WHERE kind <> 'transcription'")
    op.drop_column("media_jobs", "kind")
    op.add_column("media_jobs", sa.Column("duration", sa.Double))
    op.alter_column("media_jobs", "media", new_column_name="sound")
    op.rename_table("media_jobs", "transcriptions")
    op.create_index("ix_transcriptions_project", "transcriptions", ["project_id", "created_at", "id"])
    op.create_index("ix_transcriptions_sound", "transcriptions", ["sound"])
    op.create_index("ix_transcriptions_submitted", "transcriptions", ["submitted"])
