"""Objectives: unit vectors of several modalities -> a loss. One paper a file, each registered by name.

An objective is an `nn.Module` with a keyword-only, typed constructor (its signature is its configuration schema, its
docstring its help) and `forward(z: Embeddings) -> Loss`. It sees the world only through `Embeddings`: it never asks
for rank or world size.
"""

from __future__ import annotations

from typing import Any

from ..datasets.registry import Registry
from .embeddings import Embeddings, Loss, Objective

OBJECTIVES = Registry("objective", "trivium.objectives")
register = OBJECTIVES.register

__all__ = ["OBJECTIVES", "Embeddings", "Loss", "Objective", "build", "names", "register"]


def build(name: str, **options: Any) -> Objective:
    """The objective called `name`. Raises InputError for an unknown name or option, naming the nearest."""
    return OBJECTIVES.build(name, **options)


def names() -> list[str]:
    """Names of all registered objectives."""
    return OBJECTIVES.names()
