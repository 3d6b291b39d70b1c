"""Zero-shot evaluation while training, on the validation split: chooses the best checkpoint, changes nothing else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..datasets.batch import Batch
from ..evals import harness
from .config import Config
from .engine import Engine
from .state import RunState
from .telemetry import Telemetry


class Validation:
    """The recipe's tasks on the validation split, again and again.

    Args:
        batches: from `eval_batches`; kept, so that its workers serve every evaluation.
        total: clips of the split.
    """

    def __init__(self, config: Config, engine: Engine, batches: Iterable[Batch], total: int) -> None:
        self.config, self.engine, self.batches, self.total = config, engine, batches, total

    def run(self, state: RunState, telemetry: Telemetry) -> bool:
        """Evaluate, append to evals.jsonl. All ranks. True when the metric that chooses the best checkpoint rose."""
        self.engine.module.eval()
        results = harness.evaluate(self._encode, self.batches, self.total, self.config.evals.tasks)  # all ranks
        if self.engine.accelerator.is_main_process:
            harness.append_history(self.config.run, state.step, "val", results)
        for result in results:
            if result.error:
                telemetry.say(f"evaluation {result.task} failed at step {state.step}: {result.error}")
        metrics = {f"{result.task}/{name}": value for result in results for name, value in result.metrics.items()}
        value = metrics.get(self.config.evals.best)
        if value is None:
            telemetry.say(f"step {state.step}: val has no metric {self.config.evals.best!r}; evals.best cannot choose")
            return False
        telemetry.say(f"step {state.step}: val {self.config.evals.best} {value:.1f}")
        if state.best is not None and value <= state.best:
            return False
        state.best, state.best_step = value, state.step
        return True

    def _encode(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            return self.engine(batch.to(self.engine.device), embed_only=True)
