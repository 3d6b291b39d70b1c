"""Embedding on one and several ranks, failures that every rank hears of, and what is written."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from trivium.datasets.batch import Clip, Skip, collate
from trivium.datasets.registry import InputError
from trivium.evals.embeddings import EmbeddingError, EmbeddingSet, embed
from trivium.evals.harness import append_history, check_tasks, evaluate, run_tasks, write_results
from trivium.evals.results import Result, read_embeddings, read_lines, read_results

EMPTY = {"text": {"x": torch.zeros(6)}, "video": {"x": torch.zeros(6)}}
CORRUPT = 2
SILENT = 4  # has no video


def clip(i: int) -> Clip:
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(i))
    inputs = {} if i == CORRUPT else {"text": {"x": x[0]}, "video": {"x": x[1]}}
    if i == SILENT:
        del inputs["video"]
    return Clip(f"clip{i}", i, inputs, i % 3, (f"caption {i}",))


def batches(n: int, rank: int, world: int, size: int):
    """As the stream gives them: rank r has samples r, r + world, ..., padded to equal numbers of full batches."""
    share = -(-n // world)
    for start in range(0, share, size):
        wanted = [rank + world * row for row in range(start, start + size)]
        clips = [clip(i) if i < n else Clip("", -1, {}, -1) for i in wanted]
        skipped = (
            [Skip(CORRUPT, f"clip{CORRUPT}", "a.tar", 512, "cut short")] if CORRUPT in wanted and n > CORRUPT else []
        )
        yield collate(clips, EMPTY, skipped)


def encode(batch):
    return {name: normalize(parts["x"] + 1e-3, dim=1).double() for name, parts in batch.inputs.items()}


def start(world: int) -> int:
    if world > 1:
        torch.distributed.init_process_group("gloo")
        return torch.distributed.get_rank()
    return 0


def plain(embeddings: EmbeddingSet) -> dict:
    """Tensors as numpy, so that they travel between processes and compare by value."""
    arrays = {f"z/{name}": x.numpy() for name, x in embeddings.z.items()}
    arrays |= {f"valid/{name}": x.numpy() for name, x in embeddings.valid.items()}
    return arrays | {"keys": embeddings.keys, "captions": embeddings.captions, "bucket": embeddings.bucket.numpy(),
                     "skipped": embeddings.skipped}  # fmt: skip


def embed_on_ranks(world: int, n: int, size: int) -> dict:
    return plain(embed(encode, batches(n, start(world), world, size), n))


def assert_same(got: dict, want: dict) -> None:
    for key, value in want.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(got[key], value)
        else:
            assert got[key] == value, key


def test_embed_puts_item_i_in_row_i():
    embeddings = embed(encode, reversed(list(batches(11, 0, 1, 4))), 11)
    assert embeddings.keys == tuple(f"clip{i}" for i in range(11))
    assert embeddings.captions[3] == ("caption 3",)
    assert embeddings.bucket.tolist() == [i % 3 for i in range(11)]
    assert embeddings.z["text"].dtype == torch.float32
    expected = normalize(clip(7).inputs["video"]["x"] + 1e-3, dim=0)
    torch.testing.assert_close(embeddings.z["video"][7], expected)
    assert [skip.key for skip in embeddings.skipped] == ["clip2"]
    assert (~embeddings.valid["video"]).nonzero().flatten().tolist() == [CORRUPT, SILENT]
    assert (~embeddings.valid["text"]).nonzero().flatten().tolist() == [CORRUPT]
    assert not embeddings.z["video"][SILENT].any()


@pytest.mark.two_process
@pytest.mark.parametrize(("world", "n", "size"), [(2, 10, 2), (2, 11, 3), (2, 1, 4), (3, 2, 2)])
def test_ranks_together_embed_what_one_process_does(ranks, world, n, size):
    want = embed_on_ranks(1, n, size)
    for got in ranks(world, embed_on_ranks, world, n, size, timeout=60):
        assert_same(got, want)


def test_buckets_are_none_without_any_and_minus_one_where_unknown():
    no_bucket = [replace(batch, bucket=None) for batch in batches(5, 0, 1, 2)]
    assert embed(encode, no_bucket, 5).bucket is None
    first, *others = batches(5, 0, 1, 2)
    assert embed(encode, [first, *[replace(batch, bucket=None) for batch in others]], 5).bucket.tolist() == [
        0,
        1,
        -1,
        -1,
        -1,
    ]


@pytest.mark.parametrize(
    ("wanted", "total", "message"),
    [([0, 1, 3], 4, "1 of 4 positions are missing, first 2"), ([0, 1, 1], 3, "missing"),
     ([0, 1, 1], 2, "repeated, first 1"), ([0, 1, 9], 2, "beyond the split of 2"), ([], 3, "no batches")],
)  # fmt: skip
def test_every_position_is_there_once(wanted, total, message):
    given = [collate([clip(i)], EMPTY) for i in wanted]
    with pytest.raises(EmbeddingError, match=message):
        embed(encode, given, total)


def test_a_vector_that_is_not_finite_is_refused_but_not_in_a_row_that_is_missing():
    def broken(batch):
        z = encode(batch)
        z["video"][batch.position == SILENT] = torch.nan
        return z

    assert torch.isfinite(embed(broken, batches(8, 0, 1, 3), 8).z["video"]).all()

    def worse(batch):
        z = broken(batch)
        z["video"][batch.position == 5] = torch.inf
        return z

    with pytest.raises(EmbeddingError, match="video vectors of 1 items are not finite, first 'clip5'"):
        embed(worse, batches(8, 0, 1, 3), 8)


def fail_on_rank(world: int, how: str) -> list:
    """One rank goes wrong in one way; what each rank's evaluation says."""
    rank = start(world)

    def faulty(batch):
        if how == "encode" and rank == 1 and 5 in batch.position.tolist():
            raise RuntimeError("out of memory")
        return encode(batch)

    def loader():
        for number, batch in enumerate(batches(12, rank, world, 2)):
            if rank == 1 and number == 1 and how == "loader":
                raise OSError("shard is gone")
            if rank == 1 and number == 1 and how == "short":
                return
            yield batch

    given = 3 if how == "not iterable" and rank == 0 else loader()
    return [vars(result) for result in evaluate(faulty, given, 12, {"retrieval": {}, "geometry": {}})]


