"""What stops a run that should not go on: a loss that is not finite, too many corrupt samples, a wish from outside."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import torch

from ..datasets.batch import Batch, Skip
from ..datasets.registry import InputError
from ..objectives import Loss
from .config import Config
from .engine import Engine
from .state import RunState

JUDGED_AFTER = 1000  # samples seen before the share of corrupt ones is judged


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the weights are those of the step before."""


def report_non_finite(config: Config, engine: Engine, step: int, numbers: dict, batch: Batch, loss: Loss) -> None:
    """Write nonfinite.json with the step, the loss parts and the sample keys of every rank, and raise. All ranks."""
    own = {
        "rank": engine.accelerator.process_index,
        "total": float(loss.total.detach()),
        "parts": {name: float(value) for name, value in loss.parts.items()},
        "keys": list(batch.keys),
    }
    ranks = [own]
    if engine.accelerator.num_processes > 1:
        ranks = [None] * engine.accelerator.num_processes
        torch.distributed.all_gather_object(ranks, own)  # all ranks
    path = config.run / "nonfinite.json"
    if engine.accelerator.is_main_process:
        path.write_text(json.dumps({"step": step, "loss": numbers, "ranks": ranks}, indent=1))
    parts = ", ".join(f"{name.removeprefix('loss/')}={value:g}" for name, value in numbers.items() if "loss" in name)
    raise NonFiniteLoss(
        f"the loss of step {step + 1} is not finite ({parts}); the sample keys are in {path}; "
        "lower train.lr or resume from the checkpoint before it"
    )


def write_skips(run: Path, engine: Engine, skips: list[Skip]) -> list[Skip]:
    """Append every rank's corrupt samples to skipped.jsonl, each position once. All ranks. Returns an empty list."""
    everyone = [skips]
    if engine.accelerator.num_processes > 1:
        everyone = [None] * engine.accelerator.num_processes
        torch.distributed.all_gather_object(everyone, skips)  # all ranks
    path = run / "skipped.jsonl"
    if engine.accelerator.is_main_process and any(everyone):
        lines = path.read_text().splitlines() if path.exists() else []
        known = {json.loads(line)["position"] for line in lines}
        with path.open("a") as file:
            for skip in (skip for part in everyone for skip in part if skip.position not in known):
                file.write(json.dumps(vars(skip)) + "\n")
    return []


def check_corrupt(config: Config, state: RunState, samples: int) -> None:
    """InputError on every rank when too large a share of the samples seen was corrupt."""
    limit = config.data.corrupt_share
    if state.samples >= min(JUDGED_AFTER, samples) and state.skipped > limit * state.samples:
        raise InputError(
            f"{state.skipped} of {state.samples} samples were corrupt, more than data.corrupt_share={limit}; "
            f"see {config.run / 'skipped.jsonl'}, repair the shards or raise the share"
        )


class Stopper:
    """Remembers that SIGTERM or Ctrl-C came; the loop stops at the next step's end with a checkpoint."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self.asked = True
