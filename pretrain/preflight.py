"""Everything that can be known to be wrong before the first step, found before a GPU is busy."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import yaml
from torch.nn import functional as F

from ..datasets.registry import InputError, nearest
from ..evals import harness
from ..evals.embeddings import EmbeddingSet
from ..modalities import TOWERS
from ..modalities.model import MultimodalModel
from ..modalities.weights import load_matching
from ..objectives import OBJECTIVES
from . import state as checkpoints
from .build import source_of, weights_source
from .config import Config, ForeignRun, Patterns, load
from .optim import freeze, parameter_groups
from .step import TrainModule

MAY_CHANGE = ("name", "run", "data.workers", "checkpoint", "log", "evals", "distributed")
"""Options that a resumed run may have other values of: none of them changes what is learned."""


def check(recipe: str, overrides: list[str]) -> dict:
    """Load a recipe and check it against its data and its run directory.

    Returns what was found, for people: clips by split and modality. Raises InputError.
    """
    config = load(recipe, overrides)
    return check_config(config)


def check_config(config: Config) -> dict:
    """As `check`, of a configuration that is loaded already. Writes nothing that stays."""
    OBJECTIVES.validate(config.objective.name, config.objective.options)
    harness.check_tasks(config.evals.tasks)
    for name, modality in config.modalities.items():
        try:
            TOWERS.validate(modality.tower.name, modality.tower.options)
        except InputError as error:
            raise InputError(f"modalities.{name}.tower: {error}") from None
    check_run_directory(config)
    model = MultimodalModel(config.tree()["modalities"], config.dim)
    objective = OBJECTIVES.build(config.objective.name, **config.objective.options)
    objective.check(model.names)
    check_best(config, model.names)
    module = TrainModule(model, objective, config.train.precision)
    freeze(module, config.train)
    parameter_groups(module, config.train)
    begun, _ = checkpoints.find(config.run)
    if config.init_from and not begun:
        load_matching(model, weights_source(config.init_from))
    found = {}
    for split in ("train", "val", "test"):
        pattern = getattr(config.data, split)
        if pattern is not None:
            source = source_of(config, model, pattern)
            found[split] = {"clips": len(source)} | source.check()
            check_readable(config, pattern, found[split])
            if split == "train" and begun:
                check_same_data(config, pattern, source.index.digest(), begun)
            if split == "train" and "bucket" in objective.needs and not source.bucketed:
                raise InputError(
                    f"objective {config.objective.name!r} needs bucket ids, and the samples of {pattern!r} have none; "
                    "give every sample's json a `bucket`"
                )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.train.batch_size % world:
        low = config.train.batch_size // world * world
        raise InputError(
            f"train.batch_size={config.train.batch_size} does not divide over {world} processes; "
            f"use {low or world} or {low + world}"
        )
    if config.train.batch_size > found["train"]["clips"]:
        raise InputError(
            f"train.batch_size={config.train.batch_size} is larger than the dataset ({found['train']['clips']} clips); "
            f"use at most {found['train']['clips']}"
        )
    return found


def check_best(config: Config, names: tuple[str, ...]) -> None:
    """`evals.best` must name metrics that the tasks will give: they are asked, with a few made-up clips."""
    z = {name: F.normalize(torch.randn(4, 8), dim=-1) for name in names}
    clips = tuple("abcd")
    made_up = EmbeddingSet(
        z=z,
        valid={name: torch.ones(4, dtype=torch.bool) for name in names},
        keys=clips,
        captions=tuple((clip,) for clip in clips),
        bucket=torch.tensor([0, 0, 1, 1]),
    )
    results = harness.run_tasks(made_up, config.evals.tasks)
    known = [f"{result.task}/{name}" for result in results for name in result.metrics]
    for metric in config.evals.best:
        if metric not in known:
            raise InputError(f"evals.best={metric!r} is no metric of the tasks; {nearest(metric, known)}")


def check_readable(config: Config, pattern: Patterns, found: dict) -> None:
    """The share of samples whose headers cannot be read must not exceed `data.corrupt_share`."""
    unreadable = found.get("unreadable", 0)
    if unreadable > config.data.corrupt_share * found["clips"]:
        raise InputError(
            f"{unreadable} of the {found['clips']} samples of {pattern!r} cannot be read, more than "
            f"data.corrupt_share={config.data.corrupt_share}; repair the shards or raise the share"
        )


def check_same_data(config: Config, pattern: Patterns, digest: str, begun: Path) -> None:
    """A resumed run must find the samples it began with: their order is a function of all of them."""
    before = checkpoints.read_state(begun)
    if before.data != digest:
        raise ForeignRun(
            f"run={config.run} is at step {before.step} of other data than {pattern!r} holds now; put back the shards "
            "it began with, or choose another run= and start from its weights with init_from="
        )


def check_run_directory(config: Config) -> None:
    """The run directory must be writable and hold either nothing or a run of this very configuration."""
    run = config.run
    existing = run / "config.yaml"
    if existing.is_file():
        _same_run(yaml.safe_load(existing.read_text()), config)
    nearest_parent = next(p for p in (run, *run.absolute().parents) if p.exists())
    try:  # permission bits say nothing of full disks, read-only mounts and root
        with tempfile.TemporaryFile(dir=nearest_parent):
            pass
    except OSError as error:
        raise InputError(
            f"run={run}: nothing can be written into {nearest_parent} ({error.strerror}); choose another run="
        ) from None


def _same_run(former: dict, config: Config) -> None:
    old, new = _flat(former), _flat(config.tree())
    for key in sorted(set(old) | set(new)):
        if old.get(key) != new.get(key) and not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE):
            raise ForeignRun(
                f"run={config.run} holds a run with {key}={old.get(key)!r}, now it is {new.get(key)!r}; "
                "choose another run=, or start from its weights with init_from="
            )


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def finished(config: Config) -> Path | None:
    """The last checkpoint of a run that has taken all its steps, if it is whole."""
    folder, _ = checkpoints.find(config.run)
    return folder if folder is not None and folder.name == checkpoints.folder_name(config.train.steps) else None