@pytest.mark.two_process
@pytest.mark.parametrize(
    ("how", "message"),
    [("encode", "out of memory (rank 1)"), ("loader", "shard is gone (rank 1)"),
     ("short", "1 of 2 ranks ended after 1"), ("not iterable", "not iterable (rank 0)")],
)  # fmt: skip
def test_a_failure_on_one_rank_is_an_error_on_all_and_no_hang(ranks, how, message):
    first, second = ranks(2, fail_on_rank, 2, how, timeout=60)
    assert first == second
    assert [result["task"] for result in first] == ["retrieval", "geometry"]
    assert all(message in result["error"] and not result["metrics"] for result in first)


def evaluate_on_ranks(world: int) -> tuple[list, tuple[Skip, ...]]:
    tasks = {"retrieval": {"relevance": "instance"}, "geometry": {"limit": 1}}  # the second is not a possible limit
    results = evaluate(encode, batches(11, start(world), world, 3), 11, tasks)
    return [vars(result) for result in results], results.skipped


@pytest.mark.two_process
def test_ranks_agree_on_the_results_and_one_failing_task_spares_the_others(ranks):
    want = evaluate_on_ranks(1)
    first, second = ranks(2, evaluate_on_ranks, 2, timeout=60)
    assert first == second == want
    (retrieval, geometry), skipped = want
    assert retrieval["metrics"] and retrieval["error"] is None
    assert not geometry["metrics"] and "limit=1" in geometry["error"]
    assert [(skip.position, skip.key, skip.reason) for skip in skipped] == [(CORRUPT, "clip2", "cut short")]


def test_an_unreadable_sample_is_counted_beside_every_number_and_handed_back():
    results = evaluate(encode, batches(11, 0, 1, 4), 11, {"retrieval": {}, "geometry": {}})
    for result in results:
        assert (result.protocol["n_items"], result.protocol["n_unreadable"]) == (11, 1)
    retrieval, geometry = results
    assert all(row["n_query"] == 11 and row["n_missing"] >= 1 for row in retrieval.protocol["rows"].values())
    assert {key.rsplit("/", 1)[0] for key in retrieval.metrics} == set(retrieval.protocol["rows"])
    assert (geometry.protocol["n"], geometry.protocol["n_missing"]) == (11, {"text": 1, "video": 2})
    assert results.skipped == (Skip(CORRUPT, f"clip{CORRUPT}", "a.tar", 512, "cut short"),)
    assert not evaluate(encode, [], 11, {"geometry": {}}).skipped  # nothing was embedded: an error, no samples


