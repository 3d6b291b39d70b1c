"""What an embedding space looks like, whatever shaped it: alignment, uniformity, gap, conflicts, divergence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

Vectors = Mapping[str, Tensor]


@torch.no_grad()
def geometry(z: Vectors, valid: Vectors | None = None, *, tau: float = 0.07, limit: int = 2048) -> dict[str, float]:
    """Measures of the unit vectors `z[modality]` (N, D), in float64, without gradient and without communication.

    - `alignment/m-n`: mean |z_i^m - z_i^n|² over the samples that have both; 0 (equal) to 4 (opposite).
    - `uniformity/m`: log mean_{i != j} exp(-2 |z_i^m - z_j^m|²); 0 when collapsed, near -4 when spread evenly in many
      dimensions (this and the last: Wang & Isola 2020).
    - `gap/m-n`: distance of the mean vectors of two modalities, 0 to 2 (Liang et al. 2022).
    - `zeta/m` and `chi/m`: alignment-uniformity conflict (-1 to 1) and intra-alignment conflict (0 to 1) with m as the
      anchor, all weights 1; `zeta` and `chi`: their means over anchors ("Towards Uniformity and Alignment for
      Multi-Modal Representation Learning", eq. 3-4).
    - `holder_divergence`: of the kernel density estimates of all modalities (eq. 24), anchored at the first.

    A measure for which there is no sample is left out.

    Args:
        valid: by modality, bool (N,), the samples that have it; all by default.
        tau: temperature of the conflicts' softmax, bandwidth of the divergence's kernel.
        limit: most samples used; of more, evenly spaced ones. Time and memory grow with its square.
    """
    x, there = _chosen(z, valid, limit)
    found: dict[str, float] = {}
    for m, n in combinations(x, 2):
        both = there[m] & there[n]
        if both.any():
            found[f"alignment/{m}-{n}"] = (x[m] - x[n])[both].square().sum(-1).mean().item()
        found[f"gap/{m}-{n}"] = (x[m][there[m]].mean(0) - x[n][there[n]].mean(0)).norm().item()
    for name in x:
        if there[name].sum() > 1:
            found[f"uniformity/{name}"] = _uniformity(x[name][there[name]])
    if len(x) > 1:
        found |= _conflicts(x, there, tau)
        found["holder_divergence"] = holder_divergence([x[name][there[name]] for name in x], tau)
    return found


def holder_divergence(z: list[Tensor], tau: float) -> float:
    """Global Hölder divergence (eq. 24) of M >= 2 sets of vectors, (N_m, D) each; 0 or less where all are the same set.

    (1/M) sum_m log mean_i (s_i^m)^(M-1) - log mean_i prod_{m >= 2} c_i^m, where s_i^m and c_i^m are the means of the
    kernel exp(-|x - y|² / (2 tau²)) between z_i^m and all of z^m, between z_i^1 and all of z^m. The normalising
    constant of the kernel has the same power in both terms and cancels. In log space: tau = 0.07 underflows otherwise.
    """

    def log_kernel_means(x: Tensor, y: Tensor) -> Tensor:
        return (-_square_distances(x, y) / (2 * tau**2)).logsumexp(1) - math.log(len(y))

    def log_mean_exp(x: Tensor) -> float:
        return x.logsumexp(0).item() - math.log(len(x))

    within = sum(log_mean_exp((len(z) - 1) * log_kernel_means(x, x)) for x in z) / len(z)
    return within - log_mean_exp(sum(log_kernel_means(z[0], y) for y in z[1:]))


def _chosen(z: Vectors, valid: Vectors | None, limit: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """At most `limit` evenly spaced samples of the modalities that occur in them, and which samples have them."""
    first = next(iter(z.values()))
    kept = min(len(first), limit)
    index = torch.arange(kept, device=first.device) * len(first) // max(kept, 1)
    everything = torch.ones(kept, dtype=torch.bool, device=first.device)
    there = {name: everything if valid is None else valid[name].to(first.device)[index] for name in z}
    # zeros for what is missing: it may hold anything, and must not spoil sums
    x = {name: z[name][index].double().masked_fill(~there[name][:, None], 0) for name in z if there[name].any()}
    return x, there


def _conflicts(x: Vectors, there: Vectors, tau: float) -> dict[str, float]:
    """Zeta and chi (eq. 3-4) by anchor and their means. V and Phi take the modalities that a sample has."""
    found: dict[str, float] = {}
    for anchor in x:
        pull, push, weight = torch.zeros_like(x[anchor]), torch.zeros_like(x[anchor]), 0
        for name in x:
            if name == anchor:
                continue
            scores = x[anchor] @ x[name].T / tau
            attention = scores.masked_fill(~there[name], -torch.inf).softmax(1)
            pull = pull + x[name]
            push = push + (attention @ x[name]) * there[name][:, None]
            weight = weight + there[name]
        counted = there[anchor] & (weight > 0)
        if counted.any():
            found[f"zeta/{anchor}"] = F.cosine_similarity(pull, push)[counted].mean().item()
            found[f"chi/{anchor}"] = (1 - pull.norm(dim=-1) / weight)[counted].mean().item()
    for measure in ("zeta", "chi"):
        each = [value for key, value in found.items() if key.startswith(measure)]
        if each:
            found[measure] = sum(each) / len(each)
    return found


def _uniformity(x: Tensor) -> float:
    exponents = (-2 * _square_distances(x, x)).fill_diagonal_(-torch.inf)
    return exponents.flatten().logsumexp(0).item() - math.log(len(x) * (len(x) - 1))


def _square_distances(x: Tensor, y: Tensor) -> Tensor:
    return (x.square().sum(-1)[:, None] + y.square().sum(-1) - 2 * x @ y.T).clamp_min(0)
