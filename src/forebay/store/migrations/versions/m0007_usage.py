"""Usage by project, key, model, day and capability; how far the journals are in it; limits of projects; the keys of jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables, and the column of jobs."""
    op.create_table(
        "usage",
        sa.Column("day", sa.String(10), primary_key=True),
        sa.Column("project_id", sa.String(64), sa.ForeignKey("projects.id"), primary_key=True),
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("model", sa.String(128), primary_key=True),
        sa.Column("capability", sa.String(32), primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("audio_ms", sa.BigInteger, nullable=False),
        sa.Column("pixel_steps", sa.BigInteger, nullable=False),
        sa.Column("images", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_usage_project", "usage", ["project_id", "day"])
    op.create_table(
        "usage_journals",
        sa.Column("id", sa.String(128), primary_key=True),
        sa.Column("node", sa.String(64), nullable=False),
        sa.Column("folds", sa.BigInteger, nullable=False),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("folded_at", sa.Double, nullable=False),
    )
    op.create_table(
        "project_limits",
        sa.Column("project_id", sa.String(64), sa.ForeignKey("projects.id"), primary_key=True),
        sa.Column("weight", sa.Double, nullable=False),
        sa.Column("quotas", sa.JSON, nullable=False),
        sa.Column("updated_at", sa.Double, nullable=False),
    )
    op.add_column("jobs", sa.Column("key_id", sa.String(64)))


def downgrade() -> None:
    """Take all of it away again."""
    op.drop_column("jobs", "key_id")
    op.drop_table("project_limits")
    op.drop_table("usage_journals")
    op.drop_index("ix_usage_project", table_name="usage")
    op.drop_table("usage")
