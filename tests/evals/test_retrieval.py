"""Ranks and chance levels against loops over numbers; protocol against its own words."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from trivium.datasets.registry import InputError
from trivium.evals import TASKS
from trivium.evals.embeddings import EmbeddingSet
from trivium.evals.retrieval import Retrieval, chance, cosine_score, labels, ranks, summary

NAMES = ("text", "video", "audio")


def make(n: int = 23, *, names=NAMES, bucket=None, missing=(), dim: int = 8, seed: int = 0) -> EmbeddingSet:
    """Random unit vectors around a common centre per item; `missing` holds (modality, item)."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(n, dim, generator=g)
    z = {name: normalize(centre + 1.2 * torch.randn(n, dim, generator=g), dim=1) for name in names}
    valid = {name: torch.ones(n, dtype=torch.bool) for name in names}
    for name, item in missing:
        valid[name][item] = False
        z[name][item] = 0
    keys = tuple(f"clip{i}" for i in range(n))
    return EmbeddingSet(z, valid, keys, tuple((f"caption {i}",) for i in range(n)), bucket)


def expected_rank(scores: list[float], relevant: list[bool]) -> float:
    """The best relevant entry's mean rank over all orders in which tied entries can come, by counting."""
    if not any(relevant):
        return math.inf
    best = max(s for s, r in zip(scores, relevant, strict=True) if r)
    above = sum(s > best for s in scores)
    tied = [r for s, r in zip(scores, relevant, strict=True) if s == best]
    patterns = {
        tuple(i in chosen for i in range(len(tied))) for chosen in itertools.combinations(range(len(tied)), sum(tied))
    }
    return above + sum(pattern.index(True) for pattern in patterns) / len(patterns)  # all are equally likely


def test_ranks_equal_a_loop_with_ties_and_several_relevant_entries():
    g = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 4, (60, 9), generator=g).float()  # few values: ties everywhere
    query, gallery = torch.randint(0, 5, (60,), generator=g), torch.randint(0, 5, (9,), generator=g)
    got = ranks(lambda rows: scores[rows], query, gallery)
    want = [expected_rank(scores[i].tolist(), (gallery == query[i]).tolist()) for i in range(60)]
    assert any(rank % 1 for rank in want if rank < math.inf)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("chunk", [1, 7, 22, 23, 1000])
def test_chunks_do_not_change_the_ranks(chunk):
    z = make().z
    whole = ranks(cosine_score(z["text"], z["video"]), torch.arange(23), torch.arange(23), chunk=23)
    parts = ranks(cosine_score(z["text"], z["video"]), torch.arange(23), torch.arange(23), chunk=chunk)
    assert torch.equal(whole, parts)


def test_a_score_that_is_no_number_is_no_hit_but_an_error():
    scores = torch.tensor([[1.0, 2.0], [0.0, torch.nan]])
    with pytest.raises(ValueError, match="1 scores of queries 0 to 1 are not numbers"):
        ranks(lambda rows: scores[rows], torch.arange(2), torch.arange(2))


def test_several_captions_per_item_in_both_directions():
    item = torch.tensor([0, 0, 1, 1, 1, 2])
    scores = torch.tensor([[9.0, 1, 2], [1, 5, 4], [1, 6, 7], [0, 3, 1], [2, 8, 0], [3, 7, 6]])
    assert ranks(lambda rows: scores[rows], item, torch.arange(3)).tolist() == [0, 2, 1, 0, 0, 1]
    assert ranks(lambda rows: scores.T[rows], torch.arange(3), item).tolist() == [0, 0, 1]


def test_a_collapsed_model_scores_nothing():
    same = torch.ones(40, 4) / 2
    rank = ranks(cosine_score(same, same), torch.arange(40), torch.arange(40))
    assert summary(rank, 40, (1, 5, 10)) == {"R@1": 0, "R@5": 0, "R@10": 0, "MedR": 20.5, "MeanR": 20.5}


def test_summary_counts_unfindable_queries_as_wrong_even_when_k_exceeds_the_gallery():
    rank = torch.tensor([0.0, 0.5, 3.0, 4.0, torch.inf], dtype=torch.float64)
    got = summary(rank, 5, (1, 5, 10))
    assert got == {"R@1": 20, "R@5": 80, "R@10": 80, "MedR": 4, "MeanR": pytest.approx((1 + 1.5 + 4 + 5 + 6) / 5)}
    assert summary(torch.full((3,), torch.inf, dtype=torch.float64), 0, (1,)) == {"R@1": 0, "MedR": 1, "MeanR": 1}


def test_chance_equals_the_share_of_all_orders():
    gallery = torch.tensor([0, 0, 1, 2, 2, 2])
    query = torch.tensor([0, 1, 2, 7])
    for k in range(1, 8):
        hits = [
            any(gallery[i] == q for i in order[:k])
            for q in query.tolist()
            for order in itertools.permutations(range(6))
        ]
        assert chance(query, gallery, k) == pytest.approx(100 * np.mean(hits))


def test_chance_of_one_relevant_entry_is_k_over_n():
    n = torch.arange(1000)
    assert [chance(n, n, k) for k in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])


def volume(*vectors: torch.Tensor) -> float:
    z = torch.stack(vectors).double()
    return torch.linalg.det(z @ z.T).clamp_min(0).sqrt().item()


