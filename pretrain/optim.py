"""Parameter groups by regular expression, and schedules as pure functions of the step."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from ..datasets.registry import InputError
from .config import Train


def learning_rate_scale(step: int, train: Train) -> float:
    """Share of the peak learning rate in force at optimizer step `step` (0-based): warm-up, then the schedule."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if train.schedule == "cosine" else 1 - progress
    return train.final_lr_scale + (1 - train.final_lr_scale) * falling


def freeze(module: nn.Module, train: Train) -> None:
    """Turn off the gradient of the parameters whose group says `frozen`. Before the module is prepared."""
    for name, parameter in module.named_parameters():
        group = _group(name, train)
        if group is not None and train.groups[group].frozen:
            parameter.requires_grad_(False)


def parameter_groups(module: nn.Module, train: Train) -> list[dict]:
    """AdamW's groups: one for each (matched group, decayed or not) that holds trainable parameters.

    Vectors and scalars (norms, biases, temperatures) are not decayed. Each group carries `lr_scale`, by which
    `set_learning_rate` multiplies the scheduled rate. Raises InputError when a group's expression matches nothing.
    """
    grouped: dict[tuple[int | None, bool], list[nn.Parameter]] = {}
    matched = set()
    for name, parameter in module.named_parameters():
        group = _group(name, train)
        matched.add(group)
        if parameter.requires_grad:
            grouped.setdefault((group, parameter.ndim > 1), []).append(parameter)
    for index, group in enumerate(train.groups):
        if index not in matched:
            raise InputError(
                f"train.groups: {group.match!r} is the first match of no parameter; names look like "
                f"{next(module.named_parameters())[0]!r}"
            )
    if not grouped:
        raise InputError("train.groups freeze every parameter; leave at least one group to train")
    result = []
    for (index, decayed), parameters in grouped.items():
        group = None if index is None else train.groups[index]
        decay = train.weight_decay if group is None or group.weight_decay is None else group.weight_decay
        result.append(
            {
                "params": parameters,
                "lr_scale": 1.0 if group is None else group.lr_scale,
                "weight_decay": decay if decayed else 0.0,
            }
        )
    return result


def build_optimizer(module: nn.Module, train: Train) -> torch.optim.Optimizer:
    """AdamW at learning rate 0: DeepSpeed takes a dummy step while it initialises; the loop sets the rate."""
    return torch.optim.AdamW(parameter_groups(module, train), lr=0.0, betas=train.betas, eps=train.eps)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, train: Train) -> float:
    """Set every group's rate for optimizer step `step`; returns the rate of an unscaled group."""
    rate = train.lr * learning_rate_scale(step, train)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    return rate


def _group(name: str, train: Train) -> int | None:
    return next((index for index, group in enumerate(train.groups) if re.search(group.match, name)), None)
