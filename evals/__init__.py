"""Evaluation: embeddings of a held-out split -> numbers and pictures. Tasks are registered by name.

A task is a class with a keyword-only, typed constructor (its signature is its configuration schema) and
`run(embeddings: EmbeddingSet) -> Result`. It never sees the model, the ranks or the loop: it is a deterministic
function of one set of embeddings on the CPU.
"""

from __future__ import annotations

from ..datasets.registry import Registry

TASKS = Registry("task", "trivium.evals")
register = TASKS.register


def names() -> list[str]:
    """Names of all registered tasks."""
    return TASKS.names()
