"""The first tables: runs, rounds, client_rounds, metrics, artefacts, events."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    _make_runs()
    _make_rounds()
    _make_client_rounds()
    _make_metrics()
    _make_artefacts()
    _make_events()


def _name(column: str, nullable: bool = False) -> sa.Column[str]:
    kind = sa.String(200).with_variant(sa.String(200, collation="C"), "postgresql")
    return sa.Column(column, kind, nullable=nullable)


def _text(column: str, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(column, sa.Text(), nullable=nullable)


def _whole(column: str, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(column, sa.BigInteger(), nullable=nullable)


def _real(column: str, nullable: bool = False) -> sa.Column[float]:
    return sa.Column(column, sa.Double(), nullable=nullable)


def _moment(column: str, nullable: bool = False) -> sa.Column[datetime]:
    return sa.Column(column, sa.DateTime(timezone=True), nullable=nullable)


def _short(column: str, length: int, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(column, sa.String(length), nullable=nullable)


def _of_run(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["run"], ["runs.id"], name=op.f(f"fk_{table}_run"), ondelete="CASCADE")


def _of_round(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["run", "round"],
        ["rounds.run", "rounds.round"],
        name=op.f(f"fk_{table}_run_round"),
        ondelete="CASCADE",
    )


def _status(table: str, *allowed: str) -> sa.CheckConstraint:
    return sa.CheckConstraint(f"status IN {allowed}", name=op.f(f"ck_{table}_status"))


def _key(table: str, *columns: str) -> sa.PrimaryKeyConstraint:
    return sa.PrimaryKeyConstraint(*columns, name=op.f(f"pk_{table}"))


def _make_runs() -> None:
    op.create_table(
        "runs",
        _name("id"),
        _name("name"),
        _short("status", 20),
        _text("reason", nullable=True),
        _name("task"),
        _name("strategy"),
        _whole("seed"),
        _text("experiment"),
        _name("fingerprint"),
        _whole("rounds_planned"),
        _whole("rounds_done"),
        _whole("best_round", nullable=True),
        _real("best_metric", nullable=True),
        _text("adapter_path", nullable=True),
        _short("adapter_sha256", 64, nullable=True),
        _moment("created_at"),
        _moment("updated_at"),
        _moment("finished_at", nullable=True),
        _key("runs", "id"),
        _status("runs", "running", "completed", "failed", "interrupted"),
    )
    op.create_index(op.f("ix_runs_created_at_id"), "runs", ["created_at", "id"])


def _make_rounds() -> None:
    op.create_table(
        "rounds",
        _name("run"),
        _whole("round"),
        _moment("started_at"),
        _short("status", 20),
        _text("reason", nullable=True),
        _text("cohort"),
        _whole("base_version"),
        _whole("bytes_up"),
        _whole("bytes_down"),
        _real("seconds"),
        _text("phases"),
        _real("error", nullable=True),
        sa.Column("exact", sa.Boolean(), nullable=False),
        _real("epsilon", nullable=True),
        _moment("committed_at", nullable=True),
        _text("state_path", nullable=True),
        _short("state_sha256", 64, nullable=True),
        _key("rounds", "run", "round"),
        _status("rounds", "running", "committed", "failed"),
        _of_run("rounds"),
    )


def _make_client_rounds() -> None:
    op.create_table(
        "client_rounds",
        _name("run"),
        _whole("round"),
        _name("client"),
        _short("status", 20),
        _text("reason", nullable=True),
        _whole("rank", nullable=True),
        _whole("num_examples"),
        _whole("bytes_up"),
        _whole("bytes_down"),
        _real("seconds"),
        _text("artefact_path", nullable=True),
        _short("artefact_sha256", 64, nullable=True),
        _text("metadata"),
        _key("client_rounds", "run", "round", "client"),
        _of_round("client_rounds"),
        _status("client_rounds", "received", "accepted", "rejected", "failed", "late", "offline"),
    )


def _make_metrics() -> None:
    op.create_table(
        "metrics",
        _name("run"),
        _whole("round"),
        _name("name"),
        _name("client"),
        _name("layer"),
        _real("value"),
        _key("metrics", "run", "round", "name", "client", "layer"),
        _of_round("metrics"),
    )
    op.create_index(op.f("ix_metrics_run_name"), "metrics", ["run", "name"])


def _make_artefacts() -> None:
    op.create_table(
        "artefacts",
        _name("run"),
        _text("path"),
        _whole("round", nullable=True),
        _name("kind"),
        _short("sha256", 64),
        _whole("nbytes"),
        _key("artefacts", "run", "path"),
        _of_round("artefacts"),
        _of_run("artefacts"),
    )


def _make_events() -> None:
    op.create_table(
        "events",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        _name("run"),
        _whole("round", nullable=True),
        _name("client", nullable=True),
        _moment("at"),
        _name("kind"),
        _text("text"),
        _text("data"),
        _key("events", "id"),
        _of_run("events"),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_events_run_id"), "events", ["run", "id"])
