"""What an objective sees of the world, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import gather


@dataclass(frozen=True)
class Loss:
    """An objective's answer.

    Attributes:
        total: scalar, this rank's share: the mean of `total` over ranks is the global loss.
        terms: the summands of `total` by name, attached to the graph, already weighted.
        parts: detached scalars for the log, shares as `total` is.
    """

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)


class Embeddings:
    """The unit vectors of this rank's samples, and the ways to reach those of the other ranks.

    n rows on this rank (equal on all ranks: short ones are padded and masked), N = n * ranks in the global batch,
    D the dimension of the shared space.

    Attributes:
        names: the modalities, in the recipe's order; the same on every rank.
        z: by modality, float32 or float64 (n, D), unit length; rows with `valid` False hold anything finite.
        valid: by modality, bool (n,): the sample has this modality.
        rows: int64 (n,), index of each row in the global batch.
        keys: n sample keys, or empty.
        bucket: int64 (n,) or None.
    """

    def __init__(
        self,
        z: Mapping[str, Tensor],
        valid: Mapping[str, Tensor] | None = None,
        *,
        keys: tuple[str, ...] = (),
        bucket: Tensor | None = None,
    ) -> None:
        self.z = dict(z)
        self.names = tuple(self.z)
        first = next(iter(self.z.values()))
        n, device = first.shape[0], first.device
        everything = torch.ones(n, dtype=torch.bool, device=device)
        self.valid = {name: everything if valid is None else valid[name].to(device) for name in self.names}
        self.rows = gather.rank() * n + torch.arange(n, device=device)
        self.keys = keys
        self.bucket = bucket
        self._columns: dict[str, Tensor] = {}
        self._columns_valid: dict[str, Tensor] = {}

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

    def all_sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over ranks, differentiable."""
        return gather.all_sum(x)

    def all_max(self, x: Tensor) -> Tensor:
        """Elementwise maximum over ranks, not differentiable."""
        return gather.all_max(x)

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """This rank's share of the global mean of `values` (n,) over the rows where `mask` (n,) holds.

        The mean of the shares over ranks is the mean over all masked rows of the global batch, whatever their number
        on each rank; 0 (with a gradient of 0) where no row is left. Masked-out values never enter, not even as NaN.
        """
        local_sum = torch.where(mask, values, torch.zeros_like(values)).sum()
        count = gather.all_sum(mask.sum().to(values.dtype))
        return gather.world_size() * local_sum / count.clamp_min(1)


class Objective(nn.Module):
    """Base of all objectives; see the package docstring for the contract."""

    needs: frozenset[str] = frozenset()

    def forward(self, z: Embeddings) -> Loss:
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Called after each optimizer step with the share of the run done, 0 to 1: EMA targets and queues."""
