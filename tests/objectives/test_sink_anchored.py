"""Multi-SK against the published pseudo-code with all its channels; the loss against a loop; the queue."""

from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from trivium.datasets.registry import InputError
from trivium.objectives import Embeddings, build
from trivium.objectives.sink_anchored import assignments, channel_weights, multi_sinkhorn_knopp

NAMES, N, DIM, K, CHOSEN = ("text", "video"), 8, 5, 6, 3


def published(scores, weights, epsilon=0.07, iterations=20):
    """Supplement, section 3, on the full (channels, samples, anchors) tensor."""
    q = torch.exp(weights[:, None, None] * scores / epsilon)
    q = q / q.sum()
    k, n, _ = q.shape
    for _ in range(iterations):
        q = q / q.sum(dim=2, keepdim=True)
        q = q * (n / k) / q.sum(dim=1, keepdim=True)
        q = q / q.sum(dim=0, keepdim=True)
    return q / q.sum(dim=2, keepdim=True)


def stretched(q):
    total = q[:CHOSEN].sum(0)
    low, high = total.amin(1, keepdim=True), total.amax(1, keepdim=True)
    return (total - low) / (high - low)


WEIGHTS = {
    "damped": torch.tensor([1.0] * CHOSEN + [0.25] * (K - CHOSEN), dtype=torch.float64),
    "graded": torch.tensor([0.1 + 0.9 * (1 - c / K) for c in range(K)], dtype=torch.float64),
}


