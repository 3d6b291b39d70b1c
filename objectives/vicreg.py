"""VICReg between modalities: invariance, variance, covariance; no negatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from ..datasets.registry import InputError
from . import register
from .embeddings import Embeddings, Loss, Objective, split_anchor
from .heads import Head
from .options import not_negative
from .precision import matmul

VARIANCE_EPSILON = 1e-4


@register("vicreg")
class VICReg(Objective):
    """Draws a sample's modalities together while every modality keeps its variance in every dimension.

    L = mean over pairs (m, n) of  invariance * mean_{i, d} (e_id^m - e_id^n)²
        + variance * mean over m, n of mean_d relu(1 - sqrt(var_d(e^m) + 1e-4))
        + covariance * sum over m, n of sum_{d != d'} cov(e^m)_dd'² / D',    e^m = expander_m(z^m)

    Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization" (2022), with modalities for views and an
    expander for each, as the ablation of "Towards Bridging the Semantic Spaces of the One-to-Many Mapping in
    Cross-Modality Text-to-Video Generation", section 4.2.3, has it. Variances and covariances (divided by count - 1)
    are of the global batch. Where modalities are missing, the invariance takes the samples that have both, the others
    those that have the modality.

    Args:
        invariance, variance, covariance: weights of the terms.
        expander: output widths of the expander's layers; an empty list compares the unit vectors times sqrt(D).
    """

    memory = "O(n W + W²), W the widest layer of the expander"

    def __init__(
        self,
        *,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        expander: Sequence[int] = (512, 512, 512),
    ) -> None:
        super().__init__()
        weights = {"invariance": invariance, "variance": variance, "covariance": covariance}
        not_negative("use 0 to switch the term off", **weights)
        if not any(weights.values()):
            raise InputError("invariance, variance and covariance switch every term off; leave one positive")
        if any(width < 1 for width in expander):
            raise InputError(f"expander={list(expander)} has a width below 1; give output widths such as [512, 512]")
        self.invariance, self.variance, self.covariance = invariance, variance, covariance
        self.expander_widths = tuple(expander)
        self.expanders = nn.ModuleDict()

    def check(self, names: tuple[str, ...]) -> None:
        split_anchor(names, None)

    def setup(self, names: tuple[str, ...], dim: int, widths: Mapping[str, int]) -> None:
        for name in names:
            self.expanders[name] = Head((dim, *self.expander_widths))

    def forward(self, z: Embeddings) -> Loss:
        # unit vectors have entries near 1 / sqrt(D); the hinge of the variance is made for entries near 1
        scaled = {name: x * x.shape[1] ** 0.5 for name, x in z.z.items()}
        e = {name: self.expanders[name](z, scaled[name], z.valid[name]) for name in z.names}
        spread = {name: self._spread(z, e[name], z.valid[name]) for name in z.names}
        pairs = list(combinations(z.names, 2))
        distance = sum(z.mean((e[m] - e[n]).square().mean(-1), z.valid[m] & z.valid[n]) for m, n in pairs) / len(pairs)
        hinge = sum(spread[m][0] + spread[n][0] for m, n in pairs) / (2 * len(pairs))
        correlation = sum(spread[m][1] + spread[n][1] for m, n in pairs) / len(pairs)
        parts = {"invariance": distance, "variance": hinge, "covariance": correlation}
        terms = {name: getattr(self, name) * value for name, value in parts.items()}
        return Loss(sum(terms.values()), terms, {name: value.detach() for name, value in parts.items()})

    def _spread(self, z: Embeddings, e: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """How far the standard deviations lie below 1, and the squared covariances, of one modality; whole."""
        count = z.count(valid).to(e.dtype)
        rows = valid[:, None].to(e.dtype)
        centred = (e - z.all_sum((e * rows).sum(0)) / count.clamp_min(1)) * rows
        products = z.all_sum(matmul(centred.T, centred)) / (count - 1).clamp_min(1)
        deviations = (products.diagonal() + VARIANCE_EPSILON).sqrt()
        crossed = products.square().sum() - products.diagonal().square().sum()
        enough = (count > 1).to(e.dtype)  # one sample has no variance
        return enough * torch.relu(1 - deviations).mean(), enough * crossed / e.shape[1]
