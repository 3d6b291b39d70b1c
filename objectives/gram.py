"""GRAM: the volume spanned by one sample's unit vectors as the score of a contrastive loss.

The volume of vectors l, z^1 .. z^K is sqrt(det G), G their Gram matrix. Subtracting z^1 from the other vectors leaves
the determinant as it is and everything in it small where the vectors agree, so nothing cancels. With the basis
b^1 = z^1, b^k = z^k - z^1 and e = l - z^1,

    V² = |e|² D - h' A h,   h_k = e . b^k,   D = det B,   A = adj B,   B_km = b^k . b^m,

and D and A depend on the tuple z alone: N tuples need N small determinants, not N² of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..datasets.registry import InputError
from . import register
from .embeddings import Embeddings, Loss, Objective, split_anchor
from .matching import checked_smoothing, match_both_ways
from .precision import full_precision
from .temperature import Temperature
from .tiled import TILED_MEMORY, Inputs

# In shapes: n anchors (rows), N tuples (columns) of K members, M = K + 1 vectors, width D, tiles of t by u
EPSILON = 1e-24  # smallest V² under the root, whose slope at 0 is infinite
MOST_MODALITIES = 6  # cofactor expansion grows with K!


@register("gram")
class Gram(Objective):
    """Contrastive loss on the volume of anchor and tuple: small where the modalities of a sample agree.

    L = 1/2 mean_i CE(softmax_j(-V_ij / tau), i) + 1/2 mean_j CE(softmax_i(-V_ij / tau), j),

    V_ij the volume spanned by the anchor vector of sample i and all other modalities of sample j. Cicchetti et al.,
    "Gramian Multimodal Representation Learning and Alignment" (2024). 2 to 6 modalities. Where some are missing, the
    means take the complete samples, and the candidates are all samples that have the side in question whole.

    The volume does not change when a vector changes its sign, so cosines between modalities may come out negative.

    Args:
        anchor: the modality that is matched against the tuple of all others; the first of the model by default.
        temperature: tau at the start.
        learnable_temperature: whether tau is trained.
        temperature_range: smallest and largest tau in use.
        label_smoothing: share of the target spread evenly over all candidates, in [0, 1).
        compat: "gram" gives the gradients of the authors' released code, in which the gathered side is a constant:
            anchors learn from the first half of the loss only, the others from the second only.
        tile: side of the score tiles in memory, by default 512 on a CPU and 4096 on a GPU; the loss does not depend on
            it.
    """

    memory = TILED_MEMORY

    def __init__(
        self,
        *,
        anchor: str | None = None,
        temperature: float = 0.07,
        learnable_temperature: bool = True,
        temperature_range: tuple[float, float] = (0.01, 1.0),
        label_smoothing: float = 0.1,
        compat: Literal["gram"] | None = None,
        tile: int | None = None,
    ) -> None:
        super().__init__()
        self.anchor = anchor
        self.temperature = Temperature(temperature, learnable=learnable_temperature, bounds=temperature_range)
        self.label_smoothing = checked_smoothing(label_smoothing)
        self.compat = compat
        self.tile = tile

    def check(self, names: tuple[str, ...]) -> None:
        split_anchor(names, self.anchor)
        if len(names) > MOST_MODALITIES:
            raise InputError(f"gram takes up to {MOST_MODALITIES} modalities, the model has {len(names)}; drop some")

    def forward(self, z: Embeddings) -> Loss:
        anchor, others = split_anchor(z.names, self.anchor)
        scale = self.temperature(z.z[anchor])
        local, own = z.z[anchor], tuple_inputs([z.z[name] for name in others])
        tuples = tuple(z.gather(x) for x in own)
        if self.compat is None:
            there, back = self._match(z, anchor, others, scale, local, own, tuples)
        else:
            constant = [tuple(x.detach() for x in inputs) for inputs in (own, tuples)]
            there, _ = self._match(z, anchor, others, scale, local, *constant)
            _, back = self._match(z, anchor, others, scale, local.detach(), own, tuples)
        whole = torch.stack([z.valid[name] for name in z.names]).all(0)
        with torch.no_grad():
            volume = z.mean(_matched_volume(local, own), whole)
        parts = {f"{anchor}-tuple": there.detach(), f"tuple-{anchor}": back.detach(), "volume": volume}
        parts["temperature"] = 1 / scale.detach().squeeze()
        terms = {f"{anchor}-tuple": there / 2, f"tuple-{anchor}": back / 2}
        return Loss(sum(terms.values()), terms, parts)

    def _match(
        self, z: Embeddings, anchor: str, others: list[str], scale: Tensor, local: Tensor, own: Inputs, tuples: Inputs
    ) -> tuple[Tensor, Tensor]:
        """The losses anchor -> tuple and back, of anchors (n, D), their own tuples (n) and all (N)."""
        return match_both_ways(
            z,
            volume_score,
            anchor_inputs(local),
            tuples,
            (scale,),
            positive=-scale * _matched_volume(local, own),
            row_mask=z.valid[anchor],
            column_mask=torch.stack([z.columns_valid(name) for name in others]).all(0),
            both=torch.stack([z.valid[name] for name in z.names]).all(0),
            label_smoothing=self.label_smoothing,
            tile=self.tile,
        )


def gram_volume(vectors: Sequence[Tensor]) -> Tensor:
    """Volume (...) spanned by M vectors (..., D): 0 if dependent, 1 if orthonormal.

    In float32 (float64 stays); at least 1e-12, so that the gradient is finite where the vectors agree.
    """
    anchor, *members = (v if v.dtype == torch.float64 else v.float() for v in vectors)
    return _matched_volume(anchor, tuple_inputs(members)) if members else anchor.norm(dim=-1)


def _matched_volume(anchor: Tensor, own: Inputs) -> Tensor:
    """V (...) of anchors (..., D), each with its own tuple."""
    *basis, _, determinant, adjugate = own
    edge = anchor - basis[0]
    products = [(edge * b).sum(-1) for b in basis]
    square = edge.square().sum(-1) * determinant
    for k, h in enumerate(products):
        square = square - h * sum(adjugate[..., k, m] * products[m] for m in range(len(products)))
    return square.clamp_min(EPSILON).sqrt()


def volume_scores(anchor: Tensor, others: list[Tensor]) -> Tensor:
    """Volumes (n, N) of every anchor (n, D) with every tuple, one (N, D) per member: the smaller, the better the match.

    Not tiled: hand it as many anchors at a time as memory allows. Precision as `gram_volume`.
    """
    x, *members = (v if v.dtype == torch.float64 else v.float() for v in (anchor, *others))
    with full_precision(x.device.type):
        return _volumes(anchor_inputs(x), tuple_inputs(members))


def volume_score(rows: Inputs, columns: Inputs, shared: Inputs) -> Tensor:
    """-scale * V of anchors and tuples, (t, u): the score that `marginals` takes."""
    return -shared[0] * _volumes(rows, columns)


def anchor_inputs(anchor: Tensor) -> Inputs:
    """What the volume needs of anchors (n, D): themselves and their squared lengths (n,)."""
    return anchor, anchor.square().sum(-1)


def tuple_inputs(members: Sequence[Tensor]) -> Inputs:
    """What the volume needs of tuples of K members (..., D): b^1 .. b^K (..., D), first row of B (..., K), D (...),
    A (..., K, K)."""
    first = members[0]
    basis = [first, *(other - first for other in members[1:])]
    # sums, not a matrix product: those may run in TF32, also in the backward
    gram = [[(b * c).sum(-1) if k <= m else None for m, c in enumerate(basis)] for k, b in enumerate(basis)]
    gram = [[gram[min(k, m)][max(k, m)] for m in range(len(basis))] for k in range(len(basis))]
    adjugate = [[_cofactor(gram, k, m) for m in range(len(basis))] for k in range(len(basis))]
    determinant = sum(gram[0][m] * adjugate[0][m] for m in range(len(basis)))
    stacked = torch.stack([torch.stack(row, dim=-1) for row in adjugate], dim=-2)
    return *basis, torch.stack(gram[0], dim=-1), determinant, stacked


def _cofactor(matrix: list[list[Tensor]], k: int, m: int) -> Tensor:
    minor = [row[:m] + row[m + 1 :] for row in matrix[:k] + matrix[k + 1 :]]
    return (-1) ** (k + m) * _determinant(minor) if minor else torch.ones_like(matrix[0][0])


def _determinant(matrix: list[list[Tensor]]) -> Tensor:
    """By expansion along the first row: exact for the tiny matrices here, and smooth where they are singular."""
    if len(matrix) == 1:
        return matrix[0][0]
    return sum(matrix[0][m] * _cofactor(matrix, 0, m) for m in range(len(matrix)))


def _volumes(anchors: Inputs, tuples: Inputs) -> Tensor:
    """V (t, u) of t anchors and u tuples."""
    return _TileVolumes.apply(*anchors, *tuples)


class _TileVolumes(torch.autograd.Function):
    """`_volumes` with its derivative written out: autograd would keep and walk a dozen matrices (t, u), not K + 1.

    With h_k = x . b_k - f_k, |e|² = |x|² - f_1 - 2 h_1 and A symmetric, V² = |e|² D - h' A h.
    """

    @staticmethod
    def forward(ctx, x: Tensor, square: Tensor, *tuples: Tensor):
        *basis, first_row, determinant, adjugate = tuples
        products = [torch.addmm(-first_row[:, k], x, b.T) for k, b in enumerate(basis)]
        volume = _edge_square(square, first_row, products).mul_(determinant)
        for k, h in enumerate(products):
            volume.addcmul_(h, _weighted(adjugate, k, products), value=-1)
        volume.clamp_min_(EPSILON).sqrt_()
        ctx.save_for_backward(x, square, *tuples, volume, *products)
        return volume

    @staticmethod
    @once_differentiable
    def backward(ctx, d_volume: Tensor):
        x, square, *saved = ctx.saved_tensors
        members = (len(saved) - 4) // 2
        *basis, first_row, determinant, adjugate, volume = saved[: members + 4]
        products = saved[members + 4 :]
        d = (d_volume / volume).mul_(0.5)  # towards V², which is constant where it was clamped
        d.masked_fill_(volume <= 1.0001 * math.sqrt(EPSILON), 0)
        d_determinant = _edge_square(square, first_row, products).mul_(d).sum(0)
        d_square = d @ determinant
        d_first_row, d_adjugate, d_x = torch.empty_like(first_row), torch.empty_like(adjugate), torch.zeros_like(x)
        d_basis = []
        for k, h in enumerate(products):
            scaled = d * h
            for m in range(k, len(products)):
                d_adjugate[:, k, m] = d_adjugate[:, m, k] = -(scaled * products[m]).sum(0)
            d_product = _weighted(adjugate, k, products)
            if k == 0:
                d_product.add_(determinant)
            d_product.mul_(d).mul_(-2)
            d_first_row[:, k] = -d_product.sum(0)
            d_basis.append(d_product.T @ x)
            d_x.addmm_(d_product, basis[k])
        d_first_row[:, 0] -= d.sum(0) * determinant
        return d_x, d_square, *d_basis, d_first_row, d_determinant, d_adjugate


def _edge_square(square: Tensor, first_row: Tensor, products: list[Tensor]) -> Tensor:
    """|e|² (t, u), e from the first member of each tuple to each anchor."""
    return torch.sub(square[:, None] - first_row[:, 0], products[0], alpha=2)


def _weighted(adjugate: Tensor, k: int, products: list[Tensor]) -> Tensor:
    """Row k of A h, (t, u)."""
    total = adjugate[:, k, 0] * products[0]
    for m in range(1, len(products)):
        total.addcmul_(adjugate[:, k, m], products[m])
    return total
