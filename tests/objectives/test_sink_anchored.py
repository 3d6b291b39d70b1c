"""Multi-SK against the published pseudo-code with all its channels; the loss against a loop; the queue."""

from itertools import product

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


def slow_loss(objective, z, features, before_queue, after_queue, logit="linear", weight=lambda n, m: 1.0) -> float:
    """Sum over all ordered pairs, written as in the released code: two swapped predictions each."""

    def cost(p, q):
        scaled = p / 0.1
        logits = scaled.exp() if logit == "exp" else scaled
        return (q * torch.log1p((-logits).exp()) + (1 - q) * (torch.log1p((-logits).exp()) + logits)).mean()

    def assigned(queue, own, anchors):
        scores = torch.cat([queue, own]) @ anchors.T
        return stretched(published(scores, WEIGHTS["damped"]))[-len(own) :]

    total = 0.0
    x = {name: F.normalize(f, dim=-1) for name, f in features.items()}
    inside = {m: F.normalize(objective.before[m].weight, dim=-1) for m in NAMES}
    outside = {m: F.normalize(objective.after[m].weight, dim=-1) for m in NAMES}
    for n, m in product(NAMES, NAMES):
        q_before = assigned(before_queue[m], x[m], inside[m])
        q_after = assigned(after_queue[n], z[n], outside[m])
        total += weight(n, m) * float(cost(x[m] @ inside[m].T, q_after) + cost(z[n] @ outside[m].T, q_before))
    return total


NOTHING = {name: torch.zeros(0, DIM, dtype=torch.float64) for name in NAMES}
NO_FEATURES = {name: torch.zeros(0, DIM + 1, dtype=torch.float64) for name in NAMES}


@pytest.mark.parametrize("logit", ["linear", "exp"])
def test_the_loss_equals_the_loop(logit):
    z, features = vectors()
    objective = made(logit=logit)
    loss = objective(Embeddings(z, features=features)).total
    with torch.no_grad():
        expected = slow_loss(objective, z, features, NO_FEATURES, NOTHING, logit)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-8)


def test_weights_and_the_two_kinds_of_terms():
    z, features = vectors()
    objective = made(cross_modal=0.5, modality_specific=2.0, weights={"text-video": 0.1, "video-video": 3.0})
    factors = {("text", "text"): 2.0, ("video", "video"): 6.0, ("text", "video"): 0.05, ("video", "text"): 0.05}
    with torch.no_grad():
        expected = slow_loss(objective, z, features, NO_FEATURES, NOTHING, weight=lambda n, m: factors[n, m])
    loss = objective(Embeddings(z, features=features))
    assert float(loss.total.detach()) == pytest.approx(expected, rel=1e-8)
    assert set(loss.terms) == {"text-text", "text-video", "video-text", "video-video"}


def test_the_queue_keeps_the_newest_samples_and_balances_with_them():
    objective, steps = made(queue=12), [vectors(seed) for seed in (1, 2, 3)]
    for z, features in steps[:2]:
        objective(Embeddings(z, features=features))
        assert objective.before["text"].valid.sum() in (0, 8)  # targets come before the step's own samples enter
        objective.after_step(0.5)
    queued = {name: torch.cat([z[name] for z, _ in steps[:2]])[-12:] for name in NAMES}
    features_of = {name: torch.cat([F.normalize(f[name], dim=-1) for _, f in steps[:2]])[-12:] for name in NAMES}
    for name in NAMES:
        torch.testing.assert_close(objective.after[name].samples, queued[name])
        torch.testing.assert_close(objective.before[name].samples, features_of[name])
    z, features = steps[2]
    with torch.no_grad():
        expected = slow_loss(objective, z, features, features_of, queued)
    assert float(objective(Embeddings(z, features=features)).total.detach()) == pytest.approx(expected, rel=1e-8)


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
