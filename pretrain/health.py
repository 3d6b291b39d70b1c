"""What stops a run that should not go on: a loss that is not finite, too many corrupt samples, a wish from outside."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..datasets.batch import Batch, Skip
from ..datasets.processes import end_with_the_parent
from ..datasets.registry import InputError
from ..modalities.model import FEATURES
from ..objectives import Loss
from .config import Config
from .engine import Engine
from .state import RunState

JUDGED_AFTER = 1000  # samples seen before the share of corrupt ones is judged


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite; no checkpoint was touched by it."""


def report_non_finite(
    config: Config, engine: Engine, step: int, numbers: dict, batch: Batch, loss: Loss, z: dict[str, Tensor]
) -> None:
    """Write nonfinite.json and raise, naming step, terms, and the samples whose vectors are not finite. All ranks."""
    own = {
        "rank": engine.accelerator.process_index,
        "total": float(loss.total.detach()),
        "parts": {name: float(value) for name, value in loss.parts.items()},
        "vectors": {name: keys for name, x in z.items() if (keys := _broken(batch, name, x))},
        "keys": list(batch.keys),
    }
    ranks = [own]
    if engine.accelerator.num_processes > 1:
        ranks = [None] * engine.accelerator.num_processes
        torch.distributed.all_gather_object(ranks, own)  # all ranks
    path = config.run / "nonfinite.json"
    if engine.accelerator.is_main_process:
        path.write_text(json.dumps({"step": step, "loss": numbers, "ranks": ranks}, indent=1))
    what = "the loss" if not math.isfinite(numbers["loss"]) else "the gradient"
    parts = ", ".join(f"{name.removeprefix('loss/')}={value:g}" for name, value in numbers.items())
    broken = [f"{name} of {keys[0]!r}" for rank in ranks for name, keys in rank["vectors"].items()]
    first = f"; not finite already are the vectors: {', '.join(broken)}" if broken else ""
    raise NonFiniteLoss(
        f"{what} of step {step + 1} is not finite ({parts}){first}; {path} has all sample keys; "
        "lower train.lr or resume from the checkpoint before it"
    )


def _broken(batch: Batch, name: str, x: Tensor) -> list[str]:
    """Keys of the samples that have the modality and a vector (or tower feature) of it that is not finite."""
    there = batch.present[name.removeprefix(FEATURES)]
    rows = (there & ~x.detach().isfinite().all(dim=1)).nonzero().flatten().tolist()
    return [batch.keys[row] for row in rows]


def write_skips(run: Path, engine: Engine, skips: list[Skip]) -> list[Skip]:
    """Append every rank's corrupt samples to skipped.jsonl, each once. All ranks. Returns an empty list."""
    everyone = [skips]
    if engine.accelerator.num_processes > 1:
        everyone = [None] * engine.accelerator.num_processes
        torch.distributed.all_gather_object(everyone, skips)  # all ranks
    if engine.accelerator.is_main_process and any(everyone):
        append_skips(run / "skipped.jsonl", [skip for part in everyone for skip in part], "train")
    return []


def append_skips(path: Path, skips: Sequence[Skip], split: str) -> None:
    """Append the skips that are not in the file yet. A line that a kill has cut short is dropped."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    known = {(line["split"], line["position"], line["key"]) for line in lines}
    new = {(split, skip.position, skip.key): {"split": split, **vars(skip)} for skip in skips}
    lines += [line for key, line in new.items() if key not in known]
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scratch.replace(path)


def check_corrupt(config: Config, state: RunState, samples: int) -> None:
    """InputError on every rank when too large a share of the samples seen was corrupt.

    Judged once an epoch or JUDGED_AFTER samples have been seen, and at the end of the run.
    """
    limit = config.data.corrupt_share
    enough = state.samples >= min(JUDGED_AFTER, samples) or state.step == config.train.steps
    if enough and state.skipped > limit * state.samples:
        raise InputError(
            f"{state.skipped} of {state.samples} samples were corrupt, more than data.corrupt_share={limit}; "
            f"see {config.run / 'skipped.jsonl'}, repair the shards or raise the share"
        )


def end_with_the_launcher() -> None:
    """Let the end of the launcher count as SIGTERM: `kill` of `accelerate launch` would leave this process alone.

    Only below a launcher: a run started from a shell may outlive it.
    """
    if {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & set(os.environ):
        end_with_the_parent(signal.SIGTERM)


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
