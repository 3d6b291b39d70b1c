"""SigLIP against the double loop over all pairs."""

import pytest
import torch
from torch.nn import functional as F

from trivium.datasets.registry import InputError
from trivium.objectives import Embeddings, build

NAMES = ("text", "video", "audio")


def vectors(n=7, dim=4, names=NAMES):
    generator = torch.Generator().manual_seed(0)
    return {name: F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=-1) for name in names}


def slow(x, y, scale, bias):
    total = 0.0
    for i in range(len(x)):
        for j in range(len(y)):
            sign = 1 if i == j else -1
            total = total + torch.log1p(torch.exp(-sign * (scale * (x[i] * y[j]).sum() + bias)))
    return total / len(x)


def compare(options, weights, kept=None):
    """Loss and gradients, those of temperature and bias too, against the loops; weights by pair."""
    objective = build("siglip", **options).double()
    ours, theirs = ({name: x.requires_grad_() for name, x in vectors().items()} for _ in range(2))
    kept = torch.ones(7, dtype=torch.bool) if kept is None else kept
    valid = {name: kept if name == "video" else torch.ones_like(kept) for name in NAMES}
    got = objective(Embeddings(ours, valid)).total
    log_scale, bias = (p.detach().clone().requires_grad_() for p in (objective.temperature.log_scale, objective.bias))
    expected = 0
    for (m, n), weight in weights.items():
        both = valid[m] & valid[n]
        pair = slow(theirs[m][both], theirs[n][both], log_scale.exp(), bias)
        expected = expected + weight * pair.squeeze() / sum(weights.values())
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    gradients = torch.autograd.grad(got, [*ours.values(), objective.temperature.log_scale, objective.bias])
    wanted = torch.autograd.grad(
        expected, [*theirs.values(), log_scale, bias], allow_unused=True, materialize_grads=True
    )
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_two_modalities_are_the_published_loss():
    z = vectors(names=("text", "video"))
    loss = build("siglip", tile=3)(Embeddings(z)).total
    assert float(loss.detach()) == pytest.approx(float(slow(z["text"], z["video"], 10, -10)), rel=1e-6)


@pytest.mark.parametrize("tile", [3, 2048])
def test_pairs_are_averaged_by_weight(tile):
    compare({"tile": tile}, {("text", "video"): 1, ("text", "audio"): 1, ("video", "audio"): 1})
    options = {"temperature": 0.5, "bias": -1.0, "weights": {"text-video": 3.0, "audio-text": 1.0}, "tile": tile}
    compare(options, {("text", "video"): 3, ("text", "audio"): 1})


def test_only_samples_with_both_modalities_take_part():
    kept = torch.tensor([False, True, True, False, True, True, True])
    compare({"anchor": "text", "bias": 0.0}, {("text", "video"): 1, ("text", "audio"): 1}, kept)


def test_temperature_and_bias_learn():
    loss = build("siglip")
    loss(Embeddings(vectors())).total.backward()
    assert loss.bias.grad.abs() > 0 and loss.temperature.log_scale.grad.abs() > 0
    assert not list(build("siglip", learnable_temperature=False).parameters())


def test_options_are_checked():
    with pytest.raises(InputError, match="bias=inf is not finite"):
        build("siglip", bias=float("inf"))
    with pytest.raises(InputError, match="text-vidio"):
        build("siglip", weights={"text-vidio": 1.0}).check(("text", "video"))
