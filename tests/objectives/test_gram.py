"""Volumes against torch.linalg.det, and the loss against a double loop over them."""

import math

import pytest
import torch
from torch.nn import functional as F

from trivium.datasets.registry import InputError
from trivium.objectives import Embeddings, build
from trivium.objectives.gram import gram_volume, volume_scores

NAMES = ("text", "video", "audio", "depth", "subtitle", "speech")


def raw(names, n=5, dim=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, dim, generator=generator, dtype=dtype).requires_grad_() for name in names}


def unit(vectors):
    return {name: F.normalize(x, dim=-1) for name, x in vectors.items()}


def objective(**options):
    return build("gram", **options).double()


def volume(*vectors):
    stacked = torch.stack(vectors)
    return torch.linalg.det(stacked @ stacked.T).sqrt()


def slow(z, tau, anchor, others, smoothing=0.1, valid=None, stop=()):
    """Sample by sample. `stop`: (modalities held constant in anchor -> tuple, those in tuple -> anchor)."""
    n = len(z[anchor])
    valid = valid or {name: [True] * n for name in z}
    whole = [all(valid[name][j] for name in others) for j in range(n)]
    both = [i for i in range(n) if valid[anchor][i] and whole[i]]
    halves = []
    for half in range(2):
        held = stop[half] if stop else ()
        x = {name: value.detach() if name in held else value for name, value in z.items()}
        losses = []
        for i in both:
            if half == 0:
                candidates = [j for j in range(n) if whole[j]]
                scores = [-volume(x[anchor][i], *(x[name][j] for name in others)) / tau for j in candidates]
            else:
                candidates = [j for j in range(n) if valid[anchor][j]]
                scores = [-volume(x[anchor][j], *(x[name][i] for name in others)) / tau for j in candidates]
            target = torch.tensor(candidates.index(i))
            losses.append(F.cross_entropy(torch.stack(scores).view(-1), target, label_smoothing=smoothing))
        halves.append(sum(losses) / max(len(losses), 1))
    return (halves[0] + halves[1]) / 2


