"""What the space looks like: its geometry as numbers, its t-SNE as a picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..datasets.registry import InputError
from ..objectives.geometry import geometry
from . import register
from .embeddings import EmbeddingSet
from .results import Result


@register("geometry")
class Geometry:
    """Alignment, uniformity, modality gap, conflict measures and Hölder divergence of a split's embeddings.

    Args:
        tau: temperature of the conflict measures, bandwidth of the divergence's kernel.
        limit: most items used: time and memory grow with its square.

    The protocol's n counts the items used, n_missing those of them that lack a modality: each measure takes the items
    that have what it compares.
    """

    def __init__(self, *, tau: float = 0.07, limit: int = 2048) -> None:
        if limit < 2:
            raise InputError(f"limit={limit}: geometry compares items, so it needs 2 or more")
        self.tau = tau
        self.limit = limit

    def run(self, embeddings: EmbeddingSet) -> Result:
        n = min(len(embeddings), self.limit)
        rows = torch.arange(n) * len(embeddings) // max(n, 1)  # evenly spaced
        z = {name: x[rows] for name, x in embeddings.z.items()}
        valid = {name: x[rows] for name, x in embeddings.valid.items()}
        protocol = {
            "n": n,
            "n_missing": {name: int((~there).sum()) for name, there in valid.items()},
            "tau": self.tau,
            "split_sha256": embeddings.digest(),
        }
        return Result("geometry", geometry(z, valid, tau=self.tau, limit=self.limit), {}, protocol)


@dataclass(frozen=True)
class Projection:
    """n points in the plane: `xy` float (n, 2), `modality` a name each, `item` int64 (n,) the row of its item."""

    xy: Tensor
    modality: tuple[str, ...]
    item: Tensor


def tsne(embeddings: EmbeddingSet, *, max_items: int = 300, seed: int = 0) -> Projection | None:
    """All modalities of a random subset of items in one t-SNE (scikit-learn, PCA start); None with fewer than 5 points.

    The seed is the function's own: the global random state is neither used nor changed.
    """
    from sklearn.manifold import TSNE

    rows = subset(len(embeddings), max_items, seed)
    parts = [(name, rows[embeddings.valid[name][rows]]) for name in embeddings.names]
    z = torch.cat([embeddings.z[name][kept] for name, kept in parts])
    if len(z) < 5:
        return None
    perplexity = min(30.0, (len(z) - 1) / 3)
    model = TSNE(init="pca", perplexity=perplexity, random_state=seed, n_jobs=1)
    xy = torch.from_numpy(model.fit_transform(z.numpy()))
    modality = tuple(name for name, kept in parts for _ in range(len(kept)))
    return Projection(xy, modality, torch.cat([kept for _, kept in parts]))


def subset(total: int, count: int, seed: int = 0) -> Tensor:
    """At most `count` different rows of 0..total-1 in order, int64: the same for the same arguments."""
    if total <= count:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values
