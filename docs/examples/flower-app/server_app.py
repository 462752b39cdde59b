"""The coordinator's side: a stock Flower ServerApp with one of LoRAFleet's strategies."""

from __future__ import annotations

from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from peft import get_peft_model_state_dict
from tiny_task import ALPHA, RANKS, Net, make_model

from common.peft_folder import write_peft_folder
from server.flower_strategy import FlowerStrategy
from strategies import aggregation_strategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation and write the merged adapter."""
    config = context.run_config
    strategy = FlowerStrategy(
        aggregation_strategy(str(config["strategy"])), lora_alpha=ALPHA, min_available_nodes=len(RANKS)
    )
    strategy.start(
        grid,
        initial_arrays=ArrayRecord(get_peft_model_state_dict(make_model(max(RANKS)))),
        num_rounds=int(config["num-server-rounds"]),
        timeout=600,
    )
    if config["out"]:
        write_peft_folder(strategy.adapter, Path(str(config["out"])), Net(), ("", None), None)
