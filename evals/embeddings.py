"""A split as unit vectors, item i in row i: made by all ranks together, exactly once per item."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..datasets.batch import Batch, Skip
from ..datasets.registry import InputError

Encode = Callable[[Batch], Mapping[str, Tensor]]


class EmbeddingError(RuntimeError):
    """The split could not be embedded. Every rank raises it with the same message, so that none waits for another."""


@dataclass(frozen=True)
class EmbeddingSet:
    """The N items of a split, on the CPU, the same on every rank.

    Attributes:
        z: by modality, float32 (N, D), unit length; a row with `valid` False is zero.
        valid: by modality, bool (N,): the item has this modality and it could be read.
        keys: N sample keys.
        captions: N tuples of captions.
        bucket: int64 (N,), id of the group of items that one caption fits equally, -1 where the item has none; None
            when no item has one.
        skipped: the samples that could not be read, and why; their rows are invalid in every modality.
    """

    z: dict[str, Tensor]
    valid: dict[str, Tensor]
    keys: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    bucket: Tensor | None = None
    skipped: tuple[Skip, ...] = field(default=())

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities, in the model's order."""
        return tuple(self.z)

    def __len__(self) -> int:
        return len(self.keys)

    def digest(self) -> str:
        """sha256 of the keys, captions and buckets: numbers with the same digest were measured on the same split."""
        buckets = None if self.bucket is None else self.bucket.tolist()
        text = json.dumps([self.keys, self.captions, buckets], ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def embed(encode: Encode, batches: Iterable[Batch], total: int) -> EmbeddingSet:
    """Embed a split on all ranks and give every rank the whole set.

    Each rank brings its own `batches`; together they hold every position 0..total-1 exactly once, plus padding rows
    (position -1), which are dropped. The ranks agree before each forward pass that all of them go on, so that an
    unreadable shard or a short loader on one rank stops all of them instead of leaving the others in a collective.

    Args:
        encode: a batch -> by modality, vectors (n, D) on any device. It runs without gradient; putting the model into
            evaluation mode (and back) is the caller's business.
        batches: the same number of batches on every rank.
        total: N, items in the split.

    Raises EmbeddingError on every rank when any rank fails, a position is missing, repeated or out of range, or a
    vector is not finite.
    """
    rows: list[_Rows] = []
    iterator = failure = None
    while True:
        batch = None
        if failure is None:
            try:
                iterator = iter(batches) if iterator is None else iterator
                batch = next(iterator, None)
                if batch is not None and batch.error:
                    raise InputError(batch.error)
            except Exception as error:  # raised below on all ranks: whatever it was, the others must hear of it
                failure = error
        if not _all_go_on(failure, batch is not None, len(rows)):
            return _scatter(_exchange(_join(rows)), total)
        try:
            rows.append(_encode(encode, batch))
        except Exception as error:
            failure = error


@dataclass
class _Rows:
    """Some rows of the set, in any order, on the CPU."""

    position: Tensor
    z: dict[str, Tensor]
    valid: dict[str, Tensor]
    bucket: Tensor
    keys: list[str]
    captions: list[tuple[str, ...]]
    skipped: list[Skip]


def _encode(encode: Encode, batch: Batch) -> _Rows:
    with torch.no_grad():
        vectors = encode(batch)
    keep = (batch.position >= 0).cpu()
    kept = keep.nonzero().flatten().tolist()
    valid = {name: batch.present[name].cpu()[keep] for name in vectors}
    z = {}
    for name, x in vectors.items():
        x = x.detach().to("cpu", torch.float32)[keep]
        broken = valid[name] & ~torch.isfinite(x).all(dim=1)
        if broken.any():
            where = [batch.keys[kept[i]] for i in broken.nonzero().flatten().tolist()]
            raise ValueError(f"{name} vectors of {len(where)} items are not finite, first {where[0]!r}")
        z[name] = torch.where(valid[name][:, None], x, 0.0)
    bucket = torch.full((len(batch),), -1) if batch.bucket is None else batch.bucket.cpu()
    captions = [tuple(batch.captions[i]) for i in kept]
    position = batch.position.cpu()[keep]
    return _Rows(position, z, valid, bucket[keep], [batch.keys[i] for i in kept], captions, list(batch.skipped))


def _join(rows: list[_Rows]) -> _Rows:
    names = list(rows[0].z)
    return _Rows(
        position=torch.cat([part.position for part in rows]),
        z={name: torch.cat([part.z[name] for part in rows]) for name in names},
        valid={name: torch.cat([part.valid[name] for part in rows]) for name in names},
        bucket=torch.cat([part.bucket for part in rows]),
        keys=[key for part in rows for key in part.keys],
        captions=[captions for part in rows for captions in part.captions],
        skipped=[skip for part in rows for skip in part.skipped],
    )


def _scatter(rows: _Rows, total: int) -> EmbeddingSet:
    """Row of position i -> row i; every position exactly once. The ranks hold the same rows, so all raise or none."""
    counts = torch.bincount(rows.position.clamp_max(total), minlength=total + 1)
    if counts[total]:
        raise EmbeddingError(f"{int(counts[total])} rows have a position beyond the split of {total} items")
    for what, wrong in (("missing", counts[:total] == 0), ("repeated", counts[:total] > 1)):
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise EmbeddingError(f"{int(wrong.sum())} of {total} positions are {what}, first {first}")
    order = rows.position.argsort()
    listed = order.tolist()
    bucket = rows.bucket[order]
    return EmbeddingSet(
        z={name: x[order] for name, x in rows.z.items()},
        valid={name: x[order] for name, x in rows.valid.items()},
        keys=tuple(rows.keys[i] for i in listed),
        captions=tuple(rows.captions[i] for i in listed),
        bucket=bucket if (bucket >= 0).any() else None,
        skipped=tuple(sorted(rows.skipped, key=lambda skip: skip.position)),
    )


# --- ranks -----------------------------------------------------------------------------------------------------------


def distributed() -> bool:
    """Whether more than one rank takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _all_go_on(failure: Exception | None, more: bool, done: int) -> bool:
    """Whether all ranks have one `more` batch (True) or none has (False); EmbeddingError on all ranks otherwise."""
    failed, have, ranks = int(failure is not None), int(more), 1
    if distributed():
        counts = torch.tensor([failed, have], device=_device())
        dist.all_reduce(counts)  # all ranks
        (failed, have), ranks = counts.tolist(), dist.get_world_size()  # waits for the device
    if failed:
        message = None if failure is None else f"{type(failure).__name__}: {failure}"
        messages = gather_objects(message)
        first = next(i for i, text in enumerate(messages) if text is not None)
        where = f" (rank {first})" if ranks > 1 else ""
        raise EmbeddingError(f"{messages[first]}{where}") from failure
    if 0 < have < ranks:
        raise EmbeddingError(f"{ranks - have} of {ranks} ranks ended after {done} batches, the others go on")
    if not have and not done:
        raise EmbeddingError("the split has no batches; check its shard pattern")
    return have > 0


def gather_objects(value: Any) -> list[Any]:
    """One plain value of each rank, in rank order, on every rank."""
    if not distributed():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)  # all ranks
    return values


def _exchange(rows: _Rows) -> _Rows:
    """The rows of all ranks, on every rank."""
    if not distributed():
        return rows
    others = gather_objects((len(rows.keys), rows.keys, rows.captions, rows.skipped, list(rows.z)))
    if any(other[4] != others[0][4] for other in others):
        raise EmbeddingError(f"the ranks embed different modalities: {[other[4] for other in others]}")
    counts = [other[0] for other in others]
    return _Rows(
        position=_gather(rows.position, counts),
        z={name: _gather(x, counts) for name, x in rows.z.items()},
        valid={name: _gather(x.to(torch.uint8), counts).bool() for name, x in rows.valid.items()},
        bucket=_gather(rows.bucket, counts),
        keys=[key for other in others for key in other[1]],
        captions=[captions for other in others for captions in other[2]],
        skipped=[skip for other in others for skip in other[3]],
    )


def _gather(x: Tensor, counts: list[int]) -> Tensor:
    """Concatenate x (counts[rank], ...) of all ranks, in rank order; the ranks may hold different numbers of rows."""
    padded = x.new_zeros((max(counts), *x.shape[1:]), device=_device())
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)  # all ranks
    return torch.cat([part[:count].cpu() for part, count in zip(parts, counts, strict=True)])
