"""What a dashboard shows beside metrics: clients as they were met, statistics of a round, a sign of life."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a column and two tables."""
    op.add_column("runs", sa.Column("alive_at", sa.DateTime(timezone=True), nullable=True))
    op.create_table(
        "statistics",
        _name("run"),
        sa.Column("round", sa.BigInteger(), nullable=False),
        _name("kind"),
        sa.Column("data", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("run", "round", "kind", name=op.f("pk_statistics")),
        sa.ForeignKeyConstraint(
            ["run", "round"],
            ["rounds.run", "rounds.round"],
            name=op.f("fk_statistics_run_round"),
            ondelete="CASCADE",
        ),
    )
    op.create_table(
        "clients",
        _name("run"),
        _name("client"),
        sa.Column("rank", sa.BigInteger(), nullable=True),
        sa.Column("rank_reason", sa.Text(), nullable=False),
        _name("device"),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=False),
        sa.Column("max_rank", sa.BigInteger(), nullable=True),
        sa.Column("joined_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("run", "client", name=op.f("pk_clients")),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name=op.f("fk_clients_run"), ondelete="CASCADE"),
    )


def _name(column: str) -> sa.Column[str]:
    kind = sa.String(200).with_variant(sa.String(200, collation="C"), "postgresql")
    return sa.Column(column, kind, nullable=False)
