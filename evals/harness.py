"""A model and a split -> results, on all ranks, without a hang and without a trace in the random state."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from ..datasets.batch import Batch
from . import TASKS
from .embeddings import EmbeddingError, EmbeddingSet, Encode, distributed, embed
from .results import Result, Results, append_history, write_results

if TYPE_CHECKING:
    from ..datasets.stream import Source
    from ..modalities.model import MultimodalModel

__all__ = [
    "EmbeddingError", "EmbeddingSet", "Result", "Results", "append_history", "check_tasks", "embed", "evaluate",
    "evaluate_split", "run_tasks", "write_results",
]  # fmt: skip

log = logging.getLogger(__name__)

Tasks = Mapping[str, Mapping[str, Any]]


def evaluate(encode: Encode, batches: Iterable[Batch], total: int, tasks: Tasks) -> Results:
    """Embed a split on all ranks and run the tasks on it; the same results on every rank.

    The samples that could not be read count as missing in every number, and are the `skipped` of what is returned.

    Nothing that goes wrong here stops a run: when the split cannot be embedded, each task gets an error in place of
    metrics; when one task fails, it alone does. The states of all random generators are put back afterwards.
    Putting the model into evaluation mode, and back into training mode, is the caller's business.

    Args:
        encode, batches, total: see `embed`.
        tasks: by registered task name, its constructor's options.
    """
    with preserved_rng():
        try:
            embeddings = embed(encode, batches, total)
        except EmbeddingError as error:  # raised on all ranks or on none
            return Results(Result(name, error=f"the split could not be embedded: {error}") for name in tasks)
        return Results(run_tasks(embeddings, tasks), embeddings.skipped)


def evaluate_split(
    model: MultimodalModel,
    source: Source,
    tasks: Tasks,
    *,
    batch_size: int,
    workers: int,
    folder: Path | None = None,
    about: Mapping[str, Any] | None = None,
) -> tuple[list[Result], EmbeddingSet]:
    """The final evaluation: embed every item of a source, run the tasks, write both into a folder. All ranks.

    Args:
        model: on this rank's device, in evaluation mode.
        source: the split.
        batch_size: items per forward pass of a rank.
        workers: decoding processes per rank.
        folder: where `write_results` writes, on the first rank; None writes nothing.
        about: where the numbers come from; the kind of each modality's input is added.

    Raises EmbeddingError on all ranks when the split cannot be embedded.
    """
    from ..datasets.stream import eval_batches

    device = next(model.parameters()).device
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)
    with preserved_rng():
        batches = eval_batches(source, batch_size=batch_size, rank=rank, world=world, workers=workers)
        embeddings = embed(lambda batch: model(batch.to(device).inputs), batches, len(source))
        results = run_tasks(embeddings, tasks)
    if folder is not None and rank == 0:
        kinds = {name: spec.kind for name, spec in model.specs.items()}
        write_results(folder, results, embeddings, {**(about or {}), "kinds": kinds})
    return results, embeddings


def run_tasks(embeddings: EmbeddingSet, tasks: Tasks) -> list[Result]:
    """Run each task on the first rank and hand its result to all; a task that raises gives a Result with `error`.

    Every protocol says how many items the split has and how many of them could not be read, whatever its task says.
    """
    results = None
    if not distributed() or dist.get_rank() == 0:
        with preserved_rng():
            results = [_run(name, options, embeddings) for name, options in tasks.items()]
    if not distributed():
        return results
    shared = [results]
    dist.broadcast_object_list(shared, src=0)  # all ranks
    return shared[0]


def check_tasks(tasks: Tasks) -> None:
    """Build each task and throw it away: InputError for an unknown task or option, before any work is done."""
    for name, options in tasks.items():
        TASKS.build(name, **(options or {}))


def _run(name: str, options: Mapping[str, Any], embeddings: EmbeddingSet) -> Result:
    try:
        result = TASKS.build(name, **(options or {})).run(embeddings)
        counts = {"n_items": len(embeddings), "n_unreadable": len(embeddings.skipped)}
        return replace(result, protocol=counts | result.protocol)
    except Exception as error:  # one task must not take the run, nor the other tasks, with it
        log.exception("task %s failed", name)
        return Result(name, error=f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Put the states of Python's, NumPy's and PyTorch's generators (CPU and current GPU) back at the end."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)
