"""Sinkhorn-anchored structure: which anchors a sample is near before the shared space, it shall be near in it too."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..datasets.registry import InputError, nearest
from . import register
from .embeddings import Embeddings, Loss, Objective, split_anchor
from .options import not_negative, positive, share
from .precision import matmul


@register("sink_anchored")
class SinkAnchored(Objective):
    """Semantic structure preserving consistency by multi-assignment Sinkhorn-Knopp anchors (SSPC, Multi-SK).

    L = sum_{m, n} c_mn [ l(p_m, q'_nm) + l(p'_nm, q_m) ],   l(p, q) = mean over samples and anchors of
    BCE(sigmoid(logit(p)), q),   p_m = x^m . A_m,   p'_nm = z^n . A'_m,   q = Multi-SK assignments of p, of p'

    x^m are the tower's features of modality m, z^n the unit vectors of modality n, A_m and A'_m learnt anchors (K each,
    one set per modality before and one after the projection), all of unit length. Each side predicts the other's
    assignments, in which no gradient flows. "Preserving Modality Structure Improves Multi-Modal Learning"; the
    equations are those of its released code. A sum of 2 M² terms, no mean. Samples without m or n leave the term.

    Multi-SK gives every sample several anchors and every anchor its equal share of samples. Assignments are balanced
    over the global batch and a queue of earlier samples; its sums run over ranks.

    Args:
        anchors: K, the size of each set.
        chosen: K', how many anchors a sample is to have.
        design: how the K channels of the similarities differ: "damped", w = 1 for K' channels and `damping` for the
            others, or "graded", w_c = eta + (1 - eta)(1 - c / K) for c = 0 .. K - 1.
        damping: mu of "damped".
        eta: smallest weight of "graded".
        epsilon: entropy of the assignments; smaller is harder.
        iterations: of Multi-SK.
        queue: earlier samples that take part in the balancing, as far as there are any; 0 for none.
        temperature: divides p in the logit.
        logit: "linear", p / temperature, or "exp", exp(p / temperature) as released (never negative, so assignments
            below 1/2 cannot be fitted).
        cross_modal, modality_specific: factors of the terms with m != n, and with m = n.
        weights: c of pairs such as "text-audio" (both orders) or "audio-audio"; 1 where nothing is given. The released
            configuration has 0.1 for every pair with audio.
    """

    needs = frozenset({"features"})
    memory = "O((n + queue / ranks) K) a set of anchors, times K for the graded design; queues of their own"

    def __init__(
        self,
        *,
        anchors: int = 64,
        chosen: int = 32,
        design: Literal["damped", "graded"] = "damped",
        damping: float = 0.25,
        eta: float = 0.1,
        epsilon: float = 0.07,
        iterations: int = 20,
        queue: int = 5500,
        temperature: float = 0.1,
        logit: Literal["linear", "exp"] = "linear",
        cross_modal: float = 1.0,
        modality_specific: float = 1.0,
        weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= chosen < anchors:
            raise InputError(f"chosen={chosen} is no part of anchors={anchors}; take at least 1 and fewer than all")
        if queue < 0 or iterations < 1:
            raise InputError(f"queue={queue}, iterations={iterations}: give a queue of 0 or more and an iteration")
        positive("the released code takes 0.07 and 0.1", epsilon=epsilon, temperature=temperature)
        factors = {"cross_modal": cross_modal, "modality_specific": modality_specific}
        factors |= {f"weights.{pair}": weight for pair, weight in (weights or {}).items()}
        not_negative("use 0 to switch those terms off", **factors)
        share("the paper takes 0.25 and 0.1", damping=damping, eta=eta)
        self.anchors, self.chosen = anchors, chosen
        self.channels = channel_weights(design, anchors, chosen, damping, eta)
        self.epsilon, self.iterations, self.queue = epsilon, iterations, queue
        self.temperature, self.logit = temperature, logit
        self.cross_modal, self.modality_specific, self.weights = cross_modal, modality_specific, weights or {}
        self.before, self.after = nn.ModuleDict(), nn.ModuleDict()
        self._pending: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def check(self, names: tuple[str, ...]) -> None:
        split_anchor(names, None)
        known = [f"{m}-{n}" for m, n in product(names, names)]
        for pair in self.weights:
            if pair not in known:
                raise InputError(f"weights: {pair!r} is no pair of this model; {nearest(pair, known)}")

    def setup(self, names: tuple[str, ...], dim: int, widths: Mapping[str, int]) -> None:
        for name in names:
            self.before[name] = _AnchorSet(self.anchors, widths[name], self.queue)
            self.after[name] = _AnchorSet(self.anchors, dim, self.queue)

    def forward(self, z: Embeddings) -> Loss:
        x = {name: F.normalize(z.features[name], dim=-1, eps=1e-6) for name in z.names}
        before = {m: self.before[m](x[m]) for m in z.names}
        after = {(n, m): self.after[m](z.z[n]) for n, m in product(z.names, z.names)}
        with torch.no_grad():
            self._remember(z, x)
            targets_before = {m: self._assign(z, m, before[m], self.before[m], self.before[m]) for m in z.names}
            targets_after = {(n, m): self._assign(z, n, after[n, m], self.after[m], self.after[n]) for n, m in after}
        terms, parts = {}, {}
        for n, m in after:
            there = z.valid[n] & z.valid[m]
            there_cost = self._cost(z, before[m], targets_after[n, m], there)
            back_cost = self._cost(z, after[n, m], targets_before[m], there)
            weight = self._weight(n, m)
            if weight:
                terms[f"{m}-{n}"] = weight * (there_cost + back_cost)
            parts |= {f"before-{m}/{n}": there_cost.detach(), f"after-{n}/{m}": back_cost.detach()}
        nothing = sum(p.sum() for p in (*before.values(), *after.values())) * 0.0
        return Loss(sum(terms.values(), nothing), terms or {"none": nothing}, parts)

    def after_step(self, progress: float) -> None:
        """Push the step's samples into the queues."""
        for name, (x, y, valid) in self._pending.items():
            self.before[name].push(x, valid)
            self.after[name].push(y, valid)
        self._pending = {}

    def _remember(self, z: Embeddings, x: Mapping[str, Tensor]) -> None:
        if self.queue:
            self._pending = {
                name: (z.gather(x[name].detach()), z.columns(name).detach(), z.columns_valid(name)) for name in z.names
            }

    def _weight(self, n: str, m: str) -> float:
        kind = self.modality_specific if n == m else self.cross_modal
        return kind * self.weights.get(f"{n}-{m}", self.weights.get(f"{m}-{n}", 1.0))

    def _cost(self, z: Embeddings, p: Tensor, q: Tensor, there: Tensor) -> Tensor:
        scaled = p / self.temperature
        logits = scaled.exp() if self.logit == "exp" else scaled
        return z.mean(F.binary_cross_entropy_with_logits(logits, q, reduction="none").mean(-1), there)

    def _assign(self, z: Embeddings, name: str, scores: Tensor, anchors: _AnchorSet, memory: _AnchorSet) -> Tensor:
        """Soft assignments (n, K) in [0, 1] of this rank's samples of one modality to one set of anchors."""
        queued, queued_valid = z.share(memory.samples), z.share(memory.valid)
        scores = torch.cat([anchors(queued.to(scores.dtype)), scores])
        valid = torch.cat([queued_valid, z.valid[name]])
        shares = multi_sinkhorn_knopp(
            scores, valid, self.channels, epsilon=self.epsilon, iterations=self.iterations, all_sum=z.all_sum
        )
        return assignments(shares, self.channels)[len(queued) :]


