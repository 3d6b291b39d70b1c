"""What an objective sees of the world, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..datasets.registry import InputError, nearest
from . import gather


class Loss(NamedTuple):
    """An objective's answer. A tuple, because ZeRO-3 hangs its backward hooks on the tensors of tuples and dicts only.

    Attributes:
        total: scalar, this rank's share: the mean of `total` over ranks is the global loss.
        terms: the summands of `total` by name, attached to the graph, already weighted.
        parts: detached scalars for the log, shares as `total` is.
    """

    total: Tensor
    terms: dict[str, Tensor]
    parts: dict[str, Tensor]


class Embeddings:
    """The unit vectors of this rank's samples, and the ways to reach those of the other ranks.

    n rows on this rank (equal on all ranks: short ones are padded and masked), N = n * ranks in the global batch,
    D the dimension of the shared space.

    Attributes:
        names: the modalities, in the recipe's order; the same on every rank.
        z: by modality, float32 or float64 (n, D), unit length; rows with `valid` False are zeros, whatever came in.
        valid: by modality, bool (n,): the sample has this modality.
        start: index of the first row in the global batch.
        rows: int64 (n,), index of each row in the global batch.
        keys: n sample keys, or empty.
        bucket: int64 (n,) or None.
        features: by modality, what the tower says of a sample before the head, (n, width), as `z` masked and in
            float32 or float64; None unless an objective needs "features".
    """

    def __init__(
        self,
        z: Mapping[str, Tensor],
        valid: Mapping[str, Tensor] | None = None,
        *,
        keys: tuple[str, ...] = (),
        bucket: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.names = tuple(z)
        first = z[self.names[0]]
        n, device = first.shape[0], first.device
        if n * gather.world_size() < 2:
            raise InputError("a batch of one sample has nothing to compare it with; use train.batch_size of 2 or more")
        everything = torch.ones(n, dtype=torch.bool, device=device)
        self._complete = valid is None or bool(torch.stack([*valid.values()]).all())  # waits for the GPU
        self.valid = {name: everything if valid is None else valid[name].to(device) for name in self.names}
        self.z = self._masked(z)
        self.features = None if features is None else self._masked(features)
        self.start = gather.rank() * n
        self.rows = self.start + torch.arange(n, device=device)
        self.keys = keys
        self.bucket = bucket
        self._columns: dict[str, Tensor] = {}
        self._columns_valid: dict[str, Tensor] = {}

    def _masked(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._complete:  # no copy then: the vectors may be the largest thing in memory
            return {name: _scorable(x) for name, x in vectors.items()}
        return {name: _scorable(x).masked_fill(~self.valid[name][:, None], 0) for name, x in vectors.items()}

    def columns(self, name: str) -> Tensor:
        """All vectors of one modality, (N, D), gathered once; differentiable for every rank's rows."""
        if name not in self._columns:
            self._columns[name] = gather.gather_rows(self.z[name])
        return self._columns[name]

    def columns_valid(self, name: str) -> Tensor:
        """Which of `columns(name)` are there, bool (N,)."""
        if name not in self._columns_valid:
            self._columns_valid[name] = gather.gather_rows(self.valid[name])
        return self._columns_valid[name]

    def gather(self, x: Tensor) -> Tensor:
        """Rows x (n, ...) of all ranks, (N, ...); differentiable for every rank's rows."""
        return gather.gather_rows(x)

    def share(self, x: Tensor) -> Tensor:
        """This rank's part of rows (m, ...) that every rank holds: together the ranks have each row once."""
        return x[gather.rank() :: gather.world_size()]

    def all_sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over ranks, differentiable."""
        return gather.all_sum(x)

    def all_max(self, x: Tensor) -> Tensor:
        """Elementwise maximum over ranks, not differentiable."""
        return gather.all_max(x)

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """This rank's share of the global mean of `values` over the entries where `mask`, of the same shape, holds.

        The mean of the shares over ranks is the mean over all such entries of the global batch, whatever their
        number on each rank; 0 (with a gradient of 0) where there is none. Others never enter, not even as NaN.
        """
        local_sum = torch.where(mask, values, torch.zeros_like(values)).sum()
        return self.ratio(local_sum, mask.sum())

    def ratio(self, local_sum: Tensor, local_count: Tensor) -> Tensor:
        """This rank's share of a sum over all ranks divided by a count over all ranks; 0 where the count is 0.

        The shares' mean over ranks is the ratio. The sum may have any shape, the count is a number.
        """
        count = gather.all_sum(local_count.to(local_sum.dtype))
        return gather.world_size() * local_sum / count.clamp_min(1)

    def count(self, mask: Tensor) -> Tensor:
        """How many entries of the mask hold in the global batch, int64."""
        return gather.all_sum(mask.sum())

    def log_mean_exp(self, values: Tensor, mask: Tensor) -> Tensor:
        """log mean exp of `values` over the entries of the global batch where `mask` holds: whole, not a share.

        Differentiable. There must be such an entry; others never enter.
        """
        kept = values.masked_fill(~mask, -torch.inf)
        peak = gather.all_max(kept.detach().amax())
        # exp(-inf) has a gradient of 0, but -inf - peak would give NaN through masked values: they are constants here
        total = gather.all_sum((kept - peak).exp().sum())
        return total.log() + peak - self.count(mask).to(values.dtype).log()


def _scorable(x: Tensor) -> Tensor:
    """Half precision is too coarse for scores divided by a temperature."""
    return x if x.dtype == torch.float64 else x.float()


class Objective(nn.Module):
    """Base of all objectives; see the package docstring for the contract.

    Attributes:
        needs: what it wants beyond unit vectors: "bucket" (every sample has a bucket id), "features" (of the towers,
            before the heads).
        memory: how its memory on one rank grows beyond that of the gathered vectors: n rows, N in all, D dimensions.
    """

    needs: frozenset[str] = frozenset()
    memory: str

    def check(self, names: tuple[str, ...]) -> None:
        """Raise InputError where the options do not fit a model with these modalities. Called before the first step."""

    def setup(self, names: tuple[str, ...], dim: int, widths: Mapping[str, int]) -> None:
        """Make the parameters that depend on the model: its modalities, the dimension D of its space and, by modality,
        the width of its tower's features. Called once, before the objective trains."""

    def forward(self, z: Embeddings) -> Loss:
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Called after each optimizer step with the share of the run done, 0 to 1: EMA targets and queues."""


def split_anchor(names: tuple[str, ...], anchor: str | None) -> tuple[str, list[str]]:
    """The anchor, by default the first modality, and the others. InputError when it or the others do not exist."""
    if len(names) < 2:
        raise InputError(f"this objective compares modalities, but the model has only {names[0]!r}; add another")
    if anchor is not None and anchor not in names:
        raise InputError(f"anchor={anchor!r} is no modality of this model; {nearest(anchor, names)}")
    anchor = anchor or names[0]
    return anchor, [name for name in names if name != anchor]
