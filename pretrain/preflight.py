"""Everything that can be known to be wrong before the first step, found before a GPU is busy."""

from __future__ import annotations

import os
import tempfile

import yaml

from ..datasets.registry import InputError
from ..evals import harness
from ..modalities import TOWERS
from ..modalities.model import MultimodalModel
from ..modalities.weights import load_matching
from ..objectives import OBJECTIVES
from . import state as checkpoints
from .config import Config, load
from .loop import source_of, weights_source

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
    if config.init_from and not checkpoints.find(config.run)[0]:
        load_matching(model, weights_source(config.init_from))
    found = {}
    for split in ("train", "val", "test"):
        pattern = getattr(config.data, split)
        if pattern is not None:
            source = source_of(config, model, pattern)
            found[split] = {"clips": len(source)} | (source.check() or {})
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
            raise InputError(
                f"run={config.run} holds a run with {key}={old.get(key)!r}, now it is {new.get(key)!r}; "
                "choose another run=, or start from its weights with init_from="
            )


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def is_finished(config: Config) -> bool:
    """The run has taken all its steps and its last checkpoint is whole."""
    folder, _ = checkpoints.find(config.run)
    return folder is not None and folder.name == checkpoints.folder_name(config.train.steps)
