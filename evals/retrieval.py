"""Zero-shot retrieval: exact ranks, with missing items and ties counted honestly.

Ranks are computed over chunks of queries; no query x gallery matrix is kept. The conventions:

- rank 0 is the best; tied entries share the average of their ranks, so a collapsed model scores chance at most and
  the order of the files cannot leak. R@k counts ranks <= k - 1, hence R@1 counts rank 0 alone.
- an entry is relevant when it carries the query's label: its item ("instance"; also right for several captions per
  item, in both directions: the best relevant entry counts) or its bucket ("bucket").
- a query that is missing, or whose relevant entries are all missing, is counted as wrong, and ranked last in MedR and
  MeanR. Nothing is dropped from the denominator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..datasets.registry import InputError, nearest
from ..objectives.gram import volume_scores
from . import register
from .embeddings import EmbeddingSet
from .results import Result

Score = Callable[[Tensor], Tensor]
CELLS = 1 << 22  # scores held at a time: 16 MB


def ranks(score: Score, query: Tensor, gallery: Tensor, *, chunk: int | None = None) -> Tensor:
    """0-based rank of each query's best relevant gallery entry; float64 (Q,).

    With g irrelevant entries above the best relevant one, and e entries (r of them relevant) tied with it, the rank is
    g + (e - r) / (r + 1): its mean over all orders of the tied entries. A query without a relevant entry gets inf.

    ValueError when a score is not a number: it would compare as neither above nor tied, and so pass for a hit.

    Args:
        score: query rows int64 (n,) -> scores (n, G), higher is better.
        query: labels of the queries, int64 (Q,). Relevant are the gallery entries with the same label.
        gallery: labels of the gallery entries, int64 (G,).
        chunk: queries scored at a time; by default as many as keep the scores within 16 MB.
    """
    size = len(gallery)
    out = [torch.zeros(0, dtype=torch.float64)]
    if size == 0:
        return torch.full((len(query),), torch.inf, dtype=torch.float64)
    chunk = chunk or max(1, CELLS // size)
    for start in range(0, len(query), chunk):
        rows = torch.arange(start, min(start + chunk, len(query)))
        s = score(rows)
        if s.isnan().any():
            raise ValueError(f"{int(s.isnan().sum())} scores of queries {start} to {int(rows[-1])} are not numbers")
        relevant = query[rows, None] == gallery
        best = s.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
        above = (s > best).sum(dim=1)
        tied = s == best
        r = (tied & relevant).sum(dim=1)
        rank = above + (tied.sum(dim=1) - r).double() / (r + 1)
        out.append(torch.where(relevant.any(dim=1), rank, torch.inf))
    return torch.cat(out)


def chance(query: Tensor, gallery: Tensor, k: int) -> float:
    """R@k in percent of a random order: the mean over queries of 1 - C(G - R, k) / C(G, k), R relevant entries of G.

    One relevant entry (instance relevance) gives k / G.
    """
    size = len(gallery)
    if size == 0 or len(query) == 0:
        return 0.0
    if k >= size:
        return 100.0 * torch.isin(query, gallery).double().mean().item()
    labels, counts = torch.unique(gallery, return_counts=True)
    at = torch.searchsorted(labels, query).clamp_max(len(labels) - 1)
    relevant = torch.where(labels[at] == query, counts[at], 0)
    miss = {
        r: math.prod((size - r - i) / (size - i) for i in range(k)) if r <= size - k else 0.0
        for r in set(relevant.tolist())
    }
    return 100.0 * sum(1.0 - miss[r] for r in relevant.tolist()) / len(query)


def summary(rank: Tensor, size: int, ks: tuple[int, ...]) -> dict[str, float]:
    """R@k in percent, and the median and mean of the 1-based ranks, in which inf counts as the last of `size` + 1."""
    if len(rank) == 0:
        return {}
    placed = rank.clamp_max(size) + 1.0
    metrics = {f"R@{k}": recall(rank, k) for k in ks}
    return metrics | {"MedR": float(np.median(placed.numpy())), "MeanR": placed.mean().item()}


def recall(rank: Tensor, k: int) -> float:
    """R@k in percent of 0-based ranks."""
    return 100.0 * (rank <= k - 1).double().mean().item()


def labels(embeddings: EmbeddingSet, relevance: Literal["instance", "bucket"]) -> Tensor:
    """What makes two items relevant to each other, int64 (N,): the item itself, or its bucket where it has one."""
    n = len(embeddings)
    if relevance == "instance" or embeddings.bucket is None:
        return torch.arange(n)
    bucket = embeddings.bucket
    return torch.where(bucket >= 0, bucket, int(bucket.max()) + 1 + torch.arange(n))


def cosine_score(query: Tensor, gallery: Tensor) -> Score:
    """Cosine of unit vectors in float32: query (Q, D), gallery (G, D)."""
    return lambda rows: query[rows] @ gallery.T


def volume_score(anchor: Tensor, others: list[Tensor]) -> Score:
    """Minus the volume spanned by an anchor query (Q, D) and gallery tuples, one (G, D) per member (GRAM)."""
    return lambda rows: -volume_scores(anchor[rows], others)


def tuple_volume_score(others: list[Tensor], anchor: Tensor) -> Score:
    """Minus the volume spanned by query tuples, one (Q, D) per member, and gallery anchors (G, D)."""
    return lambda rows: -volume_scores(anchor, [x[rows] for x in others]).T


@register("retrieval")
class Retrieval:
    """Every modality searched by every other, by cosine; one modality against the tuple of all others, by volume.

    Rows are called `text->video/cosine` or `text->video+audio/volume`; metrics `<row>/R@1`. For each row
    `protocol["rows"]` holds n_query, n_gallery, n_missing and the chance level of each R@k.

    Args:
        relevance: what a hit is. "instance": the query's own item; "bucket": any item of its bucket (an item without
            one counts as its own); "auto": bucket when the split has buckets.
        ks: the k of R@k.
        anchor: the modality that volumes pair with the tuple of all others; the first of the model by default.
        volume: also rank by volume.
    """

    def __init__(
        self,
        *,
        relevance: Literal["auto", "instance", "bucket"] = "auto",
        ks: tuple[int, ...] = (1, 5, 10),
        anchor: str | None = None,
        volume: bool = True,
    ) -> None:
        if not ks or min(ks) < 1:
            raise InputError(f"ks={list(ks)}: every k of R@k is at least 1; use for example [1, 5, 10]")
        self.relevance = relevance
        self.ks = tuple(sorted(set(ks)))
        self.anchor = anchor
        self.volume = volume

    def run(self, embeddings: EmbeddingSet) -> Result:
        relevance = self.relevance
        if relevance == "auto":
            relevance = "instance" if embeddings.bucket is None else "bucket"
        if relevance == "bucket" and embeddings.bucket is None:
            raise InputError("relevance='bucket', but the split has no bucket ids; use relevance=instance")
        label = labels(embeddings, relevance)
        metrics, rows, curves = {}, {}, {}
        for name, query, gallery, score in self._rows(embeddings):
            rank = torch.full((len(embeddings),), torch.inf, dtype=torch.float64)
            rank[query] = ranks(score, label[query], label[gallery])
            metrics |= {f"{name}/{key}": value for key, value in summary(rank, len(gallery), self.ks).items()}
            rows[name] = _counts(label, query, gallery, self.ks)
            curves[name] = _curve(rank, len(gallery))
        protocol = {
            "relevance": relevance,
            "anchor": self.anchor or embeddings.names[0],
            "missing": "counted as wrong and ranked last",
            "ties": "average rank",
            "captions": "one per item",
            "precision": "float32",
            "refinement": "none",
            "split_sha256": embeddings.digest(),
            "rows": rows,
        }
        return Result("retrieval", metrics, {"recall": curves}, protocol)

    def _rows(self, embeddings: EmbeddingSet) -> Iterator[tuple[str, Tensor, Tensor, Score]]:
        """Name, item indices of the queries and of the gallery, score."""
        z, names = embeddings.z, embeddings.names
        there = {name: embeddings.valid[name].nonzero().flatten() for name in names}
        for a in names:
            for b in names:
                if a != b:
                    yield f"{a}->{b}/cosine", there[a], there[b], cosine_score(z[a][there[a]], z[b][there[b]])
        if not self.volume or len(names) < 2:
            return
        anchor = self.anchor or names[0]
        if anchor not in names:
            raise InputError(f"anchor={anchor!r} is no modality of the model; {nearest(anchor, names)}")
        others = [name for name in names if name != anchor]
        whole = torch.stack([embeddings.valid[name] for name in others]).all(dim=0).nonzero().flatten()
        single, several = z[anchor][there[anchor]], [z[name][whole] for name in others]
        yield f"{anchor}->{'+'.join(others)}/volume", there[anchor], whole, volume_score(single, several)
        yield f"{'+'.join(others)}->{anchor}/volume", whole, there[anchor], tuple_volume_score(several, single)


def _counts(label: Tensor, query: Tensor, gallery: Tensor, ks: tuple[int, ...]) -> dict:
    """How many queries, entries and missing ones a row has, and its chance level; a missing query never hits."""
    n = len(label)
    share = len(query) / n if n else 0.0
    return {
        "n_query": n,
        "n_gallery": len(gallery),
        "n_missing": n - int(torch.isin(label[query], label[gallery]).sum()),
        "chance": {f"R@{k}": share * chance(label[query], label[gallery], k) for k in ks},
    }


def _curve(rank: Tensor, size: int) -> dict[str, list[float]]:
    """R@k in percent for k up to 100."""
    ks = [k for k in (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100) if k <= max(size, 1)]
    return {"k": ks, "recall": [recall(rank, k) for k in ks]}