class _AnchorSet(nn.Module):
    """K anchors, and the queue of earlier samples of the same modality on the same side of the projection.

    Every rank holds the whole queue, so that a run may go on with another number of ranks; each balances its part.
    """

    def __init__(self, anchors: int, width: int, queue: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(anchors, width))
        self.register_buffer("samples", torch.zeros(queue, width))
        self.register_buffer("valid", torch.zeros(queue, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """Cosines (n, K) of unit vectors (n, width) with the anchors."""
        return matmul(x, F.normalize(self.weight, dim=-1).T)

    @torch.no_grad()
    def push(self, x: Tensor, valid: Tensor) -> None:
        """Append those of the samples (N, width) that are there; the oldest leave."""
        size, x = len(self.samples), x[valid]
        self.samples.copy_(torch.cat([self.samples, x.to(self.samples.dtype)])[-size:])
        self.valid.copy_(torch.cat([self.valid, valid[valid]])[-size:])


def channel_weights(design: str, anchors: int, chosen: int, damping: float, eta: float) -> list[tuple[float, int, int]]:
    """The K channels as (weight, how many have it, how many of those are among the K' strongest), strongest first.

    Channels of equal weight stay equal in every iteration, so each group is computed once.
    """
    if design == "damped":
        return [(1.0, chosen, chosen), (damping, anchors - chosen, 0)]
    if design == "graded":
        return [(eta + (1 - eta) * (1 - c / anchors), 1, int(c < chosen)) for c in range(anchors)]
    raise InputError(f"design={design!r} is unknown; take 'damped' or 'graded'")


def multi_sinkhorn_knopp(
    scores: Tensor,
    valid: Tensor,
    channels: list[tuple[float, int, int]],
    *,
    epsilon: float,
    iterations: int,
    all_sum=lambda x: x,
) -> Tensor:
    """Multi-assignment Sinkhorn-Knopp: scores (n, K) of this rank's samples -> shares (groups, n, K). All ranks.

    Alternately makes every (channel, sample) a distribution over anchors, gives every (channel, anchor) N / K samples,
    and makes every (sample, anchor) a distribution over channels (supplement, section 3, in its order). Only the
    second needs other ranks.

    Args:
        valid: bool (n,); the others take no share and their rows are 0.
        channels: from `channel_weights`; the channels of a group share a slice of the result.
        epsilon: divides the scores.
        iterations: how often.
        all_sum: sum over ranks.
    """
    rows = valid.to(scores.dtype)[None, :, None]
    weights = scores.new_tensor([channel[0] for channel in channels])[:, None, None]
    # a sample's largest score is taken off against overflow: the first step divides by what that changes, as it does by
    # the overall sum that the published code divides by before
    shares = (weights * (scores - scores.amax(1, keepdim=True)) / epsilon).exp_().mul_(rows)
    tiny = torch.finfo(scores.dtype).tiny
    for _ in range(iterations):  # in place: with a channel for each anchor this is the largest tensor of the step
        shares.div_(shares.sum(2, keepdim=True).clamp_min_(tiny))
        # 1 in place of N / K, which the next step divides out: over the tiny share of an anchor that nobody is near,
        # N / K would overflow
        shares.div_(all_sum(shares.sum(1, keepdim=True)).clamp_min_(tiny))
        of_all = torch.zeros_like(shares[0])
        for channel, (_, count, _) in zip(shares, channels, strict=True):
            of_all.add_(channel, alpha=count)
        shares.div_(of_all.clamp_min_(tiny))
    return shares.div_(shares.sum(2, keepdim=True).clamp_min_(tiny))


def assignments(shares: Tensor, channels: list[tuple[float, int, int]]) -> Tensor:
    """Sum of the K' strongest channels, stretched per sample to [0, 1]: (groups, n, K) -> (n, K)."""
    together = torch.zeros_like(shares[0])
    for channel, (_, _, strongest) in zip(shares, channels, strict=True):
        together.add_(channel, alpha=strongest)
    low, high = together.amin(1, keepdim=True), together.amax(1, keepdim=True)
    return (together - low) / (high - low).clamp_min(torch.finfo(shares.dtype).eps)
