"""InfoNCE between all pairs of any number of modalities (CLIP's loss for two)."""

from __future__ import annotations

from itertools import combinations

from torch import Tensor

from ..datasets.registry import InputError, nearest
from . import register
from .embeddings import Embeddings, Loss, Objective, split_anchor
from .matching import checked_smoothing, match_both_ways
from .options import positive
from .temperature import Temperature
from .tiled import TILED_MEMORY


@register("infonce")
class InfoNCE(Objective):
    """Weighted mean of the InfoNCE losses of all ordered pairs of modalities.

    L = -(1 / sum_{m != n} w_mn) sum_{m != n} w_mn mean_i log p_ii^mn
    p_ij^mn = exp(z_i^m . z_j^n / tau) / sum_k exp(z_i^m . z_k^n / tau)

    "Towards Uniformity and Alignment for Multi-Modal Representation Learning", eq. 1 (printed as a sum over i; here
    the mean over the samples that have both modalities). The sum over k takes all samples of the global batch that
    have modality n. A pair that no sample has contributes 0.

    Args:
        temperature: tau at the start.
        learnable_temperature: whether tau is trained.
        temperature_range: smallest and largest tau in use.
        weights: weight of each pair, "text-video" standing for both directions; pairs left out take no part.
            By default every pair counts 1.
        anchor: only pairs with this modality take part.
        label_smoothing: share of the target spread evenly over all candidates, in [0, 1).
        tile: side of the score tiles in memory, by default 512 on a CPU and 4096 on a GPU; the loss does not depend on
            it.
    """

    memory = TILED_MEMORY

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        learnable_temperature: bool = True,
        temperature_range: tuple[float, float] = (0.01, 1.0),
        weights: dict[str, float] | None = None,
        anchor: str | None = None,
        label_smoothing: float = 0.0,
        tile: int | None = None,
    ) -> None:
        super().__init__()
        self.temperature = Temperature(temperature, learnable=learnable_temperature, bounds=temperature_range)
        self.weights = weights
        self.anchor = anchor
        self.label_smoothing = checked_smoothing(label_smoothing)
        self.tile = tile

    def check(self, names: tuple[str, ...]) -> None:
        pair_weights(names, self.weights, self.anchor)

    def forward(self, z: Embeddings) -> Loss:
        weights = pair_weights(z.names, self.weights, self.anchor)
        scale = self.temperature(z.z[z.names[0]])
        terms, parts = {}, {}
        for (m, n), weight in weights.items():
            there, back = self._pair(z, m, n, scale)
            parts |= {f"{m}-{n}": there.detach(), f"{n}-{m}": back.detach()}
            terms[f"{m}-{n}"] = weight * (there + back) / (2 * sum(weights.values()))
        parts["temperature"] = 1 / scale.detach().squeeze()
        return Loss(total=sum(terms.values()), terms=terms, parts=parts)

    def _pair(self, z: Embeddings, m: str, n: str, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The losses m -> n and n -> m."""
        return match_both_ways(
            z,
            cosine_score,
            (z.z[m],),
            (z.columns(n),),
            (scale,),
            positive=scale * (z.z[m] * z.z[n]).sum(-1),
            row_mask=z.valid[m],
            column_mask=z.columns_valid(n),
            both=z.valid[m] & z.valid[n],
            label_smoothing=self.label_smoothing,
            tile=self.tile,
        )


def cosine_score(rows: tuple[Tensor], columns: tuple[Tensor], shared: tuple[Tensor]) -> Tensor:
    """scale * x_i . y_j for rows x (t, D), columns y (u, D) and scale (1,)."""
    (x,), (y,), (scale,) = rows, columns, shared
    return (scale * x) @ y.T


def pair_weights(
    names: tuple[str, ...], weights: dict[str, float] | None, anchor: str | None
) -> dict[tuple[str, str], float]:
    """The unordered pairs that take part, in the order of `names`, with their weights."""
    split_anchor(names, anchor)
    pairs = [pair for pair in combinations(names, 2) if anchor is None or anchor in pair]
    if weights is None:
        return dict.fromkeys(pairs, 1.0)
    spelled = {f"{m}-{n}": (m, n) for m, n in pairs} | {f"{n}-{m}": (m, n) for m, n in pairs}
    for key, weight in weights.items():
        if key not in spelled:
            raise InputError(f"weights: no pair {key!r} takes part; {nearest(key, (f'{m}-{n}' for m, n in pairs))}")
        positive("leave the pair out to switch it off", **{f"weights.{key}": weight})
    chosen = {spelled[key]: weight for key, weight in weights.items()}
    if len(chosen) < max(1, len(weights)):
        raise InputError(f"weights={weights} is empty or names a pair twice; name each pair that takes part once")
    return {pair: chosen[pair] for pair in pairs if pair in chosen}
