"""Zero-shot evaluation while training, on the validation split: chooses the best checkpoint, changes nothing else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..datasets.batch import Batch
from ..evals import harness
from .config import Config
from .engine import Engine
from .health import append_skips
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
        """Evaluate, append to evals.jsonl. All ranks. True when what chooses the best checkpoint rose."""
        self.engine.module.eval()
        results = harness.evaluate(self._encode, self.batches, self.total, self.config.evals.tasks)  # all ranks
        if self.engine.accelerator.is_main_process:
            harness.append_history(self.config.run, state.step, "val", results)
            append_skips(self.config.run / "skipped.jsonl", results.skipped, "val")
        for result in results:
            if result.error:
                telemetry.say(f"evaluation {result.task} failed at step {state.step}: {result.error}")
        metrics = {f"{result.task}/{name}": value for result in results for name, value in result.metrics.items()}
        best = self.config.evals.best
        if absent := [name for name in best if name not in metrics]:
            telemetry.say(f"step {state.step}: val has no metric {absent[0]!r}; evals.best cannot choose")
            return False
        value = sum(metrics[name] for name in best) / len(best)
        telemetry.say(f"step {state.step}: val " + ", ".join(f"{name} {metrics[name]:.1f}" for name in best))
        if state.best is not None and value <= state.best:
            return False
        state.best, state.best_step = value, state.step
        return True

    def _encode(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            z = self.engine(batch.to(self.engine.device), embed_only=True)
        return {name: z[name] for name in batch.present}
