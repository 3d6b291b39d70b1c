"""InfoNCE against a double loop over pairs."""

import math

import pytest
import torch
from torch.nn import functional as F

from trivium.datasets.registry import InputError
from trivium.objectives import Embeddings, build

NAMES = ("text", "video", "audio")


def raw(n=6, dim=5, names=NAMES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, dim, generator=generator, dtype=torch.float64).requires_grad_() for name in names}


def unit(vectors):
    return {name: F.normalize(x, dim=-1) for name, x in vectors.items()}


def slow(z, valid, tau, weights, smoothing=0.0):
    """Eq. 1 sample by sample; weights by ordered pair."""
    total = 0.0
    for (m, n), weight in weights.items():
        losses = []
        candidates = [k for k in range(len(z[n])) if valid[n][k]]
        for i in range(len(z[m])):
            if not (valid[m][i] and valid[n][i]):
                continue
            exps = {k: torch.exp((z[m][i] * z[n][k]).sum() / tau) for k in candidates}
            log_p = {k: torch.log(exps[k] / sum(exps.values())) for k in candidates}
            losses.append(-(1 - smoothing) * log_p[i] - smoothing * sum(log_p.values()) / len(candidates))
        if losses:
            total = total + weight * sum(losses) / len(losses)
    return total / sum(weights.values())


def ordered(names, weight=1.0):
    return {(m, n): weight for m in names for n in names if m != n}


def everyone(n=6, names=NAMES):
    return {name: torch.ones(n, dtype=torch.bool) for name in names}


def compare(objective, valid, expected_of, n=6, names=NAMES):
    ours, theirs = raw(n, names=names), raw(n, names=names)
    tau = objective.temperature.log_scale.detach().neg().exp().requires_grad_()
    got, expected = objective(Embeddings(unit(ours), valid)).total, expected_of(unit(theirs), tau).squeeze()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad(got, [*ours.values(), *objective.parameters()], retain_graph=True)
    wanted = torch.autograd.grad(expected, [*theirs.values(), tau])
    for a, b in zip(gradients, wanted[:-1], strict=False):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    # the parameter is log(1 / tau): d / d log_scale = -tau d / d tau
    torch.testing.assert_close(gradients[-1], -tau.detach() * wanted[-1], rtol=1e-9, atol=1e-12)


def objective(**options):
    return build("infonce", **options).double()


@pytest.mark.parametrize("names", [("text", "video"), NAMES, (*NAMES, "depth")])
@pytest.mark.parametrize("tile", [1, 4, 2048])
def test_all_pairs(names, tile):
    valid = everyone(names=names)
    compare(objective(tile=tile), valid, lambda z, tau: slow(z, valid, tau, ordered(names)), names=names)


def test_weights_and_anchor():
    valid = everyone()
    weights = ordered(("text", "video"), 3.0) | ordered(("text", "audio"), 0.5)
    given = {"text-video": 3.0, "audio-text": 0.5}
    compare(objective(weights=given), valid, lambda z, tau: slow(z, valid, tau, weights))
    anchored = ordered(("video", "text")) | ordered(("video", "audio"))
    compare(objective(anchor="video"), valid, lambda z, tau: slow(z, valid, tau, anchored))


def test_label_smoothing():
    valid = everyone()
    compare(objective(label_smoothing=0.2, tile=4), valid, lambda z, tau: slow(z, valid, tau, ordered(NAMES), 0.2))


def test_missing_modalities_are_masked_exactly():
    valid = everyone()
    valid["text"][1] = valid["video"][1] = valid["audio"][1] = False
    valid["video"][3] = valid["audio"][4] = valid["audio"][0] = False
    for smoothing in (0.0, 0.1):
        compare(
            objective(label_smoothing=smoothing, tile=4),
            valid,
            lambda z, tau, s=smoothing: slow(z, valid, tau, ordered(NAMES), s),
        )


def test_a_pair_that_nobody_has_contributes_nothing():
    valid = everyone()
    valid["audio"][:] = False
    vectors = raw()
    loss = objective()(Embeddings(unit(vectors), valid))
    torch.testing.assert_close(loss.total, slow(unit(vectors), valid, 0.07, ordered(NAMES)), rtol=1e-6, atol=0)
    assert loss.parts["text-audio"] == 0 and loss.parts["audio-video"] == 0
    loss.total.backward()
    assert vectors["audio"].grad.eq(0).all() and vectors["text"].grad.ne(0).any()


def test_agrees_with_clip():
    """Two modalities: torch's cross-entropy of the logits, both ways."""
    z = unit(raw(names=("image", "text")))
    logits = z["image"] @ z["text"].T / 0.07
    target = torch.arange(6)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(objective()(Embeddings(z)).total, expected, rtol=1e-6, atol=0)


def test_perfect_agreement_of_orthogonal_samples():
    z = torch.eye(6, dtype=torch.float64)
    loss = objective()(Embeddings(dict.fromkeys(NAMES, z)))
    expected = math.log(math.exp(1 / 0.07) + 5) - 1 / 0.07
    torch.testing.assert_close(loss.total.item(), expected, rtol=1e-5, atol=0)


def test_no_information_is_log_of_the_batch():
    z = torch.ones(6, 1, dtype=torch.float64)
    loss = objective()(Embeddings(dict.fromkeys(NAMES, z)))
    torch.testing.assert_close(loss.total.item(), math.log(6))


def test_parts_and_terms():
    loss = objective(weights={"text-video": 1.0, "text-audio": 3.0})(Embeddings(unit(raw())))
    assert set(loss.parts) == {"text-video", "video-text", "text-audio", "audio-text", "temperature"}
    assert not any(part.requires_grad for part in loss.parts.values())
    torch.testing.assert_close(sum(loss.terms.values()), loss.total)
    mixed = (loss.parts["text-video"] + loss.parts["video-text"]) / 8
    torch.testing.assert_close(loss.terms["text-video"].detach(), mixed)
    torch.testing.assert_close(loss.parts["temperature"].item(), 0.07, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weights": {"text-vidio": 1.0}}, "did you mean 'text-video'"),
        ({"weights": {"video-audio": 1.0}, "anchor": "text"}, "video-audio"),
        ({"weights": {"text-video": 0.0}}, "not positive"),
        ({"weights": {}}, "empty"),
        ({"weights": {"text-video": 1.0, "video-text": 2.0}}, "twice"),
        ({"anchor": "txt"}, "did you mean 'text'"),
    ],
)
def test_options_that_do_not_fit_the_model(options, message):
    with pytest.raises(InputError, match=message):
        build("infonce", **options).check(NAMES)


def test_options_out_of_range():
    with pytest.raises(InputError, match="label_smoothing"):
        build("infonce", label_smoothing=1.0)
    with pytest.raises(InputError, match="add another"):
        build("infonce").check(("text",))
