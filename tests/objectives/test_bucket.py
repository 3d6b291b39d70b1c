"""The bucket loss against eq. 4 as a double loop."""

import pytest
import torch
from torch.nn import functional as F

from trivium.datasets.registry import InputError
from trivium.objectives import Embeddings, build

BUCKET = torch.tensor([7, 2, 7, 9, 2, 7])
EVERYONE = torch.ones(6, dtype=torch.bool)


def vectors(names=("text", "video")):
    generator = torch.Generator().manual_seed(0)
    return {name: F.normalize(torch.randn(6, 4, generator=generator, dtype=torch.float64), dim=-1) for name in names}


def slow(t, v, bucket, lambda_neg=1.0, lambda_pos=1.0, alpha=2.0, by_negatives=False, has_t=EVERYONE, has_v=EVERYONE):
    texts, videos = [i for i in range(len(t)) if has_t[i]], [j for j in range(len(v)) if has_v[j]]
    negative = positive = 0.0
    counted = 0
    for i in texts:
        inside = [j for j in videos if bucket[j] == bucket[i]]
        outside = [j for j in videos if bucket[j] != bucket[i]]
        similarity = {j: ((t[i] * v[j]).sum() + 1) / 2 for j in videos}
        if inside:
            counted += 1
            negative += sum(similarity[j] for j in outside) / (len(outside) if by_negatives else len(inside))
            positive += sum((alpha if i == j else 1.0) * similarity[j] for j in inside) / len(inside)
    return lambda_neg / counted * negative - lambda_pos / counted * positive + lambda_pos * alpha / len(texts)


def compare(expected_of, objective, names=("text", "video"), valid=None):
    """Loss and gradients."""
    ours, theirs = ({name: x.requires_grad_() for name, x in vectors(names).items()} for _ in range(2))
    got, expected = objective(Embeddings(ours, valid, bucket=BUCKET)).total, expected_of(theirs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    found, wanted = (torch.autograd.grad(a, list(b.values())) for a, b in ((got, ours), (expected, theirs)))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"lambda_neg": 0.3, "lambda_pos": 2.0, "alpha": 5.0}])
@pytest.mark.parametrize("normalise", ["bucket", "negatives"])
def test_equals_the_printed_equation(options, normalise):
    objective, by_negatives = build("bucket", normalise=normalise, **options), normalise == "negatives"
    compare(lambda z: slow(z["text"], z["video"], BUCKET, by_negatives=by_negatives, **options), objective)


def test_more_modalities_are_averaged():
    def expected(z):
        return (slow(z["video"], z["text"], BUCKET) + slow(z["video"], z["audio"], BUCKET)) / 2

    compare(expected, build("bucket", anchor="video"), ("text", "video", "audio"))


@pytest.mark.parametrize("normalise", ["bucket", "negatives"])
def test_sums_and_sizes_take_the_samples_that_there_are(normalise):
    """Bucket 9 has no video left, and a text of bucket 7 has lost its partner."""
    valid = {"text": torch.arange(6) != 1, "video": (torch.arange(6) != 0) & (torch.arange(6) != 3)}
    options = {"by_negatives": normalise == "negatives", "has_t": valid["text"], "has_v": valid["video"]}
    compare(lambda z: slow(z["text"], z["video"], BUCKET, **options), build("bucket", normalise=normalise), valid=valid)


def test_buckets_of_one_leave_one_positive_a_sample():
    z = vectors()
    loss = build("bucket", lambda_neg=0.0)(Embeddings(z, bucket=torch.arange(6))).total
    matched = ((z["text"] * z["video"]).sum(-1) + 1) / 2
    assert float(loss) == pytest.approx(float(2 / 6 - 2 * matched.mean()), rel=1e-12)


def test_members_of_a_bucket_attract_and_others_repel():
    z = {name: x.clone().requires_grad_() for name, x in vectors().items()}
    build("bucket")(Embeddings(z, bucket=BUCKET)).total.backward()
    together = sum(z["video"].detach()[j] for j in (2, 5)) + 2 * z["video"].detach()[0]
    apart = sum(z["video"].detach()[j] for j in (1, 3, 4))
    torch.testing.assert_close(z["text"].grad[0], (apart - together) / (2 * 3 * 6))


def test_without_buckets_it_says_what_to_do():
    with pytest.raises(InputError, match="give every sample's json a `bucket`"):
        build("bucket")(Embeddings(vectors()))
    with pytest.raises(InputError, match="alpha=-1"):
        build("bucket", alpha=-1.0)
