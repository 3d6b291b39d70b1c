"""The Hölder divergence against kernel density estimates written down as loops."""

import math

import pytest
import torch
from torch.nn import functional as F

from trivium.datasets.registry import InputError
from trivium.objectives import Embeddings, build
from trivium.objectives.geometry import holder_divergence

TAUS = {"text": 0.5, "video": 0.8, "audio": 0.3}


def vectors(n=6, dim=3):
    generator = torch.Generator().manual_seed(0)
    return {name: F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=-1) for name in TAUS}


def density(at, points, tau, skip=None):
    """Of the normal density of bandwidth tau around each point, the mean."""
    scale = (2 * math.pi * tau**2) ** (-len(at) / 2)
    kernels = [torch.exp(-(at - p).square().sum() / (2 * tau**2)) for k, p in enumerate(points) if k != skip]
    return scale * sum(kernels) / len(kernels)


def slow(z, taus, leave_one_out, anchors):
    names, power = list(z), len(z) - 1
    within = 0.0
    for m in names:
        values = [density(x, z[m], taus[m], i if leave_one_out else None) ** power for i, x in enumerate(z[m])]
        within = within + torch.log(sum(values) / len(values)) / len(names)
    overlaps = []
    for a in anchors:
        products = [math.prod(density(x, z[m], taus[m]) for m in names if m != a) for x in z[a]]
        overlaps.append(sum(products) / len(products))
    return within - torch.log(sum(overlaps) / len(overlaps))


def compare(options, anchors, valid=None):
    """Loss and gradients against the loops over the samples that there are; through lengths, which neither keeps."""
    ours, theirs = ({name: (3 * x).requires_grad_() for name, x in vectors().items()} for _ in range(2))
    unit = [{name: F.normalize(x, dim=-1) for name, x in leaves.items()} for leaves in (ours, theirs)]
    got = build("holder", taus=TAUS, **options)(Embeddings(unit[0], valid)).total
    there = {name: x if valid is None else x[valid[name]] for name, x in unit[1].items()}
    kept = {name: x for name, x in there.items() if len(x)}
    expected = slow(kept, TAUS, options.get("leave_one_out", False), anchors)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(expected, list(theirs.values()), allow_unused=True, materialize_grads=True)
    found = torch.autograd.grad(got, list(ours.values()), allow_unused=True, materialize_grads=True)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_equals_the_loops(leave_one_out, average):
    options = {"leave_one_out": leave_one_out, "average_anchors": average, "tile": 4}
    compare(options, list(TAUS) if average else ["text"])


def test_each_mean_takes_the_samples_that_there_are():
    rows = torch.arange(6)
    compare({"tile": 4}, ["text"], {"text": rows != 1, "video": rows > 1, "audio": rows % 3 != 2})


def test_equals_the_measure_at_the_papers_bandwidth():
    z = vectors()
    assert float(build("holder")(Embeddings(z)).total) == pytest.approx(holder_divergence(list(z.values()), 0.07))


def test_a_small_bandwidth_does_not_underflow_in_float32():
    z = {name: x.float().requires_grad_() for name, x in vectors().items()}
    loss = build("holder", tau=0.01)(Embeddings(z)).total
    loss.backward()
    exact = build("holder", tau=0.01)(Embeddings({name: x.detach().double() for name, x in z.items()})).total
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)
    assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in z.values())


def test_descending_it_draws_the_densities_together():
    z = {name: x.clone().requires_grad_() for name, x in vectors(n=16).items()}
    objective = build("holder", tau=0.5)
    losses = []
    for _ in range(60):
        loss = objective(Embeddings({name: F.normalize(x, dim=-1) for name, x in z.items()})).total
        losses.append(float(loss.detach()))
        for x, gradient in zip(z.values(), torch.autograd.grad(loss, list(z.values())), strict=True):
            x.data -= 0.3 * gradient
    assert losses[-1] < 0.5 * losses[0]


def test_modalities_without_samples_leave():
    z, everyone = vectors(), torch.ones(6, dtype=torch.bool)
    nobody = torch.zeros(6, dtype=torch.bool)
    partial = {"text": everyone, "video": everyone, "audio": nobody}
    compare({}, ["text"], partial)
    assert float(build("holder", taus=TAUS)(Embeddings(z, partial | {"text": nobody})).total) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tau": 0.0}, "tau=0.0 is not positive"),
        ({"taus": {"audio": -1.0}}, "taus.audio=-1.0"),
        ({"taus": {"audio": math.nan}}, "taus.audio=nan"),
        ({"anchor": "text", "average_anchors": True}, "leave anchor='text' out"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        build("holder", **options)


def test_bandwidths_name_modalities():
    with pytest.raises(InputError, match="sound"):
        build("holder", taus={"sound": 0.1}).check(("text", "audio"))
