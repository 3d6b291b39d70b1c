"""UniAlign: uniformity within each modality, alignment to one anchor, and their volume-based counterparts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..datasets.registry import InputError, nearest
from . import register
from .embeddings import Embeddings, Loss, Objective, split_anchor
from .gram import gram_volume
from .options import not_negative, positive
from .tiled import TILED_MEMORY, Inputs, marginals


@register("unialign")
class UniAlign(Objective):
    """Decoupled uniformity and alignment; no modality is pushed away from another.

    L = lambda_uni sum_m U(Z^m) + lambda_align L_align + lambda_vol (U(C) + L_vol)             (eq. 13)
    U(Z) = mean_i log( 1/(B - 1) sum_{j != i} exp(-d(z_i, z_j)² / (2 tau²)) )                  (eq. 9)
    L_align = mean over samples i and modalities n != a of d(z_i^a, z_i^n)²                    (eq. 10)
    U(C): the uniformity of the normalised centroids c_i of each sample's vectors              (eq. 11, 12)
    L_vol = mean_i sqrt(det G_i), the volume spanned by the vectors of sample i                (eq. 12)

    "Towards Uniformity and Alignment for Multi-Modal Representation Learning". B is the global batch. Missing
    modalities: each mean takes the samples (eq. 9), the pairs with the anchor (eq. 10) and the complete samples
    (volume) that there are; a centroid is that of the modalities that its sample has.

    Args:
        anchor: modality a; the first of the model by default.
        lambda_uni, lambda_align, lambda_vol: weights of eq. 13. The paper takes 1, 1, 1 for retrieval and
            lambda_vol = 0.1 for generation. 0 switches a term off.
        tau: bandwidth of the uniformity kernel.
        tau_centroid: that of the centroids (0.01, 0.03 and 0.07 in the paper's table 5).
        centroid: whether U(C) takes part (table 2).
        volume: whether L_vol takes part (table 2).
        centroid_weights: w_m of eq. 11 by modality, relative to each other; all equal by default.
        geometry: "euclidean", or "geodesic" for d = arccos(z_i . z_j) in uniformity and alignment (eq. 14, table 4).
        alignment_geometry: of the alignment alone, where it is to differ.
        detach_anchor: let L_align move the others only. Eq. 10 as printed moves the anchor too, and that is the
            default; the paper's text has the anchor "optimized only with the uniformity objective", which is this.
        tile: side of the score tiles in memory, by default 512 on a CPU and 4096 on a GPU; the loss does not depend on
            it.
    """

    memory = TILED_MEMORY

    def __init__(
        self,
        *,
        anchor: str | None = None,
        lambda_uni: float = 1.0,
        lambda_align: float = 1.0,
        lambda_vol: float = 1.0,
        tau: float = 0.07,
        tau_centroid: float = 0.07,
        centroid: bool = True,
        volume: bool = True,
        centroid_weights: dict[str, float] | None = None,
        geometry: Literal["euclidean", "geodesic"] = "euclidean",
        alignment_geometry: Literal["euclidean", "geodesic"] | None = None,
        detach_anchor: bool = False,
        tile: int | None = None,
    ) -> None:
        super().__init__()
        positive("the paper uses 0.07", tau=tau, tau_centroid=tau_centroid)
        lambdas = {"lambda_uni": lambda_uni, "lambda_align": lambda_align, "lambda_vol": lambda_vol}
        not_negative("use 0 to switch the term off", **lambdas)
        if not (lambda_uni or lambda_align or (lambda_vol and (centroid or volume))):
            raise InputError("lambda_uni, lambda_align and lambda_vol switch every term off; leave one positive")
        if centroid_weights is not None:
            remedy = "w_m of eq. 11 are 0 or more, and one is more"
            not_negative(remedy, **{f"centroid_weights.{name}": w for name, w in centroid_weights.items()})
            positive(remedy, **{"the sum of centroid_weights": sum(centroid_weights.values())})
        self.anchor = anchor
        self.lambda_uni, self.lambda_align, self.lambda_vol = lambda_uni, lambda_align, lambda_vol
        self.tau, self.tau_centroid = tau, tau_centroid
        self.centroid, self.volume = centroid, volume
        self.centroid_weights = centroid_weights
        self.geometry, self.alignment_geometry = geometry, alignment_geometry or geometry
        self.detach_anchor = detach_anchor
        self.tile = tile

    def check(self, names: tuple[str, ...]) -> None:
        split_anchor(names, self.anchor)
        for name in self.centroid_weights or {}:
            if name not in names:
                raise InputError(f"centroid_weights: {name!r} is no modality of this model; {nearest(name, names)}")

    def forward(self, z: Embeddings) -> Loss:
        anchor, others = split_anchor(z.names, self.anchor)
        terms, parts = {}, {}
        if self.lambda_uni:
            each = {
                name: self._uniformity(z, z.z[name], z.columns(name), z.valid[name], z.columns_valid(name), self.tau)
                for name in z.names
            }
            terms["uniformity"] = self.lambda_uni * sum(each.values())
            parts |= {f"uniformity/{name}": value for name, value in each.items()}
        if self.lambda_align:
            parts["alignment"] = self._alignment(z, anchor, others)
            terms["alignment"] = self.lambda_align * parts["alignment"]
        if self.lambda_vol and self.centroid:
            parts["centroid_uniformity"] = self._centroid_uniformity(z)
            terms["centroid_uniformity"] = self.lambda_vol * parts["centroid_uniformity"]
        if self.lambda_vol and self.volume:
            parts["volume"] = self._volume(z)
            terms["volume"] = self.lambda_vol * parts["volume"]
        return Loss(sum(terms.values()), terms, {name: value.detach() for name, value in parts.items()})

    def _uniformity(
        self, z: Embeddings, rows: Tensor, columns: Tensor, row_mask: Tensor, column_mask: Tensor, tau: float
    ) -> Tensor:
        """Eq. 9 in log space: the exponents reach -2 / tau², about -400, where exp is 0 in float32."""
        found = marginals(
            geodesic_score if self.geometry == "geodesic" else euclidean_score,
            (rows,),
            (columns,),
            (rows.new_full((1,), tau),),
            row_mask=row_mask,
            column_mask=column_mask,
            own=z.start,
            rows_only=True,
            symmetric_at=z.start,
            tile=self.tile,
        )
        neighbours = column_mask.sum() - 1
        return z.mean(found.row_lse - neighbours.clamp_min(1).to(rows.dtype).log(), row_mask & (neighbours > 0))

    def _alignment(self, z: Embeddings, anchor: str, others: list[str]) -> Tensor:
        """Eq. 10, one mean over all pairs (i, n) that exist."""
        target = z.z[anchor].detach() if self.detach_anchor else z.z[anchor]
        chord_square = torch.stack([(target - z.z[name]).square().sum(-1) for name in others])
        there = torch.stack([z.valid[anchor] & z.valid[name] for name in others])
        return z.mean(angle_square(chord_square / 4) if self.alignment_geometry == "geodesic" else chord_square, there)

    def _centroid_uniformity(self, z: Embeddings) -> Tensor:
        """The first term of eq. 12. Absent modalities are zeros, so they leave the sum."""
        weights = self.centroid_weights or dict.fromkeys(z.names, 1.0)
        total = sum(weights.values())
        c = sum(weight / total * z.z[name] for name, weight in weights.items())
        centroids = F.normalize(c, dim=-1, eps=1e-6)  # opposite vectors have no centroid: keep its gradient finite
        present = torch.stack([z.valid[name] for name, weight in weights.items() if weight > 0]).any(0)
        return self._uniformity(z, centroids, z.gather(centroids), present, z.gather(present), self.tau_centroid)

    def _volume(self, z: Embeddings) -> Tensor:
        """The second term of eq. 12."""
        complete = torch.stack([z.valid[name] for name in z.names]).all(0)
        return z.mean(gram_volume([z.z[name] for name in z.names]), complete)


def euclidean_score(rows: Inputs, columns: Inputs, shared: Inputs) -> Tensor:
    """-|x_i - y_j|² / (2 tau²) for unit vectors x (t, D), y (u, D), where |x - y|² = 2 - 2 x . y."""
    (x,), (y,), (tau,) = rows, columns, shared
    scale = tau.square().reciprocal()
    return torch.addmm(-scale, scale * x, y.T)


def geodesic_score(rows: Inputs, columns: Inputs, shared: Inputs) -> Tensor:
    """-arccos(x_i . y_j)² / (2 tau²) for unit vectors x (t, D), y (u, D)."""
    (x,), (y,), (tau,) = rows, columns, shared
    return -angle_square((1 - x @ y.T) / 2) / (2 * tau.square())


def angle_square(quarter: Tensor) -> Tensor:
    """Squared angle between unit vectors from `quarter` = |x - y|² / 4 = (1 - x . y) / 2, in [0, 1].

    (2 asin(sqrt(quarter)))²: accurate for near vectors, where arccos is not. The slope is infinite for opposite
    vectors only; there, and where the vectors are equal, the gradient is taken as zero.
    """
    return (2 * quarter.clamp(1e-12, 1 - 1e-6).sqrt().asin()).square()
