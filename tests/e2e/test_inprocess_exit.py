"""A program whose in-process run had stragglers ends with its own exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# A thread inside torch while the interpreter ends aborts the process ("terminate called without an active
# exception", exit code 134) unless it was stopped before.
PROGRAM = """
import threading
import torch
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from simulations.drivers.inprocess import InProcessGrid

app, training = ClientApp(), threading.Event()

@app.train()
def train(message, context):
    model, rows = torch.nn.Linear(128, 128), torch.ones(32, 128)
    while True:
        model(rows).pow(2).sum().backward()
        training.set()

with InProcessGrid(app, [{}], {}, workers=1) as grid:
    ids = grid.push_messages([Message(RecordDict(), grid.get_node_ids()[0], "train")])
    training.wait(60)
    grid.abandon(ids)
raise SystemExit(3)
"""


def test_a_straggler_does_not_abort_the_program() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (3, "")