def brute(embeddings: EmbeddingSet, query: list[str], gallery: list[str], label: list[int], score) -> dict[str, float]:
    """R@1, R@5, R@10, MedR, MeanR by loops over items."""
    n = len(embeddings)
    there = lambda names, i: all(bool(embeddings.valid[name][i]) for name in names)  # noqa: E731
    pool = [j for j in range(n) if there(gallery, j)]
    rank = []
    for i in range(n):
        own = [j for j in pool if label[j] == label[i]]
        if not there(query, i) or not own:
            rank.append(math.inf)
            continue
        best = max(score(i, j) for j in own)
        rank.append(sum(score(i, j) > best for j in pool))
    placed = [min(r, len(pool)) + 1 for r in rank]
    recalls = {f"R@{k}": 100 * sum(r < k for r in rank) / n for k in (1, 5, 10)}
    return recalls | {"MedR": float(np.median(placed)), "MeanR": float(np.mean(placed))}


BUCKET = torch.tensor([i % 6 if i % 7 else -1 for i in range(23)])
MISSING = [("video", 3), ("audio", 3), ("text", 3), ("audio", 5), ("audio", 11), ("text", 20)]


@pytest.mark.parametrize("bucket", [None, BUCKET], ids=["instance", "bucket"])
@pytest.mark.parametrize("missing", [[], MISSING], ids=["whole", "missing"])
def test_every_row_equals_a_loop_over_items(bucket, missing):
    embeddings = make(bucket=bucket, missing=missing)
    label = [100 + i if bucket is None or bucket[i] < 0 else int(bucket[i]) for i in range(23)]
    z = {name: x.double() for name, x in embeddings.z.items()}
    result = Retrieval().run(embeddings)
    expected = {}
    for a, b in itertools.permutations(NAMES, 2):
        row = brute(embeddings, [a], [b], label, lambda i, j, a=a, b=b: float(z[a][i] @ z[b][j]))
        expected |= {f"{a}->{b}/cosine/{key}": value for key, value in row.items()}
    forward = brute(
        embeddings,
        ["text"],
        ["video", "audio"],
        label,
        lambda i, j: -volume(z["text"][i], z["video"][j], z["audio"][j]),
    )
    backward = brute(
        embeddings,
        ["video", "audio"],
        ["text"],
        label,
        lambda i, j: -volume(z["text"][j], z["video"][i], z["audio"][i]),
    )
    expected |= {f"text->video+audio/volume/{key}": value for key, value in forward.items()}
    expected |= {f"video+audio->text/volume/{key}": value for key, value in backward.items()}
    assert result.metrics == pytest.approx(expected)


def test_counts_and_chance_stand_beside_every_row():
    embeddings = make(missing=MISSING)
    protocol = Retrieval().run(embeddings).protocol
    assert protocol["relevance"] == "instance"
    row = protocol["rows"]["text->audio/cosine"]
    # 3 has neither, 5 and 11 no audio, 20 no text: 19 of 23 can be found
    assert (row["n_query"], row["n_gallery"], row["n_missing"]) == (23, 20, 4)
    assert row["chance"]["R@5"] == pytest.approx(100 * 19 / 23 * 5 / 20)
    assert set(protocol["rows"]) == {key.rsplit("/", 1)[0] for key in Retrieval().run(embeddings).metrics}


def test_bucket_relevance_lets_another_item_stand_in_for_a_missing_one():
    embeddings = make(6, bucket=torch.tensor([0, 0, 1, 1, 2, -1]), missing=[("video", 0), ("video", 4), ("video", 5)])
    row = Retrieval(volume=False).run(embeddings).protocol["rows"]["text->video/cosine"]
    assert row["n_missing"] == 2
    # 0 and 1: one entry of 3, 2 and 3: two entries of 3, 4 and 5: none
    assert row["chance"]["R@1"] == pytest.approx(100 * (2 * 1 / 3 + 2 * 2 / 3) / 6)


def test_labels_of_unknown_buckets_differ_from_all_others():
    label = labels(make(bucket=BUCKET), "bucket")
    known = BUCKET >= 0
    assert torch.equal(label[known], BUCKET[known])
    assert len(set(label[~known].tolist())) == int((~known).sum())
    assert not set(label[~known].tolist()) & set(BUCKET[known].tolist())


def test_options():
    two = make(names=("image", "text"))
    assert any(key.startswith("text->image/volume/") for key in Retrieval(anchor="text").run(two).metrics)
    assert not any("volume" in key for key in Retrieval(volume=False).run(two).metrics)
    assert "image->text/cosine/R@3" in TASKS.build("retrieval", ks=[3]).run(two).metrics
    with pytest.raises(InputError, match="did you mean 'text'"):
        Retrieval(anchor="tex").run(two)
    with pytest.raises(InputError, match="at least 1"):
        Retrieval(ks=(0,))
    with pytest.raises(InputError, match="no bucket ids"):
        Retrieval(relevance="bucket").run(two)


def test_a_modality_that_no_item_has_gives_zeros_not_an_error():
    embeddings = make(4, missing=[("audio", i) for i in range(4)])
    metrics = Retrieval().run(embeddings).metrics
    assert metrics["text->audio/cosine/R@1"] == metrics["audio->text/cosine/R@10"] == 0
    assert metrics["text->video+audio/volume/R@5"] == 0
