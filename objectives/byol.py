"""BYOL and SimSiam between modalities: each predicts the other's projection; no negatives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

from torch import Tensor, nn
from torch.nn import functional as F

from ..datasets.registry import InputError
from . import register
from .embeddings import Embeddings, Loss, Objective, split_anchor
from .heads import Head, follow, frozen_copy
from .options import share


class _Predictive(Objective):
    """What BYOL and SimSiam share: p^m = predictor_m(projector_m(z^m)) meets a target that is held constant."""

    memory = "O(n W), W the widest layer of projector and predictor"

    def __init__(self, hidden: int, width: int, predictor_hidden: int) -> None:
        super().__init__()
        for name, value in {"hidden": hidden, "width": width, "predictor_hidden": predictor_hidden}.items():
            if value < 1:
                raise InputError(f"{name}={value} is no width of a layer; give at least 1, such as 512")
        self.hidden, self.width, self.predictor_hidden = hidden, width, predictor_hidden
        self.projectors, self.predictors = nn.ModuleDict(), nn.ModuleDict()

    def check(self, names: tuple[str, ...]) -> None:
        split_anchor(names, None)

    def _predictor(self) -> Head:
        return Head((self.width, self.predictor_hidden, self.width))

    def _loss(
        self,
        z: Embeddings,
        predicted: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        slope: float,
        constant: float,
    ) -> Loss:
        """Mean over ordered pairs of `constant - slope * cosine` of m's prediction with n's target."""
        terms, parts = {}, {}
        pairs = [pair for both in combinations(z.names, 2) for pair in (both, both[::-1])]
        for m, n in pairs:
            there = z.valid[m] & z.valid[n]
            cosine = F.cosine_similarity(predicted[m], targets[n].detach(), dim=-1)
            terms[f"{m}-{n}"] = z.mean(constant - slope * cosine, there) / len(pairs)
            parts[f"cosine/{m}-{n}"] = z.mean(cosine.detach(), there)
        return Loss(sum(terms.values()), terms, parts)


@register("byol")
class BYOL(_Predictive):
    """Each modality predicts the slowly moving projection of every other one.

    L = mean over pairs (m, n) of mean_i [ |u(p_i^m) - u(t_i^n)|² + |u(p_i^n) - u(t_i^m)|² ]
    p^m = predictor_m(projector_m(z^m)),   t^n = target projector_n(z^n) held constant,   u(x) = x / |x|

    Grill et al., "Bootstrap Your Own Latent" (2020), with modalities for views, as the ablation of "Towards Bridging
    the Semantic Spaces of the One-to-Many Mapping in Cross-Modality Text-to-Video Generation", section 4.2.3, has it.
    The target projectors are exponential moving averages of the projectors, whose momentum rises from `momentum` to 1
    along a cosine. Batch norm runs over the samples of the global batch that have the modality, the mean over those
    that have both.

    Args:
        hidden, width: of the projector, Linear - batch norm - ReLU - Linear.
        predictor_hidden: hidden width of the predictor, which is built the same.
        momentum: of the moving average at the start.
    """

    def __init__(
        self, *, hidden: int = 4096, width: int = 256, predictor_hidden: int = 4096, momentum: float = 0.996
    ) -> None:
        super().__init__(hidden, width, predictor_hidden)
        share("the paper takes 0.996", momentum=momentum)
        self.momentum = momentum
        self.targets = nn.ModuleDict()

    def setup(self, names: tuple[str, ...], dim: int, widths: Mapping[str, int]) -> None:
        for name in names:
            self.projectors[name] = Head((dim, self.hidden, self.width))
            self.predictors[name] = self._predictor()
            self.targets[name] = frozen_copy(self.projectors[name])

    def forward(self, z: Embeddings) -> Loss:
        predicted, targets = {}, {}
        for name in z.names:
            projected = self.projectors[name](z, z.z[name], z.valid[name])
            predicted[name] = self.predictors[name](z, projected, z.valid[name])
            targets[name] = self.targets[name](z, z.z[name].detach(), z.valid[name])
        return self._loss(z, predicted, targets, slope=4, constant=4)  # |u - v|² = 2 - 2 u . v, twice a pair

    def after_step(self, progress: float) -> None:
        momentum = 1 - (1 - self.momentum) * (math.cos(math.pi * progress) + 1) / 2
        for name, projector in self.projectors.items():
            follow(self.targets[name], projector, momentum)


@register("simsiam")
class SimSiam(_Predictive):
    """Each modality predicts the projection of every other one, which is held constant meanwhile.

    L = mean over pairs (m, n) of -1/2 mean_i [ cos(p_i^m, q_i^n) + cos(p_i^n, q_i^m) ]
    q^m = projector_m(z^m), held constant as a target,   p^m = predictor_m(q^m)

    Chen and He, "Exploring Simple Siamese Representation Learning" (2021), with modalities for views, as the ablation
    of "Towards Bridging the Semantic Spaces of the One-to-Many Mapping in Cross-Modality Text-to-Video Generation",
    section 4.2.3, has it. Batch norm and means take the samples that `byol` takes.

    Args:
        hidden, width: of the projector, two layers Linear - batch norm - ReLU and a Linear with a batch norm that has
            neither scale nor shift.
        predictor_hidden: width of the predictor's bottleneck.
    """

    def __init__(self, *, hidden: int = 2048, width: int = 2048, predictor_hidden: int = 512) -> None:
        super().__init__(hidden, width, predictor_hidden)

    def setup(self, names: tuple[str, ...], dim: int, widths: Mapping[str, int]) -> None:
        for name in names:
            self.projectors[name] = Head((dim, self.hidden, self.hidden, self.width), last_norm=True)
            self.predictors[name] = self._predictor()

    def forward(self, z: Embeddings) -> Loss:
        projected = {name: self.projectors[name](z, z.z[name], z.valid[name]) for name in z.names}
        predicted = {name: self.predictors[name](z, projected[name], z.valid[name]) for name in z.names}
        return self._loss(z, predicted, projected, slope=1, constant=0)
