"""Image jobs: steps of a stage, keys for signed addresses, and messages that were pushed to us."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add both columns and create both tables."""
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
    """Take both away again."""
    op.drop_table("intake_messages")
    op.drop_table("secrets")
    op.drop_column("jobs", "steps")
    op.drop_column("jobs", "step")
