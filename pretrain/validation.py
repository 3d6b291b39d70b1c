"""Zero-shot evaluation while training, on the validation split: chooses the best checkpoint, changes nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from ..datasets.batch import Batch
from ..datasets.stream import Source, eval_batches
from ..evals import harness
from .config import Config
from .engine import Engine
from .state import RunState
from .telemetry import Telemetry


def evaluate(config: Config, engine: Engine, state: RunState, source: Source, telemetry: Telemetry) -> bool:
    """Run the recipe's tasks on the validation split. All ranks. True when the metric that chooses the best rose."""
    engine.module.eval()
    batches = eval_batches(
        source,
        batch_size=config.evals.batch_size,
        rank=engine.accelerator.process_index,
        world=engine.accelerator.num_processes,
        workers=config.data.workers,
    )

    def encode(batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            return engine(batch.to(engine.device), embed_only=True)

    results = harness.evaluate(encode, batches, len(source), config.evals.tasks)  # all ranks
    if engine.accelerator.is_main_process:
        harness.append_history(config.run, state.step, "val", results)
    metrics = {f"{result.task}/{name}": value for result in results for name, value in result.metrics.items()}
    for result in results:
        if result.error:
            telemetry.say(f"evaluation {result.task} failed at step {state.step}: {result.error}")
    value = metrics.get(config.evals.best)
    if value is None:
        telemetry.say(f"step {state.step}: no metric {config.evals.best!r} on val; evals.best cannot choose")
        return False
    telemetry.say(f"step {state.step}: val {config.evals.best} {value:.1f}")
    if state.best is not None and value <= state.best:
        return False
    state.best, state.best_step = value, state.step
    return True
