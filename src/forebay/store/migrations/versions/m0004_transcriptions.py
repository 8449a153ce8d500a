"""Transcriptions as jobs, and the stretches of them that are finished."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create both tables."""
    op.create_table(
        "transcriptions",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("project_id", sa.String(64), sa.ForeignKey("projects.id"), nullable=False),
        sa.Column("node", sa.String(64), nullable=False),
        sa.Column("submitted", sa.Boolean, nullable=False),
        sa.Column("sound", sa.String(16), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("path", sa.String(64), nullable=False),
        sa.Column("request", sa.LargeBinary),
        sa.Column("shown", sa.LargeBinary, nullable=False),
        sa.Column("duration", sa.Double),
        sa.Column("result", sa.LargeBinary),
        sa.Column("created_at", sa.Double, nullable=False),
    )
    op.create_index("ix_transcriptions_project", "transcriptions", ["project_id", "created_at", "id"])
    op.create_index("ix_transcriptions_sound", "transcriptions", ["sound"])
    op.create_index("ix_transcriptions_submitted", "transcriptions", ["submitted"])
    op.create_table(
        "stretches",
        sa.Column(
            "transcription_id", sa.String(64), sa.ForeignKey("transcriptions.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("stage", sa.String(32), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )


def downgrade() -> None:
    """Drop both tables."""
    op.drop_table("stretches")
    op.drop_table("transcriptions")
