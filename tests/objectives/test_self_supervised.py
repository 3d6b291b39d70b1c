"""VICReg, BYOL and SimSiam against plain torch modules and the published formulas."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trivium.datasets.registry import InputError
from trivium.objectives import Embeddings, build
from trivium.objectives.heads import Head, batch_normalise

N, DIM = 9, 5
NAMES = ("text", "video", "audio")


def vectors(names=NAMES):
    generator = torch.Generator().manual_seed(0)
    return {name: F.normalize(torch.randn(N, DIM, generator=generator, dtype=torch.float64), dim=-1) for name in names}


def made(name, names=NAMES, **options):
    torch.manual_seed(0)
    objective = build(name, **options)
    objective.setup(names, DIM, dict.fromkeys(names, DIM))
    return objective.double()


def plain(head: Head) -> nn.Sequential:
    """The same network of torch's own layers."""
    layers = []
    for index, linear in enumerate(head.linears):
        layer = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.load_state_dict(linear.state_dict())
        layers.append(layer)
        if index < len(head.norms):
            norm = nn.BatchNorm1d(linear.out_features)
            norm.weight.data, norm.bias.data = head.norms[index].weight.data, head.norms[index].bias.data
            layers += [norm, nn.ReLU()]
    if head.last_norm:
        layers.append(nn.BatchNorm1d(head.linears[-1].out_features, affine=False))
    return nn.Sequential(*layers).double().train()


@pytest.mark.parametrize("last_norm", [False, True])
def test_a_head_is_linear_batch_norm_relu(last_norm):
    torch.manual_seed(1)
    head = Head((DIM, 6, 4, 3), last_norm=last_norm).double()
    for norm in head.norms:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    z = Embeddings(vectors())
    ours = head(z, z.z["text"], z.valid["text"])
    torch.testing.assert_close(ours, plain(head)(z.z["text"]))


def test_batch_norm_counts_valid_rows_only():
    z, valid = Embeddings(vectors()), torch.arange(N) % 3 != 0
    normalised = batch_normalise(z, z.z["text"], valid)[valid]
    expected = F.batch_norm(z.z["text"][valid], None, None, training=True)
    torch.testing.assert_close(normalised, expected)


def slow_vicreg(a, b, invariance=25.0, variance=25.0, covariance=1.0) -> float:
    def hinge(x):
        return torch.relu(1 - torch.sqrt(x.var(dim=0) + 1e-4)).mean()

    def crossed(x):
        cov = torch.cov(x.T)
        return (cov.square().sum() - cov.diagonal().square().sum()) / x.shape[1]

    loss = invariance * F.mse_loss(a, b) + variance * (hinge(a) + hinge(b)) / 2
    return float((loss + covariance * (crossed(a) + crossed(b))).detach())


def test_vicreg_of_two_modalities_is_the_published_loss():
    names = ("text", "video")
    objective, z = made("vicreg", names, expander=[7, 6]), vectors(names)
    e = {name: plain(objective.expanders[name])(z[name] * DIM**0.5) for name in names}
    expected = slow_vicreg(e["text"], e["video"])
    assert float(objective(Embeddings(z)).total.detach()) == pytest.approx(expected, rel=1e-9)


def test_vicreg_of_three_is_the_mean_over_pairs():
    objective, z = made("vicreg", expander=[], invariance=3.0, covariance=2.0), vectors()
    e = {name: x * DIM**0.5 for name, x in z.items()}
    pairs = [("text", "video"), ("text", "audio"), ("video", "audio")]
    expected = sum(slow_vicreg(e[m], e[n], 3.0, 25.0, 2.0) for m, n in pairs) / 3
    assert float(objective(Embeddings(z)).total.detach()) == pytest.approx(expected, rel=1e-9)


def test_byol_is_the_published_loss():
    objective, z = made("byol", hidden=8, width=6, predictor_hidden=7), vectors()
    q = {name: plain(objective.projectors[name])(z[name]) for name in NAMES}
    p = {name: plain(objective.predictors[name])(q[name]) for name in NAMES}

    def distance(a, b):
        return (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square().sum(-1).mean()

    pairs = [("text", "video"), ("text", "audio"), ("video", "audio")]
    expected = sum(distance(p[m], q[n]) + distance(p[n], q[m]) for m, n in pairs) / 3  # targets start as the projectors
    assert float(objective(Embeddings(z)).total.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)


def test_byols_targets_follow_the_projectors_and_nothing_else_moves_them():
    objective = made("byol", hidden=8, width=6, predictor_hidden=7, momentum=0.9)
    before = copy.deepcopy(objective.targets.state_dict())
    assert not any("targets" in name for name, _ in objective.named_parameters())
    for parameter in objective.parameters():
        parameter.data += 1.0
    progress = 0.25
    objective.after_step(progress)
    momentum = 1 - 0.1 * (math.cos(math.pi * progress) + 1) / 2
    for name, value in objective.targets.state_dict().items():
        online = objective.projectors.state_dict()[name]
        torch.testing.assert_close(value, momentum * before[name] + (1 - momentum) * online)
    objective.after_step(1.0)  # at the end they stand still
    still = objective.targets.state_dict()
    objective.after_step(1.0)
    assert all(torch.equal(value, still[name]) for name, value in objective.targets.state_dict().items())


def test_simsiam_is_the_published_loss_with_its_stop_gradient():
    objective, z = made("simsiam", hidden=8, width=6, predictor_hidden=7), vectors()
    leaves = {name: x.clone().requires_grad_() for name, x in z.items()}
    others = {name: x.clone().requires_grad_() for name, x in z.items()}
    q = {name: plain(objective.projectors[name])(others[name]) for name in NAMES}
    p = {name: plain(objective.predictors[name])(q[name]) for name in NAMES}
    pairs = [("text", "video"), ("text", "audio"), ("video", "audio")]

    def similarity(a, b):
        return F.cosine_similarity(a, b.detach(), dim=-1).mean()

    expected = sum(-(similarity(p[m], q[n]) + similarity(p[n], q[m])) / 2 for m, n in pairs) / 3
    loss = objective(Embeddings(leaves)).total
    loss.backward(), expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    for name in NAMES:
        torch.testing.assert_close(leaves[name].grad, others[name].grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("vicreg", {"variance": -1.0}, "variance=-1.0 is negative"),
        ("vicreg", {"invariance": 0.0, "variance": 0.0, "covariance": 0.0}, "switch every term off"),
        ("vicreg", {"expander": [0]}, "width below 1"),
        ("byol", {"momentum": 1.5}, "momentum=1.5"),
        ("simsiam", {"width": 0}, "width=0"),
    ],
)
def test_options_are_checked(name, options, message):
    with pytest.raises(InputError, match=message):
        build(name, **options)
