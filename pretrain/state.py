"""Everything resumable as one object, saved atomically.

A checkpoint is a folder `RUN/checkpoints/step-00000300`: model.safetensors and model.json (what evaluation and
`init_from` read), objective.safetensors, optimizer.safetensors (AdamW's moments by parameter name, whatever the engine
and the number of ranks), state.json, and manifest.json with size and SHA-256 of each file. It is written under another
name, flushed, and renamed: a folder called `step-...` is complete. Nothing in it is a pickle.

The schedule, the data order and every random draw are functions of (seed, step, rank) or (seed, position), so the step
is their whole state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..datasets.registry import InputError
from ..modalities.weights import save_model
from .engine import Engine


@dataclasses.dataclass
class RunState:
    """Where a run is.

    Attributes:
        step: optimizer steps taken.
        samples: clips seen, over all ranks; also the next position in the data plan.
        skipped: corrupt samples met (and replaced) so far.
        best: highest value of the metric that chooses the best checkpoint, or None.
        best_step: the step that reached it.
        seconds: time spent training, over all starts of the run.
        data: digest of the training data's index: the order of the samples is a function of it.
    """

    step: int = 0
    samples: int = 0
    skipped: int = 0
    best: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    data: str = ""


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def save(run: Path, engine: Engine, state: RunState, keep: int) -> None:
    """Write a checkpoint of now, point `latest` (and `best`, if it is this step) at it, prune old ones. All ranks.

    When writing fails on the main process every rank raises the same InputError; earlier checkpoints are untouched.
    """
    weights, moments = engine.weights(), engine.moments()  # all ranks
    error = None
    if engine.accelerator.is_main_process:
        try:
            _write(run / "checkpoints", weights, moments, engine.module.model.description(), state, keep)
        except OSError as failure:
            error = f"cannot write a checkpoint below {run}: {failure.strerror or failure}; free space there"
    raise_everywhere(error)


def raise_everywhere(error: str | None) -> None:
    """Raise InputError on every rank when any rank brings an error message. All ranks."""
    errors = [error]
    if torch.distributed.is_initialized():
        errors = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(errors, error)  # all ranks
    first = next((message for message in errors if message), None)
    if first:
        raise InputError(first)


def find(run: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run, or None, and messages about damaged ones that were passed over."""
    messages = []
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        problem = _damage(folder)
        if problem is None:
            return folder, messages
        messages.append(f"checkpoint {folder.name} is passed over: {problem}")
    return None, messages


def load_weights(folder: Path, module: nn.Module) -> None:
    """Load a checkpoint's model and objective into the unprepared TrainModule; InputError if it is of another model."""
    tensors = {f"model.{name}": x for name, x in load_file(folder / "model.safetensors").items()}
    tensors |= {f"objective.{name}": x for name, x in load_file(folder / "objective.safetensors").items()}
    own = module.state_dict()
    odd = sorted(set(own) ^ set(tensors)) + [
        name for name in own if name in tensors and own[name].shape != tensors[name].shape
    ]
    if odd:
        raise InputError(
            f"checkpoint {folder} is of another model: {len(odd)} tensors differ, first {odd[0]!r}; "
            "choose another run=, or start from its weights with init_from="
        )
    module.load_state_dict(tensors)


def load_rest(folder: Path, engine: Engine) -> RunState:
    """Load the optimizer's state into the prepared engine; returns where the run was. All ranks."""
    engine.load_moments(load_file(folder / "optimizer.safetensors"))
    return read_state(folder)


def read_state(folder: Path) -> RunState:
    """Where the run was when it wrote the checkpoint `folder`."""
    return RunState(**json.loads((folder / "state.json").read_text()))


def point(folder: Path) -> None:
    """Let `latest` name this checkpoint and `best` the one that its state calls so. Main process.

    Also done when a run starts again: it may have been killed between the checkpoint and its pointers.
    """
    root, state = folder.parent, read_state(folder)
    _point(root / "latest", folder.name)
    best = folder_name(state.best_step) if state.best_step is not None else folder.name
    if (root / best).is_dir():
        _point(root / "best", best)


def _write(root: Path, weights: dict, moments: dict, description: dict, state: RunState, keep: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    final = root / folder_name(state.step)
    scratch = root / f".{final.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        parts: dict[str, dict] = {"model": {}, "objective": {}}
        for name, tensor in weights.items():
            owner, _, rest = name.partition(".")
            parts[owner][rest] = tensor.contiguous()
        save_model(scratch, parts["model"], description)
        save_file(parts["objective"], scratch / "objective.safetensors")
        save_file({name: x.contiguous() for name, x in moments.items()}, scratch / "optimizer.safetensors")
        (scratch / "state.json").write_text(json.dumps(dataclasses.asdict(state), indent=1))
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in scratch.iterdir()}
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in scratch.iterdir():
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)  # the same step, written by an earlier start of this run
        scratch.rename(final)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    _flush(root)
    point(final)
    _prune(root, final, keep, state.best_step)


def _prune(root: Path, newest: Path, keep: int, best_step: int | None) -> None:
    # later ones are damaged, or `newest` would not have been written: they do not count, and are overwritten in time
    folders = [folder for folder in sorted(root.glob("step-*")) if folder.name <= newest.name]
    for folder in folders[:-keep]:
        if best_step is None or folder.name != folder_name(best_step):
            shutil.rmtree(folder)
    for leftover in root.glob(".step-*.partial"):
        shutil.rmtree(leftover)


def _point(path: Path, name: str) -> None:
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(name + "\n")
    _flush(scratch)
    scratch.replace(path)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return "it has no readable manifest.json"
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return f"{name} is missing or cut short"
        if _digest(path) != entry["sha256"]:
            return f"{name} was changed after it was written"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
