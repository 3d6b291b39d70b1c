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
PAIRS = [("text", "video"), ("text", "audio"), ("video", "audio")]
EVERYONE = torch.ones(N, dtype=torch.bool)
PARTIAL = {"text": torch.arange(N) != 2, "video": torch.arange(N) % 4 != 1, "audio": torch.arange(N) < 7}


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
        layer = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None).double()
        layer.load_state_dict(linear.state_dict())
        layers.append(layer)
        if index < len(head.norms):
            norm = nn.BatchNorm1d(linear.out_features)
            norm.weight.data, norm.bias.data = head.norms[index].weight.data, head.norms[index].bias.data
            layers += [norm, nn.ReLU()]
    if head.last_norm:
        layers.append(nn.BatchNorm1d(head.linears[-1].out_features, affine=False))
    return nn.Sequential(*layers).double().train()


def weights(head: Head | nn.Sequential) -> list[nn.Parameter]:
    """The same order for a head and its plain form."""
    layers = [module for module in head.modules() if not list(module.children())]
    return [p for layer in sorted(layers, key=lambda x: not isinstance(x, nn.Linear)) for p in layer.parameters()]


def compare(objective, expected_of, heads, valid=None):
    """Loss and gradients of vectors and weights. `heads`: collections of the objective's, by attribute; the reference
    is a function of the vectors and of their plain forms."""
    ours, theirs = ({name: x.requires_grad_() for name, x in vectors().items()} for _ in range(2))
    plains = [{name: plain(head) for name, head in getattr(objective, kind).items()} for kind in heads]
    got, expected = objective(Embeddings(ours, valid)).total, expected_of(theirs, *plains)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
    learnt = [p for kind in heads for head in getattr(objective, kind).values() for p in weights(head)]
    copies = [p for forms in plains for form in forms.values() for p in weights(form)]
    found = torch.autograd.grad(got, [*ours.values(), *learnt])
    wanted = torch.autograd.grad(expected, [*theirs.values(), *copies])
    assert len(learnt) == len(list(objective.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


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


def slow_vicreg(a, b, invariance=25.0, variance=25.0, covariance=1.0, rows_a=EVERYONE, rows_b=EVERYONE):
    def hinge(x):
        return torch.relu(1 - torch.sqrt(x.var(dim=0) + 1e-4)).mean()

    def crossed(x):
        cov = torch.cov(x.T)
        return (cov.square().sum() - cov.diagonal().square().sum()) / x.shape[1]

    both = rows_a & rows_b
    loss = invariance * F.mse_loss(a[both], b[both])
    a, b = a[rows_a], b[rows_b]
    return loss + variance * (hinge(a) + hinge(b)) / 2 + covariance * (crossed(a) + crossed(b))


@pytest.mark.parametrize("valid", [dict.fromkeys(NAMES, EVERYONE), PARTIAL])
@pytest.mark.parametrize("factors", [(25.0, 25.0, 1.0), (3.0, 25.0, 2.0)])
def test_vicreg_is_the_mean_of_the_published_loss_over_pairs(valid, factors):
    options = dict(zip(("invariance", "variance", "covariance"), factors, strict=True))

    def mean(z, expanders):
        e = {name: z[name] * DIM**0.5 for name in NAMES}
        for name in expanders:  # batch norm sees the rows that are there; zeros elsewhere
            e[name] = torch.zeros(N, 6).double().index_put((valid[name],), expanders[name](e[name][valid[name]]))
        return sum(slow_vicreg(e[m], e[n], *factors, valid[m], valid[n]) for m, n in PAIRS) / 3

    compare(made("vicreg", expander=[7, 6], **options), mean, ["expanders"], valid)
    compare(made("vicreg", expander=[], **options), lambda z, _: mean(z, {}), ["expanders"], valid)


def test_vicreg_of_two_modalities_is_the_published_loss():
    names = ("text", "video")
    objective, z = made("vicreg", names, expander=[]), vectors(names)
    expected = slow_vicreg(z["text"] * DIM**0.5, z["video"] * DIM**0.5)
    torch.testing.assert_close(objective(Embeddings(z)).total, expected)


def cross_predicted(z, projectors, predictors, targets, valid, similarity):
    """Mean over the pairs of the published loss; `targets` gives what is predicted, which carries no gradient."""
    p, q = {}, {}
    for name in NAMES:
        rows = valid[name]
        p[name] = torch.zeros(N, 6).double().index_put((rows,), predictors[name](projectors[name](z[name][rows])))
        q[name] = torch.zeros(N, 6).double().index_put((rows,), targets[name](z[name][rows]).detach())
    both = {(m, n): valid[m] & valid[n] for m, n in PAIRS}
    each = [(p[m][both[m, n]], q[n][both[m, n]], p[n][both[m, n]], q[m][both[m, n]]) for m, n in PAIRS]
    return sum(similarity(a, b) + similarity(c, d) for a, b, c, d in each) / 3


@pytest.mark.parametrize("valid", [dict.fromkeys(NAMES, EVERYONE), PARTIAL])
def test_byol_is_the_published_loss_with_its_stop_gradient(valid):
    objective = made("byol", hidden=8, width=6, predictor_hidden=7)
    for buffer in objective.targets.buffers():  # as after some steps: no copy of the projectors any more
        buffer += torch.rand(buffer.shape, generator=torch.Generator().manual_seed(1)).double()

    def distance(a, b):
        return (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square().sum(-1).mean()

    def expected(z, projectors, predictors):
        targets = {name: plain(head) for name, head in objective.targets.items()}
        return cross_predicted(z, projectors, predictors, targets, valid, distance)

    compare(objective, expected, ["projectors", "predictors"], valid)


@pytest.mark.parametrize("valid", [dict.fromkeys(NAMES, EVERYONE), PARTIAL])
def test_simsiam_is_the_published_loss_with_its_stop_gradient(valid):
    def similarity(a, b):
        return -F.cosine_similarity(a, b, dim=-1).mean() / 2

    def expected(z, projectors, predictors):
        return cross_predicted(z, projectors, predictors, projectors, valid, similarity)

    objective = made("simsiam", hidden=8, width=6, predictor_hidden=7)
    compare(objective, expected, ["projectors", "predictors"], valid)


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