def compare(objective, names, valid=None, **options):
    ours, theirs = raw(names), raw(names)
    anchor = objective.anchor or names[0]
    tau = objective.temperature.log_scale.detach().neg().exp().requires_grad_()
    got = objective(Embeddings(unit(ours), valid)).total
    expected = slow(unit(theirs), tau, anchor, [name for name in names if name != anchor], valid=valid, **options)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    gradients = torch.autograd.grad(got, [*ours.values(), objective.temperature.log_scale])
    wanted = torch.autograd.grad(expected, [*theirs.values(), tau])
    for a, b in zip(gradients[:-1], wanted[:-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gradients[-1], -tau.detach() * wanted[-1], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("tile", [2, 2048])
def test_any_number_of_modalities(count, tile):
    compare(objective(tile=tile), NAMES[:count])


def test_anchor_and_label_smoothing():
    compare(objective(anchor="audio"), NAMES[:3])
    compare(objective(label_smoothing=0.0, tile=3), NAMES[:3], smoothing=0.0)


def test_missing_modalities_are_masked_exactly():
    valid = {name: torch.ones(5, dtype=torch.bool) for name in NAMES[:3]}
    valid["text"][0] = valid["audio"][3] = valid["video"][3] = False
    compare(objective(tile=3), NAMES[:3], valid=valid)


def test_nobody_complete_gives_zero():
    valid = {name: torch.ones(5, dtype=torch.bool) for name in NAMES[:3]}
    valid["audio"][:] = False
    vectors = raw(NAMES[:3])
    loss = objective()(Embeddings(unit(vectors), valid))
    loss.total.backward()
    assert loss.total == 0 and all(x.grad.eq(0).all() for x in vectors.values())


def test_compat_gives_the_gradients_of_the_released_code():
    """Anchors are constant where tuples look for them, tuples where anchors look for them."""
    names = NAMES[:3]
    stop = (("video", "audio"), ("text",))
    compare(objective(compat="gram", tile=2), names, stop=stop)


def test_compat_has_the_same_value_but_not_the_same_gradient():
    vectors = raw(NAMES[:3])
    full, released = (objective(compat=c)(Embeddings(unit(vectors))).total for c in (None, "gram"))
    torch.testing.assert_close(full, released)
    a, b = (torch.autograd.grad(loss, vectors["text"])[0] for loss in (full, released))
    assert (a - b).norm() > 0.1 * a.norm()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_matched_volume_and_its_gradient(count):
    x = torch.randn(4, 3, count, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    x.requires_grad_()
    got, expected = gram_volume(x.unbind(-2)), torch.linalg.det(x @ x.mT).sqrt()
    assert got.shape == (4, 3)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    a, b = torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0]
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_volume_of_every_anchor_with_every_tuple(count):
    z = unit(raw(NAMES[:count]))
    anchor, *others = z.values()
    got = volume_scores(anchor[:3], others)
    expected = [[volume(a, *(x[j] for x in others)) for j in range(5)] for a in anchor[:3]]
    torch.testing.assert_close(got, torch.stack([torch.stack(row) for row in expected]), rtol=1e-9, atol=1e-12)


def test_volume_in_closed_form():
    x = torch.eye(4)[None]
    torch.testing.assert_close(gram_volume(x.unbind(-2)), torch.ones(1))
    torch.testing.assert_close(gram_volume([x[0, 0], x[0, 0], x[0, 1]]), torch.tensor(0.0), atol=1e-6, rtol=0)
    half = torch.tensor([0.5, math.sqrt(0.75), 0, 0])
    torch.testing.assert_close(gram_volume([x[0, 0], half]), torch.tensor(math.sin(math.pi / 3)))


@pytest.mark.parametrize("count", [3, 4, 5])
@pytest.mark.parametrize("spread, matched, crossed", [(1.0, 1e-6, 1e-6), (0.1, 1e-6, 1e-4), (0.01, 1e-6, 5e-3)])
def test_nothing_cancels_where_the_vectors_agree(count, spread, matched, crossed):
    """float32 against the product of singular values in float64; the volumes reach 1e-8."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 1, 256, generator=generator, dtype=torch.float64)
    x = F.normalize(x + spread * torch.randn(200, count, 256, generator=generator, dtype=torch.float64), dim=-1).float()
    exact = torch.linalg.svdvals(x.double()).prod(-1)
    errors = (gram_volume(x.unbind(-2)).double() - exact).abs() / exact
    assert errors.median() < matched
    crossing = volume_scores(x[:, 0], list(x[:, 1:].unbind(1))).diagonal().double()
    assert ((crossing - exact).abs() / exact).median() < crossed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_gradient_is_finite_and_small_at_volume_zero(count, dtype):
    """All equal; and, for three or more, dependent but spread out."""
    x = F.normalize(raw(("text",), dtype=dtype)["text"].detach(), dim=-1)
    flat = {name: F.normalize(x + k * x.roll(1, 0), dim=-1) for k, name in enumerate(NAMES[:count])}
    for z in ({name: x.clone() for name in NAMES[:count]}, flat):
        leaves = {name: value.requires_grad_() for name, value in z.items()}
        gram_volume(list(leaves.values())).sum().backward()
        build("gram").to(dtype)(Embeddings(leaves)).total.backward()
        for leaf in leaves.values():
            assert leaf.grad.isfinite().all() and leaf.grad.abs().max() < 1e3


def test_parts_and_terms():
    loss = objective()(Embeddings(unit(raw(NAMES[:3]))))
    assert set(loss.parts) == {"text-tuple", "tuple-text", "volume", "temperature"}
    torch.testing.assert_close(sum(loss.terms.values()), loss.total)
    z = unit(raw(NAMES[:3]))
    expected = torch.stack([volume(*(z[name][i] for name in z)) for i in range(5)]).mean()
    torch.testing.assert_close(loss.parts["volume"], expected.detach())


def test_models_that_do_not_fit():
    with pytest.raises(InputError, match="6"):
        objective().check(tuple("abcdefg"))
    with pytest.raises(InputError, match="did you mean 'audio'"):
        objective(anchor="audoi").check(NAMES)
    with pytest.raises(InputError, match="compat"):
        build("gram", compat="vast")


@pytest.mark.parametrize("members", [1, 2, 3, 5])
def test_the_written_out_derivative_passes_gradcheck(members):
    from trivium.objectives.gram import _volumes, anchor_inputs, tuple_inputs

    generator = torch.Generator().manual_seed(members)
    anchor = torch.randn(3, 7, generator=generator, dtype=torch.float64).requires_grad_()
    tuples = torch.randn(4, members, 7, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, t: _volumes(anchor_inputs(a), tuple_inputs(t.unbind(-2))), (anchor, tuples)
    )


@pytest.mark.parametrize("spread, largest", [(0.1, 1e-4), (0.01, 5e-3), (0.003, 5e-2)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_gradient_in_float32_stays_right_where_training_succeeds(spread, largest, label_smoothing):
    """Tuples that lie nearly in a plane: their volume is small though no two of their vectors agree."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(64, 256, generator=generator, dtype=torch.float64)  # noqa: E731
    u, v = draw(), draw()
    flat = {"text": u, "video": v, "audio": u + v + spread * draw()}
    gradients = []
    for dtype in (torch.float64, torch.float32):
        z = {name: F.normalize(x, dim=-1).to(dtype).requires_grad_() for name, x in flat.items()}
        build("gram", label_smoothing=label_smoothing)(Embeddings(z)).total.backward()
        gradients.append(torch.cat([x.grad.double() for x in z.values()]))
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert error < largest, float(error)
