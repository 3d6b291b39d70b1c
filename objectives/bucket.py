"""Bucket loss: one text, many right videos."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..datasets.registry import InputError
from . import register
from .embeddings import Embeddings, Loss, Objective, split_anchor
from .options import not_negative


@register("bucket")
class Bucket(Objective):
    """Draws the anchor towards every sample of its bucket and away from all others, linearly.

    L = mean_i [ lambda_neg sum_{j not in B_i} S_ij / |B_i| - lambda_pos sum_{j in B_i} w_ij S_ij / |B_i| ]
        + lambda_pos alpha / N,    S_ij = (z_i^a . z_j^n + 1) / 2,    w_ii = alpha, otherwise w_ij = 1

    for each modality n != a, and the mean over them. "Towards Bridging the Semantic Spaces of the One-to-Many Mapping
    in Cross-Modality Text-to-Video Generation", eq. 4. B_i are the samples of the global batch in i's bucket, i itself
    among them; N is the number of samples with the anchor. Because S is linear, sums over buckets replace the N x N
    matrix: time and memory are linear in N. Where modalities are missing, |B_i| counts the samples that are there, and
    an anchor whose bucket has none leaves the mean.

    Args:
        anchor: modality a, the text of the paper; the first of the model by default.
        lambda_neg, lambda_pos: weights of the two sums.
        alpha: weight of a sample's own partner beside the rest of its bucket.
        normalise: what divides the sum over negatives: "bucket", |B_i| as printed, or "negatives", their number.
    """

    needs = frozenset({"bucket"})
    memory = "O((n + buckets) D): sums over buckets in place of pairs"

    def __init__(
        self,
        *,
        anchor: str | None = None,
        lambda_neg: float = 1.0,
        lambda_pos: float = 1.0,
        alpha: float = 2.0,
        normalise: Literal["bucket", "negatives"] = "bucket",
    ) -> None:
        super().__init__()
        not_negative("the paper takes 1, 1 and 2", lambda_neg=lambda_neg, lambda_pos=lambda_pos, alpha=alpha)
        self.anchor = anchor
        self.lambda_neg, self.lambda_pos, self.alpha = lambda_neg, lambda_pos, alpha
        self.normalise = normalise

    def check(self, names: tuple[str, ...]) -> None:
        split_anchor(names, self.anchor)

    def forward(self, z: Embeddings) -> Loss:
        anchor, others = split_anchor(z.names, self.anchor)
        if z.bucket is None:
            raise InputError(
                "the bucket objective needs bucket ids and the batch has none; give every sample's json a `bucket`"
            )
        buckets, own = z.gather(z.bucket).unique(return_inverse=True)
        own = own[z.rows]
        terms, parts = {}, {}
        alone = z.z[anchor].new_full((len(own),), self.alpha) / z.count(z.valid[anchor]).clamp_min(1)
        constant = self.lambda_pos * z.mean(alone, z.valid[anchor])
        for name in others:
            negative, positive = self._sums(z, anchor, name, own, len(buckets))
            terms[f"{anchor}-{name}"] = (negative - positive + constant) / len(others)
            parts |= {f"{anchor}-{name}/negative": negative.detach(), f"{anchor}-{name}/positive": positive.detach()}
        return Loss(sum(terms.values()), terms, parts)

    def _sums(self, z: Embeddings, anchor: str, name: str, own: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
        """The weighted means over i of the sum over negatives and of the sum over positives; `own` (n,) are buckets."""
        x, y, there = z.z[anchor], z.z[name], z.valid[name]
        of_bucket = z.all_sum(y.new_zeros(buckets, y.shape[1]).index_add(0, own, y))
        sizes = z.all_sum(y.new_zeros(buckets).index_add(0, own, there.to(y.dtype)))
        inside, outside = sizes[own], sizes.sum() - sizes[own]
        similar = ((x * of_bucket[own]).sum(-1) + inside) / 2
        different = ((x * (of_bucket.sum(0) - of_bucket[own])).sum(-1) + outside) / 2
        partner = torch.where(there, ((x * y).sum(-1) + 1) / 2, torch.zeros_like(inside))
        divisor = inside if self.normalise == "bucket" else outside
        counted = z.valid[anchor] & (inside > 0)
        negative = z.mean(different / divisor.clamp_min(1), counted)
        positive = z.mean((similar + (self.alpha - 1) * partner) / inside.clamp_min(1), counted)
        return self.lambda_neg * negative, self.lambda_pos * positive
