"""What replicas of models came to hold of memory."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "model_memory",
        sa.Column("model", sa.String(128), primary_key=True),
        sa.Column("fingerprint", sa.String(64), primary_key=True),
        sa.Column("device", sa.String(16), primary_key=True),
        sa.Column("input_class", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("peak_bytes", sa.BigInteger, nullable=False),
        sa.Column("load_seconds", sa.Double, nullable=False),
        sa.Column("measured_at", sa.Double, nullable=False),
    )


def downgrade() -> None:
    """Take it away again; it is measured anew."""
    op.drop_table("model_memory")
