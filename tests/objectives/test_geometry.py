"""Every measure against a slow loop, and the divergence against plain sums of exponentials."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from trivium.objectives.geometry import geometry, holder_divergence, term_conflicts, volume_histograms

NAMES = ("text", "video", "audio")


def unit(n=7, dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=-1) for name in NAMES}


def some_missing(n=7):
    valid = {name: torch.ones(n, dtype=torch.bool) for name in NAMES}
    for name in NAMES:
        valid[name][2] = False
    valid["video"][0] = valid["audio"][5] = valid["audio"][0] = valid["text"][6] = False
    return valid


def slow_conflicts(z, valid, anchor, tau):
    """Eq. 3-4, sample by sample."""
    zetas, chis = [], []
    for i in range(len(z[anchor])):
        others = [m for m in z if m != anchor and valid[m][i]]
        if not valid[anchor][i] or not others:
            continue
        pull = sum(z[m][i] / tau for m in others)
        push = torch.zeros_like(pull)
        for m in others:
            there = [k for k in range(len(z[m])) if valid[m][k]]
            exps = [math.exp((z[anchor][i] @ z[m][k]).item() / tau) for k in there]
            push += sum(e / sum(exps) * z[m][k] for e, k in zip(exps, there, strict=True)) / tau
        zetas.append((pull @ push / (pull.norm() * push.norm())).item())
        chis.append(1 - pull.norm().item() / (len(others) / tau))
    return sum(zetas) / len(zetas), sum(chis) / len(chis)


def slow_holder(sets, tau):
    """Eq. 24 with the normalised kernel, in plain exponentials: only for a large tau."""
    dim = sets[0].shape[1]

    def kernel(x, y):
        return math.exp(-(x - y).square().sum().item() / (2 * tau**2)) / (2 * math.pi * tau**2) ** (dim / 2)

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    power = len(sets) - 1
    first = mean(math.log(mean(mean(kernel(x, y) for y in z) ** power for x in z)) for z in sets)
    return first - math.log(mean(math.prod(mean(kernel(x, y) for y in z) for z in sets[1:]) for x in sets[0]))


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_all_measures(missing, tau):
    z = unit()
    valid = some_missing() if missing else {name: torch.ones(7, dtype=torch.bool) for name in NAMES}
    got = geometry(z, valid if missing else None, tau=tau)
    expected = {}
    for m, n in combinations(NAMES, 2):
        both = [i for i in range(7) if valid[m][i] and valid[n][i]]
        expected[f"alignment/{m}-{n}"] = sum((z[m][i] - z[n][i]).square().sum().item() for i in both) / len(both)
        centres = [sum(z[k][i] for i in range(7) if valid[k][i]) / valid[k].sum() for k in (m, n)]
        expected[f"gap/{m}-{n}"] = (centres[0] - centres[1]).norm().item()
    for m in NAMES:
        there = [i for i in range(7) if valid[m][i]]
        exps = [math.exp(-2 * (z[m][i] - z[m][j]).square().sum().item()) for i, j in combinations(there, 2)]
        values = np.linalg.svd(z[m][there].numpy(), compute_uv=False)
        shares = [v / sum(values) for v in values]
        expected[f"effective_rank/{m}"] = math.exp(-sum(p * math.log(p) for p in shares if p > 1e-12))
        expected[f"uniformity/{m}"] = math.log(sum(exps) / len(exps))
        expected[f"zeta/{m}"], expected[f"chi/{m}"] = slow_conflicts(z, valid, m, tau)
    for measure in ("zeta", "chi"):
        expected[measure] = sum(expected[f"{measure}/{m}"] for m in NAMES) / 3
    if tau == 0.5:
        expected["holder_divergence"] = slow_holder([z[m][valid[m]] for m in NAMES], tau)
    else:
        got.pop("holder_divergence")
    assert got == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_holder_divergence_of_any_number_of_sets_of_any_size(count):
    generator = torch.Generator().manual_seed(count)
    sets = [torch.randn(5 + k, 3, generator=generator, dtype=torch.float64) for k in range(count)]
    assert holder_divergence(sets, 1.3) == pytest.approx(slow_holder(sets, 1.3), rel=1e-10)


def test_holder_divergence_falls_as_the_modalities_meet_and_does_not_underflow():
    z = unit(n=40, dim=64)
    base = z["text"]
    values = []
    for share in (0.0, 0.5, 0.9, 1.0):
        mixed = [F.normalize((1 - share) * x + share * base, dim=-1) for x in z.values()]
        values.append(holder_divergence(mixed, 0.07))
    assert values == sorted(values, reverse=True)
    assert all(math.isfinite(value) for value in values)
    assert values[0] > 100 and values[-1] == pytest.approx(0, abs=1e-9)


def test_perfect_agreement():
    z = torch.eye(6)
    got = geometry(dict.fromkeys(NAMES, z))
    for m, n in combinations(NAMES, 2):
        assert got[f"alignment/{m}-{n}"] == 0 and got[f"gap/{m}-{n}"] == 0
    for name in NAMES:
        assert got[f"uniformity/{name}"] == pytest.approx(-4)
    assert got["chi"] == pytest.approx(0, abs=1e-12)
    assert got["zeta"] == pytest.approx(1, abs=1e-4)


def test_two_modalities_have_no_intra_alignment_conflict():
    z = unit()
    got = geometry({name: z[name] for name in NAMES[:2]})
    assert got["chi"] == pytest.approx(0, abs=1e-12)


def test_opposite_positives_cancel():
    """Two positives that point opposite ways leave no force: chi is 1."""
    x, y = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 1.0]] * 3)
    assert geometry({"a": x, "b": y, "c": -y})["chi/a"] == pytest.approx(1)


def test_a_modality_that_nobody_has_is_left_out():
    z, valid = unit(), some_missing()
    valid["audio"][:] = False
    z["audio"][:] = torch.nan
    got = geometry(z, valid)
    assert not any("audio" in key for key in got)
    pair = {name: z[name] for name in NAMES[:2]}
    assert got == geometry(pair, {name: valid[name] for name in pair})
    assert all(math.isfinite(value) for value in got.values())


def test_too_few_samples_for_a_measure():
    assert geometry({"text": torch.eye(3)[:1]}) == {"effective_rank/text": 1.0}
    valid = {"a": torch.tensor([True, False]), "b": torch.tensor([False, True])}
    got = geometry({"a": torch.eye(2), "b": torch.eye(2)}, valid)
    assert set(got) == {"gap/a-b", "effective_rank/a", "effective_rank/b", "holder_divergence"}


def test_the_limit_takes_evenly_spaced_samples_and_is_deterministic():
    z = unit(n=10)
    chosen = torch.tensor([0, 2, 5, 7])
    assert geometry(z, limit=4) == geometry({name: x[chosen] for name, x in z.items()}) == geometry(z, limit=4)


def test_no_gradient_and_half_precision():
    z = {name: x.bfloat16().requires_grad_() for name, x in unit().items()}
    assert all(isinstance(value, float) and math.isfinite(value) for value in geometry(z).values())


def test_effective_rank_of_known_spectra():
    assert geometry({"text": torch.eye(4)})["effective_rank/text"] == pytest.approx(4)
    assert geometry({"text": torch.eye(4)[[0, 0, 0]]})["effective_rank/text"] == pytest.approx(1)


def test_volume_histograms_count_every_tuple_once():
    z, valid = unit(), some_missing()
    complete = [i for i in range(7) if all(valid[m][i] for m in NAMES)]
    found = volume_histograms(z, valid, bins=5)
    for name, pairs in {
        "matched": [(i, i) for i in complete],
        "unmatched": [(i, j) for i in complete for j in complete if i != j],
    }.items():
        counts = [0] * 5
        for i, j in pairs:
            tuple_ = torch.stack([z[NAMES[0]][i], *(z[m][j] for m in NAMES[1:])])
            counts[int(torch.linalg.det(tuple_ @ tuple_.T).sqrt().item() * 5)] += 1
        assert found[name] == pytest.approx([count / len(pairs) for count in counts])
    assert volume_histograms({"text": z["text"]}) == {}


def test_conflicts_of_terms_are_cosines_of_their_gradients():
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    terms = {"a": (x * y).sum(), "b": -2 * (x * y).sum(), "c": x.square().sum(), "constant": torch.ones(())}
    found = term_conflicts(terms, [x, y])
    assert set(found) == {"a:b", "a:c", "b:c"}
    assert float(found["a:b"]) == pytest.approx(-1)
    flat = torch.cat([y, x]).detach().flatten(), torch.cat([2 * x, 0 * x]).detach().flatten()
    assert float(found["a:c"]) == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)))
    sum(terms.values()).backward()  # the graph is still there
