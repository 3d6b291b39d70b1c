"""The global Hölder divergence between the densities of all modalities, estimated from the batch, as a loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..datasets.registry import InputError, nearest
from . import register
from .embeddings import Embeddings, Loss, Objective, split_anchor
from .options import positive
from .tiled import TILED_MEMORY, marginals
from .unialign import euclidean_score


@register("holder")
class Holder(Objective):
    """Divergence of M densities p_m, 0 where all are the same.

    D = (1/M) sum_m log mean_i (s_i^m)^(M-1) - log mean_i prod_{m != a} c_i^m                  (eq. 24)
    s_i^m = mean_k K(z_i^m, z_k^m; tau_m),   c_i^m = mean_k K(z_i^a, z_k^m; tau_m)             (eq. 22, 23)
    K(x, y; tau) = exp(-|x - y|² / (2 tau²)), divided by tau^D where bandwidths differ

    "Towards Uniformity and Alignment for Multi-Modal Representation Learning", eq. 15-24. The first term spreads every
    modality out, the second draws the densities over each other; which sample belongs to which, it does not see. Where
    modalities are missing, each mean takes the samples that there are; a modality with none of them leaves M.

    Args:
        anchor: modality a, whose samples estimate the overlap; the first of the model by default.
        average_anchors: estimate the overlap at every modality in turn and take the mean: less variance, M / 2 times
            the work (variant ii of appendix C).
        leave_one_out: leave k = i out of s_i^m: less bias in small batches (variant i).
        tau: bandwidth of the kernel.
        taus: bandwidth by modality, where it is to differ from `tau` (variant iii).
        tile: side of the score tiles in memory, by default 512 on a CPU and 4096 on a GPU; the loss does not depend on
            it.
    """

    memory = TILED_MEMORY

    def __init__(
        self,
        *,
        anchor: str | None = None,
        average_anchors: bool = False,
        leave_one_out: bool = False,
        tau: float = 0.07,
        taus: dict[str, float] | None = None,
        tile: int | None = None,
    ) -> None:
        super().__init__()
        positive("the paper uses 0.07", tau=tau, **{f"taus.{name}": value for name, value in (taus or {}).items()})
        if average_anchors and anchor is not None:
            raise InputError(f"average_anchors takes every modality as the anchor; leave anchor={anchor!r} out")
        self.anchor = anchor
        self.average_anchors = average_anchors
        self.leave_one_out = leave_one_out
        self.tau, self.taus = tau, taus or {}
        self.tile = tile

    def check(self, names: tuple[str, ...]) -> None:
        split_anchor(names, self.anchor)
        for name in self.taus:
            if name not in names:
                raise InputError(f"taus: {name!r} is no modality of this model; {nearest(name, names)}")

    def forward(self, z: Embeddings) -> Loss:
        # a kernel mean needs a sample beside the one it is taken at, where that one is left out
        names = [name for name in z.names if z.count(z.valid[name]) > self.leave_one_out]
        anchor = self.anchor or z.names[0]
        anchors = names if self.average_anchors else [anchor] * (anchor in names)
        if len(names) < 2 or not anchors:
            nothing = sum(x.sum() for x in z.z.values()) * 0.0
            return Loss(nothing, {"uniformity": nothing}, {})
        within = sum(self._within(z, name, len(names) - 1) for name in names) / len(names)
        overlaps = torch.stack([self._overlap(z, name, names) for name in anchors])
        overlap = overlaps.logsumexp(0) - math.log(len(anchors))
        terms = {"uniformity": within, "overlap": -overlap}
        return Loss(within - overlap, terms, {name: value.detach() for name, value in terms.items()})

    def _within(self, z: Embeddings, name: str, power: int) -> Tensor:
        """log of the estimated integral of p_m^M, from p_m^(M-1) at the samples of p_m."""
        own = z.start if self.leave_one_out else None
        return z.log_mean_exp(power * self._log_density(z, name, name, own), z.valid[name])

    def _overlap(self, z: Embeddings, anchor: str, names: list[str]) -> Tensor:
        """log of the estimated integral of the product of all densities, at the samples of the anchor."""
        densities = sum(self._log_density(z, anchor, name, None) for name in names if name != anchor)
        return z.log_mean_exp(densities, z.valid[anchor])

    def _log_density(self, z: Embeddings, at: str, of: str, own: int | None) -> Tensor:
        """log of the kernel density estimate of modality `of` at this rank's vectors of modality `at`, (n,)."""
        found = marginals(
            euclidean_score,
            (z.z[at],),
            (z.columns(of),),
            (z.z[at].new_full((1,), self.taus.get(of, self.tau)),),
            row_mask=z.valid[at],
            column_mask=z.columns_valid(of),
            own=own,
            rows_only=True,
            symmetric_at=z.start if at == of else None,
            tile=self.tile,
        )
        neighbours = z.count(z.valid[of]) - int(own is not None)
        # (2 pi tau²)^(-D / 2) makes the kernel a density; what does not depend on the modality cancels in D
        normaliser = z.z[at].shape[1] * math.log(self.taus.get(of, self.tau) / self.tau)
        return found.row_lse - neighbours.to(found.row_lse.dtype).log() - normaliser
