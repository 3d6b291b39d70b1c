"""One training step: towers and objective in one module, plain or with cached embeddings."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..datasets.batch import Batch
from ..modalities.model import FEATURES, MultimodalModel
from ..objectives import Embeddings, Loss, Objective
from ..objectives.geometry import term_conflicts
from .engine import Engine

CONFLICT = "conflict/"


class TrainModule(nn.Module):
    """Model and objective: the one module that is prepared, so that objectives may own parameters.

    Args:
        model, objective: what trains.
        precision: "bf16" runs the towers under autocast; unit vectors and scores are fp32 always.
    """

    def __init__(self, model: MultimodalModel, objective: Objective, precision: str) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.precision = precision
        objective.setup(model.names, model.dim, {name: tower.width for name, tower in model.towers.items()})

    def forward(
        self,
        batch: Batch,
        z: Mapping[str, Tensor] | None = None,
        *,
        embed_only: bool = False,
        conflicts: bool = False,
    ) -> dict[str, Tensor] | tuple[Loss, dict[str, Tensor]]:
        """What the objective sees of a batch (`embed_only`): its embeddings, and features if they are needed; or its
        Loss and all that, computed here unless given. With `conflicts` among the loss's parts: those of its terms."""
        if z is None:
            device = next(iter(batch.present.values())).device.type
            with torch.autocast(device, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                z = self.model(batch.inputs, features="features" in self.objective.needs)
        if embed_only:
            return dict(z)
        vectors = {name: z[name] for name in self.model.names}
        features = {name: z[FEATURES + name] for name in vectors if FEATURES + name in z} or None
        loss = self.objective(
            Embeddings(vectors, batch.present, keys=batch.keys, bucket=batch.bucket, features=features)
        )
        if conflicts:
            found = term_conflicts(loss.terms, list(vectors.values()))
            loss.parts.update({f"{CONFLICT}{name}": cosine for name, cosine in found.items()})
        # every tower takes part in every backward, also one whose modality the objective did not use this time
        idle = sum(x.sum() for x in z.values()) * 0.0
        return loss._replace(total=loss.total + idle), dict(z)


def train_step(
    engine: Engine, batch: Batch, chunk: int | None, seed: tuple[int, ...], conflicts: bool = False
) -> tuple[Loss, dict[str, Tensor]]:
    """Accumulate the gradients of one batch. All ranks. Returns the loss and the embeddings, both detached from use.

    Args:
        chunk: clips per forward pass, or None for all at once. In chunks the gradient stays the same: the towers run
            without gradient, the objective sees all embeddings and gives their gradients, then the towers run again
            chunk by chunk with those (GradCache), every random draw of the first pass replayed.
        seed: (run's seed, step, rank): every draw of this step is a function of it, so no generator need be saved.
        conflicts: measure the conflicts of the loss's terms too: one more backward of the objective for each.
    """
    # a part of a graph is walked then, which ZeRO-3's hooks do not bear
    extra = {"conflicts": True} if conflicts and engine.stage < 3 else {}
    if chunk is None or chunk >= len(batch):
        seed_everything(*seed, 0)
        with engine.pass_(last=True):
            loss, z = engine(batch, **extra)
            engine.backward(loss.total)
        return loss, z
    chunks = [batch.slice(start, start + chunk) for start in range(0, len(batch), chunk)]
    z = _embed_without_gradient(engine, chunks, seed)
    loss = _objective_pass(engine, batch, z, extra)
    for index, part in enumerate(chunks):
        seed_everything(*seed, index)
        last = index == len(chunks) - 1
        with engine.pass_(last=last):
            again = engine(part, embed_only=True)
            rows = slice(index * chunk, index * chunk + len(part))
            # the inner product's gradient is the objective's, carried on into the towers
            surrogate = sum((again[name] * z[name].grad[rows]).sum() for name in z)
            engine.backward(surrogate + engine.idle_objective())
    return loss, z


def _embed_without_gradient(engine: Engine, chunks: list[Batch], seed: tuple[int, ...]) -> dict[str, Tensor]:
    """All embeddings of this rank as leaves that collect the objective's gradient."""
    parts = []
    for index, part in enumerate(chunks):
        seed_everything(*seed, index)
        with torch.no_grad():
            parts.append(engine(part, embed_only=True))
    return {name: torch.cat([part[name] for part in parts]).requires_grad_() for name in parts[0]}


def _objective_pass(engine: Engine, batch: Batch, z: dict[str, Tensor], extra: Mapping[str, bool]) -> Loss:
    """Loss of the cached embeddings; leaves d loss / d z in `z[...].grad` and accumulates the objective's own."""
    if not any(parameter.requires_grad for parameter in engine.module.objective.parameters()):
        loss, _ = engine.module(batch, dict(z), **extra)  # nothing of the engine's takes part
        loss.total.backward()
        return loss
    with engine.objective_pass():
        loss, _ = engine(batch, dict(z), **extra)  # ZeRO-3 puts its hooks into the dict that it is given
        engine.backward(loss.total)
    return loss


def seed_everything(*numbers: int) -> None:
    """Seed python, numpy and torch (all devices) with a function of the numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
