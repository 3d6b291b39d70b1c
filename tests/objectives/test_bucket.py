"""The bucket loss against eq. 4 as a double loop."""

import pytest
import torch
from torch.nn import functional as F

from trivium.datasets.registry import InputError
from trivium.objectives import Embeddings, build

BUCKET = torch.tensor([7, 2, 7, 9, 2, 7])


def vectors(names=("text", "video")):
    generator = torch.Generator().manual_seed(0)
    return {name: F.normalize(torch.randn(6, 4, generator=generator, dtype=torch.float64), dim=-1) for name in names}


def slow(t, v, bucket, lambda_neg=1.0, lambda_pos=1.0, alpha=2.0, by_negatives=False) -> float:
    n = len(t)
    negative = positive = 0.0
    for i in range(n):
        inside = [j for j in range(n) if bucket[j] == bucket[i]]
        outside = [j for j in range(n) if bucket[j] != bucket[i]]
        similarity = [(float(t[i] @ v[j]) + 1) / 2 for j in range(n)]
        negative += sum(similarity[j] for j in outside) / (len(outside) if by_negatives else len(inside))
        positive += sum((alpha if i == j else 1.0) * similarity[j] for j in inside) / len(inside)
    return lambda_neg / n * negative + lambda_pos / n * (alpha - positive)


@pytest.mark.parametrize("options", [{}, {"lambda_neg": 0.3, "lambda_pos": 2.0, "alpha": 5.0}])
@pytest.mark.parametrize("normalise", ["bucket", "negatives"])
def test_equals_the_printed_equation(options, normalise):
    z = vectors()
    loss = build("bucket", normalise=normalise, **options)(Embeddings(z, bucket=BUCKET)).total
    expected = slow(z["text"], z["video"], BUCKET, by_negatives=normalise == "negatives", **options)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_more_modalities_are_averaged():
    z = vectors(("text", "video", "audio"))
    loss = build("bucket", anchor="video")(Embeddings(z, bucket=BUCKET)).total
    expected = (slow(z["video"], z["text"], BUCKET) + slow(z["video"], z["audio"], BUCKET)) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-12)


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
