"""SigLIP against the double loop over all pairs."""

import math

import pytest
import torch
from torch.nn import functional as F

from trivium.datasets.registry import InputError
from trivium.objectives import Embeddings, build


def vectors(n=7, dim=4, names=("text", "video", "audio")):
    generator = torch.Generator().manual_seed(0)
    return {name: F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=-1) for name in names}


def slow(x, y, scale, bias) -> float:
    total = 0.0
    for i in range(len(x)):
        for j in range(len(y)):
            sign = 1 if i == j else -1
            total += math.log1p(math.exp(-sign * (scale * float(x[i] @ y[j]) + bias)))
    return total / len(x)


def test_two_modalities_are_the_published_loss():
    z = vectors(names=("text", "video"))
    loss = build("siglip", tile=3)(Embeddings(z)).total
    assert float(loss.detach()) == pytest.approx(slow(z["text"], z["video"], 10, -10), rel=1e-6)


def test_pairs_are_averaged_by_weight():
    z = vectors()
    loss = build("siglip", temperature=0.5, bias=-1.0, weights={"text-video": 3.0, "audio-text": 1.0})(Embeddings(z))
    expected = (3 * slow(z["text"], z["video"], 2, -1) + slow(z["text"], z["audio"], 2, -1)) / 4
    assert float(loss.total.detach()) == pytest.approx(expected, rel=1e-6)


def test_only_samples_with_both_modalities_take_part():
    z = vectors()
    valid = {name: torch.ones(7, dtype=torch.bool) for name in z}
    valid["video"][[0, 3]] = False
    loss = build("siglip", anchor="text", weights={"text-video": 1.0}, bias=0.0)(Embeddings(z, valid)).total
    kept = valid["video"]
    assert float(loss.detach()) == pytest.approx(slow(z["text"][kept], z["video"][kept], 10, 0), rel=1e-6)


def test_temperature_and_bias_learn():
    loss = build("siglip")
    loss(Embeddings(vectors())).total.backward()
    assert loss.bias.grad.abs() > 0 and loss.temperature.log_scale.grad.abs() > 0
    assert not list(build("siglip", learnable_temperature=False).parameters())


def test_an_unknown_pair_is_refused():
    with pytest.raises(InputError, match="text-vidio"):
        build("siglip", weights={"text-vidio": 1.0}).check(("text", "video"))