def random_scores(n=N):
    return torch.rand(n, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("design", WEIGHTS)
def test_assignments_equal_those_of_the_published_pseudo_code(design):
    scores, channels = random_scores(), channel_weights(design, K, CHOSEN, 0.25, 0.1)
    shares = multi_sinkhorn_knopp(scores, torch.ones(N, dtype=torch.bool), channels, epsilon=0.07, iterations=20)
    expected = published(scores, WEIGHTS[design])
    copies = torch.cat([shares[g : g + 1].expand(count, -1, -1) for g, (_, count, _) in enumerate(channels)])
    torch.testing.assert_close(copies, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(assignments(shares, channels), stretched(expected), rtol=1e-9, atol=1e-12)


def test_the_limit_is_balanced_every_way():
    channels = channel_weights("graded", K, CHOSEN, 0.25, 0.1)
    q = multi_sinkhorn_knopp(random_scores(), torch.ones(N, dtype=torch.bool), channels, epsilon=0.5, iterations=5000)
    ones = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(q.sum(2), ones.expand(K, N))  # a channel gives each sample one anchor's worth
    torch.testing.assert_close(q.sum(1), (ones * N / K).expand(K, K))  # anchors are used alike
    torch.testing.assert_close(q.sum(0), ones.expand(N, K))  # no anchor twice for a sample


def test_absent_samples_take_no_share():
    scores, valid = random_scores(), torch.arange(N) % 3 != 1
    channels = channel_weights("damped", K, CHOSEN, 0.25, 0.1)
    options = {"epsilon": 0.07, "iterations": 20}
    all_of_them = multi_sinkhorn_knopp(scores, valid, channels, **options)
    without = multi_sinkhorn_knopp(scores[valid], torch.ones(int(valid.sum()), dtype=torch.bool), channels, **options)
    torch.testing.assert_close(all_of_them[:, valid], without)
    assert all_of_them[:, ~valid].eq(0).all()


def vectors(seed=0, n=N):
    generator = torch.Generator().manual_seed(seed)
    z = {name: F.normalize(torch.randn(n, DIM, generator=generator, dtype=torch.float64), dim=-1) for name in NAMES}
    features = {name: torch.randn(n, DIM + 1, generator=generator, dtype=torch.float64) for name in NAMES}
    return z, features


def made(**options):
    torch.manual_seed(0)
    objective = build("sink_anchored", **({"anchors": K, "chosen": CHOSEN, "queue": 0} | options))
    objective.setup(NAMES, DIM, dict.fromkeys(NAMES, DIM + 1))
    return objective.double()


def slow_loss(
    objective,
    z,
    features,
    before_queue,
    after_queue,
    *,
    design="damped",
    logit="linear",
    weight=lambda n, m: 1.0,
    valid=None,
):
    """Sum over all ordered pairs, written as in the released code: two swapped predictions each, of constants."""
    valid = valid or dict.fromkeys(NAMES, torch.ones(N, dtype=torch.bool))

    def cost(p, q):
        scaled = p / 0.1
        logits = scaled.exp() if logit == "exp" else scaled
        return (q * torch.log1p((-logits).exp()) + (1 - q) * (torch.log1p((-logits).exp()) + logits)).mean()

    def assigned(queue, own, anchors, there):
        scores = torch.cat([queue, own[there]]) @ anchors.T
        rows = stretched(published(scores, WEIGHTS[design]))[len(queue) :]
        return torch.full((N, K), torch.nan, dtype=torch.float64).index_put((there,), rows).detach()

    total = 0.0
    x = {name: F.normalize(f, dim=-1) for name, f in features.items()}
    inside = {m: F.normalize(objective.before[m].weight, dim=-1) for m in NAMES}
    outside = {m: F.normalize(objective.after[m].weight, dim=-1) for m in NAMES}
    for n, m in product(NAMES, NAMES):
        q_before = assigned(before_queue[m], x[m], inside[m], valid[m])
        q_after = assigned(after_queue[n], z[n], outside[m], valid[n])
        both = valid[m] & valid[n]
        there, back = cost((x[m] @ inside[m].T)[both], q_after[both]), cost((z[n] @ outside[m].T)[both], q_before[both])
        total = total + weight(n, m) * (there + back)
    return total


def compare(objective, before_queue, after_queue, seed=0, valid=None, **options):
    """Loss and gradients of vectors, features and anchors."""
    ours, theirs = ([{k: x.requires_grad_() for k, x in part.items()} for part in vectors(seed)] for _ in range(2))
    got = objective(Embeddings(ours[0], valid, features=ours[1]))
    expected = slow_loss(objective, *theirs, before_queue, after_queue, valid=valid, **options)
    torch.testing.assert_close(got.total, expected, rtol=1e-9, atol=0)
    anchors = list(objective.parameters())
    found = torch.autograd.grad(got.total, [*ours[0].values(), *ours[1].values(), *anchors])
    wanted = torch.autograd.grad(expected, [*theirs[0].values(), *theirs[1].values(), *anchors])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    return got


NOTHING = {name: torch.zeros(0, DIM, dtype=torch.float64) for name in NAMES}
NO_FEATURES = {name: torch.zeros(0, DIM + 1, dtype=torch.float64) for name in NAMES}


@pytest.mark.parametrize("design", WEIGHTS)
@pytest.mark.parametrize("logit", ["linear", "exp"])
def test_the_loss_equals_the_loop(design, logit):
    compare(made(design=design, logit=logit), NO_FEATURES, NOTHING, design=design, logit=logit)


def test_assignments_and_means_take_the_samples_that_there_are():
    valid = {"text": torch.arange(N) != 1, "video": torch.arange(N) % 3 != 0}
    compare(made(), NO_FEATURES, NOTHING, valid=valid)


def test_weights_and_the_two_kinds_of_terms():
    objective = made(cross_modal=0.5, modality_specific=2.0, weights={"text-video": 0.1, "video-video": 3.0})
    factors = {("text", "text"): 2.0, ("video", "video"): 6.0, ("text", "video"): 0.05, ("video", "text"): 0.05}
    loss = compare(objective, NO_FEATURES, NOTHING, weight=lambda n, m: factors[n, m])
    assert set(loss.terms) == {"text-text", "text-video", "video-text", "video-video"}


def test_the_queue_keeps_the_newest_samples_and_balances_with_them():
    objective, steps = made(queue=12), [vectors(seed) for seed in (1, 2)]
    for z, features in steps:
        objective(Embeddings(z, features=features))
        assert objective.before["text"].valid.sum() in (0, 8)  # targets come before the step's own samples enter
        objective.after_step(0.5)
    queued = {name: torch.cat([z[name] for z, _ in steps])[-12:] for name in NAMES}
    features_of = {name: torch.cat([F.normalize(f[name], dim=-1) for _, f in steps])[-12:] for name in NAMES}
    for name in NAMES:
        torch.testing.assert_close(objective.after[name].samples, queued[name])
        torch.testing.assert_close(objective.before[name].samples, features_of[name])
    compare(objective, features_of, queued, seed=3)


@pytest.mark.parametrize("design", WEIGHTS)
@pytest.mark.parametrize("epsilon", [0.07, 0.002])
def test_hard_assignments_are_finite_in_float32(design, epsilon):
    """0.002, a default inside the released code: the largest shares are e^1000 times the smallest, some are 0."""
    objective = made(design=design, epsilon=epsilon, anchors=16, chosen=8).float()
    for spread in (0.0, 0.1, 10.0):  # all samples equal, in a cone, all over
        z = {name: F.normalize(1 + spread * x.repeat(32, 1).float(), dim=-1) for name, x in vectors()[0].items()}
        features = {name: x.repeat(1, 2)[:, : DIM + 1].requires_grad_() for name, x in z.items()}
        loss = objective(Embeddings(z, features=features)).total
        found = torch.autograd.grad(loss, [*features.values(), *objective.parameters()])
        assert all(x.isfinite().all() for x in (loss, *found)), spread


def peak_of_the_paper() -> float:
    """MiB above the level before of the forward at the paper's size."""
    dim, names = 64, ("text", "video", "audio")
    options = {"anchors": 64, "chosen": 32, "design": "graded", "iterations": 2}  # memory does not grow with them
    objective = build("sink_anchored", queue=5500, **options)
    objective.setup(names, dim, dict.fromkeys(names, dim))

    def step(n):
        z = {name: F.normalize(torch.randn(n, dim), dim=-1) for name in names}
        objective(Embeddings(z, features=z))

    step(8)  # what libraries set aside once
    earlier = (torch.randn(5500, dim), torch.randn(5500, dim), torch.ones(5500, dtype=torch.bool))
    objective._pending = dict.fromkeys(names, earlier)
    objective.after_step(0.5)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    step(2160)
    return (resident("VmHWM") - before) / 1024


def resident(field: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


@pytest.mark.slow
@pytest.mark.two_process
def test_one_set_of_assignments_is_in_memory_at_a_time(ranks):
    """The channels of one are 64 x 7660 x 64 numbers, 120 MiB; of the 12 of three modalities, 1.4 GiB."""
    peak = ranks(1, peak_of_the_paper)[0]
    assert 100 < peak < 500


def two_steps(rank: int, world: int):
    """Loss and anchor gradients of the second step, with the first in the queue, and the queue."""
    objective, own = made(queue=11), slice(rank * N // world, (rank + 1) * N // world)
    for seed in (1, 2):
        objective.zero_grad()
        z, features = ({name: x[own] for name, x in part.items()} for part in vectors(seed))
        loss = objective(Embeddings(z, features=features)).total
        loss.backward()
        queue = objective.after["text"].samples.clone()
        objective.after_step(0.5)
    return loss.detach(), {name: p.grad for name, p in objective.named_parameters()}, queue


def two_steps_on_a_rank(_):
    dist.init_process_group("gloo")
    return two_steps(dist.get_rank(), dist.get_world_size())


@pytest.mark.two_process
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_balance_together_with_the_queue(ranks, world):
    loss, gradients, queue = two_steps(0, 1)
    answers = ranks(world, two_steps_on_a_rank, 0)
    torch.testing.assert_close(sum(answer[0] for answer in answers) / world, loss, rtol=1e-11, atol=0)
    for name, gradient in gradients.items():
        mean = sum(answer[1][name] for answer in answers) / world
        torch.testing.assert_close(mean, gradient, rtol=1e-9, atol=1e-12)
    for answer in answers:
        torch.testing.assert_close(answer[2], queue)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"chosen": 6}, "chosen=6 is no part of anchors=6"),
        ({"epsilon": 0.0}, "epsilon=0.0 is not positive"),
        ({"damping": 2.0}, "damping=2.0 is outside"),
        ({"queue": -1}, "queue=-1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        made(**options)


def test_weights_name_pairs():
    with pytest.raises(InputError, match="text-vidio"):
        made(weights={"text-vidio": 1.0}).check(NAMES)
