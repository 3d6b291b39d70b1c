"""SigLIP: every pair of samples is a binary question of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import register
from .embeddings import Embeddings, Loss, Objective
from .infonce import pair_weights
from .options import finite
from .temperature import Temperature
from .tiled import TILED_MEMORY, Inputs, marginals


@register("siglip")
class SigLIP(Objective):
    """Weighted mean of the pairwise sigmoid losses of all pairs of modalities.

    L = -(1 / sum_mn w_mn) sum_mn w_mn mean_i sum_j log sigmoid(y_ij (z_i^m . z_j^n / tau + b)),

    y_ii = 1, otherwise -1, over unordered pairs (m, n). Zhai et al., "Sigmoid Loss for Language Image Pre-Training"
    (2023), algorithm 1. Nothing normalises over the batch. Where modalities are missing, i and j run over the samples
    that have both.

    Args:
        temperature: tau at the start; the paper's 0.1.
        bias: b at the start; the paper's -10 lets the many negatives start with a small loss.
        learnable_temperature: whether tau and b are trained.
        temperature_range: smallest and largest tau in use.
        weights: weight of each pair, such as "text-video"; pairs left out take no part. By default every pair counts 1.
        anchor: only pairs with this modality take part.
        tile: side of the score tiles in memory, by default 512 on a CPU and 4096 on a GPU; the loss does not depend on
            it.
    """

    memory = TILED_MEMORY

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        bias: float = -10.0,
        learnable_temperature: bool = True,
        temperature_range: tuple[float, float] = (0.005, 1.0),
        weights: dict[str, float] | None = None,
        anchor: str | None = None,
        tile: int | None = None,
    ) -> None:
        super().__init__()
        finite("the paper takes -10", bias=bias)
        self.temperature = Temperature(temperature, learnable=learnable_temperature, bounds=temperature_range)
        start = torch.tensor([float(bias)])
        self.bias = nn.Parameter(start) if learnable_temperature else None
        self.initial_bias = float(bias)
        self.weights = weights
        self.anchor = anchor
        self.tile = tile

    def check(self, names: tuple[str, ...]) -> None:
        pair_weights(names, self.weights, self.anchor)

    def forward(self, z: Embeddings) -> Loss:
        weights = pair_weights(z.names, self.weights, self.anchor)
        scale = self.temperature(z.z[z.names[0]])
        bias = scale.new_full((1,), self.initial_bias) if self.bias is None else self.bias.to(scale.dtype)
        terms, parts = {}, {}
        for (m, n), weight in weights.items():
            loss = self._pair(z, m, n, scale, bias)
            parts[f"{m}-{n}"] = loss.detach()
            terms[f"{m}-{n}"] = weight * loss / sum(weights.values())
        parts["temperature"] = 1 / scale.detach().squeeze()
        parts["bias"] = bias.detach().squeeze()
        return Loss(total=sum(terms.values()), terms=terms, parts=parts)

    def _pair(self, z: Embeddings, m: str, n: str, scale: Tensor, bias: Tensor) -> Tensor:
        """All pairs count as negatives, -log sigmoid(-s) = softplus(s); a positive is worth softplus(-s) = that - s."""
        both = z.valid[m] & z.valid[n]
        as_negatives = marginals(
            negative_score,
            (z.z[m],),
            (z.columns(n),),
            (scale, bias),
            row_mask=both,
            column_mask=z.columns_valid(m) & z.columns_valid(n),
            rows_only=True,
            lse=False,
            sums=True,
            tile=self.tile,
        ).row_sum
        return z.mean(as_negatives - (scale * (z.z[m] * z.z[n]).sum(-1) + bias), both)


def negative_score(rows: Inputs, columns: Inputs, shared: Inputs) -> Tensor:
    """softplus(scale * x_i . y_j + bias), (t, u): the loss of a pair that does not belong together."""
    (x,), (y,), (scale, bias) = rows, columns, shared
    return F.softplus(torch.addmm(bias, scale * x, y.T))
