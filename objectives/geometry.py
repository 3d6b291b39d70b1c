"""What an embedding space looks like, whatever shaped it: alignment, uniformity, gap, rank, conflicts, divergence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import gather
from .gram import MOST_MODALITIES, volume_scores

Vectors = Mapping[str, Tensor]


@torch.no_grad()
def geometry(z: Vectors, valid: Vectors | None = None, *, tau: float = 0.07, limit: int = 2048) -> dict[str, float]:
    """Measures of the unit vectors `z[modality]` (N, D), in float64, without gradient and without communication.

    - `alignment/m-n`: mean |z_i^m - z_i^n|² over the samples that have both; 0 (equal) to 4 (opposite).
    - `uniformity/m`: log mean_{i != j} exp(-2 |z_i^m - z_j^m|²); 0 when collapsed, near -4 when spread evenly in many
      dimensions (this and the last: Wang & Isola 2020).
    - `effective_rank/m`: exp of the entropy of the vectors' singular values as shares of their sum: from 1, all on one
      line, to min(N, D) (Roy & Vetterli 2007).
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
        found[f"effective_rank/{name}"] = _effective_rank(x[name][there[name]])
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


@torch.no_grad()
def volume_histograms(
    z: Vectors, valid: Vectors | None = None, *, bins: int = 20, limit: int = 256
) -> dict[str, list[float]]:
    """How the volumes that the modalities' vectors span are spread over [0, 1]: shares of `bins` equal bins.

    - `matched`: of the tuples that belong together, one a sample.
    - `unmatched`: of the first modality of each sample with the others of each other sample.

    Args:
        z, valid: as `geometry` takes them; samples that lack a modality are left out. Empty for fewer than 2 complete
            samples and for more modalities than GRAM takes.
        limit: most samples used; of more, evenly spaced ones.
    """
    if not 2 <= len(z) <= MOST_MODALITIES:
        return {}
    x = dict(z)
    if valid is not None:
        complete = torch.stack([valid[name] for name in z]).all(0)
        x = {name: vectors[complete.to(vectors.device)] for name, vectors in z.items()}
    if min(map(len, x.values())) < 2:
        return {}
    anchor, *others = _chosen(x, None, limit)[0].values()
    volumes = volume_scores(anchor, others)
    itself = torch.eye(len(anchor), dtype=torch.bool, device=anchor.device)
    found = {"matched": volumes[itself], "unmatched": volumes[~itself]}
    return {name: (torch.histc(x.float().cpu(), bins, 0, 1) / len(x)).tolist() for name, x in found.items()}


def term_conflicts(terms: Mapping[str, Tensor], vectors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Cosines between the gradients that the terms of a loss have at the embeddings, by `a:b`; -1 is open conflict.

    All ranks: each holds the gradients at its own rows, of the global loss. The graph is kept for the backward pass.

    Args:
        terms: attached scalars, `Loss.terms`; those without a gradient are left out.
        vectors: what they are functions of.
    """
    moving = {name: term for name, term in terms.items() if term.requires_grad}
    gradients = []
    for term in moving.values():
        parts = torch.autograd.grad(term, vectors, retain_graph=True, allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    if len(gradients) < 2:
        return {}
    stacked = torch.stack(gradients).double()
    products = gather.all_sum(stacked @ stacked.T)
    norms = products.diagonal().sqrt().clamp_min(torch.finfo(products.dtype).tiny)
    cosines = products / norms[:, None] / norms
    return {f"{a}:{b}": cosines[i, j] for (i, a), (j, b) in combinations(enumerate(moving), 2)}


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


def _effective_rank(x: Tensor) -> float:
    singular = torch.linalg.svdvals(x)
    shares = singular / singular.sum().clamp_min(torch.finfo(x.dtype).tiny)
    return torch.special.entr(shares).sum().exp().item()


def _uniformity(x: Tensor) -> float:
    exponents = (-2 * _square_distances(x, x)).fill_diagonal_(-torch.inf)
    return exponents.flatten().logsumexp(0).item() - math.log(len(x) * (len(x) - 1))


def _square_distances(x: Tensor, y: Tensor) -> Tensor:
    return (x.square().sum(-1)[:, None] + y.square().sum(-1) - 2 * x @ y.T).clamp_min(0)
