"""The owners' side: an ordinary PEFT client, each owner at a rank of its own."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict
from tiny_task import RANKS, fit, make_model, rows

from client.flower_peft import load_start

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train from what the server sent, and answer with the factors."""
    owner = int(context.node_config["partition-id"]) % len(RANKS)
    model = make_model(RANKS[owner])
    load_start(model, message)
    x, y = rows(owner)
    loss = fit(model, x, y)
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    metrics = MetricRecord({"train-loss": loss, "num-examples": len(x)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the merged model on the owner's rows."""
    owner = int(context.node_config["partition-id"]) % len(RANKS)
    model = make_model(RANKS[owner])
    load_start(model, message)
    x, y = rows(owner)
    with torch.no_grad():
        loss = float((model(x) - y).square().mean())
    return Message(RecordDict({"metrics": MetricRecord({"loss": loss, "num-examples": len(x)})}), reply_to=message)