def test_random_states_are_put_back():
    def noisy(batch):
        random.random(), np.random.rand(), torch.rand(3)
        return encode(batch)

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    want = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    evaluate(noisy, batches(9, 0, 1, 4), 9, {"retrieval": {}})
    assert (random.random(), np.random.rand(), torch.rand(1)) == want


def test_tasks_are_checked_before_any_work():
    check_tasks({"retrieval": {"ks": [1, 2]}, "geometry": None})
    with pytest.raises(InputError, match="did you mean 'retrieval'"):
        check_tasks({"retrieva": {}})
    with pytest.raises(InputError, match="no option 'k'"):
        check_tasks({"retrieval": {"k": 1}})


def test_history_survives_a_line_cut_short(tmp_path):
    append_history(tmp_path, 100, "val", [Result("retrieval", {"a/R@1": 50.0}), Result("geometry", error="no")])
    with (tmp_path / "evals.jsonl").open("a") as file:
        file.write('{"step": 150, "spl')
    append_history(tmp_path, 200, "val", [Result("retrieval", {"a/R@1": float("nan")})])
    lines = read_lines(tmp_path / "evals.jsonl")
    assert [line["step"] for line in lines] == [100, 100, 200]
    assert lines[0] == {"step": 100, "split": "val", "task": "retrieval", "metrics": {"a/R@1": 50.0}, "protocol": {}}
    assert lines[1]["error"] == "no"
    assert lines[2]["metrics"] == {"a/R@1": None}


def test_results_are_written_whole_and_read_back(tmp_path):
    embeddings = embed(encode, batches(11, 0, 1, 4), 11)
    results = run_tasks(embeddings, {"retrieval": {}, "geometry": {"limit": 1}})
    folder = tmp_path / "with space" / "test"
    write_results(folder, results, embeddings, {"model": "demo", "step": 300, "split": "test"})
    assert sorted(path.name for path in folder.iterdir()) == [
        "embeddings.json", "embeddings.safetensors", "results.json", "results.md", "skipped.jsonl"
    ]  # fmt: skip
    card = read_results(folder)
    assert (card["schema"], card["model"], card["step"], card["n"], card["n_unreadable"]) == (1, "demo", 300, 11, 1)
    assert card["split_sha256"] == embeddings.digest()
    assert card["tasks"][0]["metrics"] == results[0].metrics
    assert "limit=1" in card["tasks"][1]["error"]
    assert_same(plain(read_embeddings(folder)), plain(embeddings))
    text = (folder / "results.md").read_text()
    assert "| query->gallery/score | R@1 ↑ | R@5 ↑ | R@10 ↑ | MedR ↓ | MeanR ↓ | chance R@1 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| text->video/cosine |"))
    assert row.endswith("| 11 | 9 | 1 |")  # the silent clip finds others of its bucket, the unreadable one nothing
    assert "Failed: InputError: limit=1" in text
    skip = {
        "split": "test",
        "position": CORRUPT,
        "key": "clip2",
        "shard": "a.tar",
        "offset": 512,
        "reason": "cut short",
    }
    assert read_lines(folder / "skipped.jsonl") == [skip]
    write_results(folder, results, replace(embeddings, skipped=()), {"split": "test"})
    assert (folder / "skipped.jsonl").read_text() == ""  # repaired: the old lines are gone


def test_a_card_of_another_schema_is_refused(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(InputError, match="another schema"):
        read_results(tmp_path)
    assert read_results(tmp_path / "nowhere") is None


def test_the_digest_tells_splits_apart():
    one = embed(encode, batches(6, 0, 1, 4), 6)
    assert one.digest() == embed(encode, batches(6, 0, 1, 2), 6).digest()
    assert one.digest() != replace(one, captions=(("other",), *one.captions[1:])).digest()
