from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from trivium.datasets.batch import Batch
from trivium.datasets.decode import NoiseWords
from trivium.datasets.registry import InputError
from trivium.datasets.shards import Index, write_shards
from trivium.datasets.stream import ATTEMPTS, Plan, Source, draw, eval_batches, train_batches
from trivium.modalities import FbankSpec, FrameSpec, TokenSpec

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def specs(digits) -> dict:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = (digits / "vocab.txt").read_text().split()
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return {
        "video": FrameSpec(frames=2, size=32, mean=HALF, std=HALF),
        "audio": FbankSpec(length=64),
        "text": TokenSpec(tokenizer=tokenizer.to_str(), max_tokens=12),
    }


@pytest.fixture(scope="module")
def source(digits, specs) -> Source:
    return Source(str(digits / "train-*.tar"), specs)


def quickest(specs: dict) -> dict:
    """Only the modality that is quickest to decode."""
    return {"text": specs["text"]}


def train(source: Source, **options) -> list[Batch]:
    defaults = {"batch_size": 8, "rank": 0, "world": 1, "seed": 1, "start_step": 0, "steps": 2, "workers": 0}
    return list(train_batches(source, **{**defaults, **options}))


def evaluate(source: Source, **options) -> list[Batch]:
    return list(eval_batches(source, **{"batch_size": 8, "rank": 0, "world": 1, "workers": 0, **options}))


def joined(batches: list[Batch]) -> dict[str, object]:
    """Everything of consecutive batches (or of the ranks' batches of one step) as one, to compare bit by bit."""
    tensors = {
        f"{name}.{key}": torch.cat([batch.inputs[name][key] for batch in batches]).numpy().tobytes()
        for name, parts in batches[0].inputs.items()
        for key in parts
    }
    return tensors | {
        "keys": [key for batch in batches for key in batch.keys],
        "position": torch.cat([batch.position for batch in batches]).tolist(),
        "bucket": None if batches[0].bucket is None else torch.cat([batch.bucket for batch in batches]).tolist(),
        "present": {name: torch.cat([b.present[name] for b in batches]).tolist() for name in batches[0].present},
        "captions": [captions for batch in batches for captions in batch.captions],
        "skipped": [skip for batch in batches for skip in batch.skipped],
    }


# -- the order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 7, 100])
def test_every_sample_once_an_epoch(samples):
    plan = Plan(samples, seed=3)
    epochs = [[plan.sample(epoch * samples + i) for i in range(samples)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(samples)) for epoch in epochs)
    if samples >= 7:
        assert len({tuple(epoch) for epoch in epochs}) == 4
        assert [Plan(samples, seed=4).sample(i) for i in range(samples)] != epochs[0]


def test_the_order_is_uniform():
    """Over many seeds every sample is equally often at every place (chi-square, 6 x 6)."""
    counts = np.zeros((6, 6))
    for seed in range(3000):
        plan = Plan(6, seed)
        for place in range(6):
            counts[place, plan.sample(6 + place)] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 80  # 25 degrees of freedom: 80 has probability 1e-7


def test_the_order_never_changes():
    """A resumed run needs the same numbers from every later version."""
    assert [Plan(10, seed=0).sample(p) for p in range(20)] == ORDER
    assert draw(0, 5, "frames").bit_generator.random_raw(2).tolist() == WORDS


ORDER = [1, 0, 4, 9, 8, 7, 3, 2, 5, 6, 8, 9, 6, 7, 4, 2, 0, 5, 3, 1]
WORDS = [7191066932887203488, 11990923932937806057]


def test_draws_are_keyed_by_everything():
    first = lambda *key: int(draw(*key).bit_generator.random_raw())  # noqa: E731
    keys = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (0, 0, "a", 1), (0, 1, "a", 1), (2**63, 2**40, "a")]
    assert len({first(*key) for key in keys}) == len(keys)
    assert [first(*key) for key in keys] == [first(*key) for key in keys]


# -- training batches -------------------------------------------------------------------------------------------------


def test_batches_are_what_the_plan_says(source):
    plan = Plan(60, seed=1)
    for step, batch in enumerate(train(source, steps=9)):  # 72 positions: into the second epoch
        positions = list(range(step * 8, step * 8 + 8))
        assert batch.position.tolist() == positions
        samples = [plan.sample(position) for position in positions]
        assert list(batch.keys) == [source.index.key(sample) for sample in samples]
        assert batch.bucket.tolist() == [int(source.index.bucket[sample]) for sample in samples]
        for row, sample in enumerate(samples):
            annotation = json.loads(source.index.read(sample)["json"])
            assert list(batch.captions[row]) == annotation["captions"]
        assert batch.inputs["video"]["frames"].shape == (8, 2, 3, 32, 32)
        assert batch.inputs["video"]["frames"].dtype == torch.uint8
        assert all(bool(present.all()) for present in batch.present.values()) and not batch.skipped


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers, source):
    assert joined(train(source, steps=7, workers=workers)) == joined(train(source, steps=7))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_change_nothing(world, source):
    whole = train(source)
    ranks = [train(source, rank=rank, world=world) for rank in range(world)]
    for step in range(2):
        assert joined([batches[step] for batches in ranks]) == joined([whole[step]])


def test_a_run_resumes_at_any_step(source):
    whole = train(source, steps=9)
    for start in (0, 3, 8, 9):
        later = train(source, start_step=start, steps=9)
        assert len(later) == 9 - start
        assert [joined([batch]) for batch in later] == [joined([batch]) for batch in whole[start:]]


def test_epochs_see_other_frames_crops_and_captions(source):
    sample = 4
    seen = [source.clip(sample, position, seed=1) for position in (4, 64, 124, 184)]
    assert len({clip.inputs["video"]["frames"].numpy().tobytes() for clip in seen}) == 4
    assert len({clip.inputs["text"]["ids"].numpy().tobytes() for clip in seen}) > 1
    again = source.clip(sample, 64, seed=1)
    assert torch.equal(again.inputs["video"]["frames"], seen[1].inputs["video"]["frames"])


def test_iterating_leaves_the_global_generators_alone(source):
    torch.manual_seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for workers in (0, 2):
        train(source, workers=workers, steps=1)
    evaluate(source)
    assert torch.equal(before, torch.get_rng_state()) and np.random.get_state()[1].tolist() == numpy_before


def test_iterating_again_starts_again(digits, specs):
    batches = train_batches(
        Source(str(digits / "train-*.tar"), quickest(specs)),
        batch_size=4, rank=0, world=1, seed=0, start_step=2, steps=12, workers=2,
    )  # fmt: skip
    assert len(batches) == 10
    iterator = iter(batches)
    first = [next(iterator), next(iterator)]  # and then it is left
    assert joined(list(batches)[:2]) == joined(first)


def test_the_thread_count_comes_back(source):
    torch.set_num_threads(2)
    train(source, steps=1)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 10, "world": 4}, "batch_size=10 does not divide over 4 processes; use 8 or 12"),
        ({"batch_size": 2, "world": 4}, "use 4 or 4"),
        ({"batch_size": 64}, "larger than the 60 samples"),
    ],
)
def test_impossible_batches_are_refused(options, message, source):
    with pytest.raises(InputError, match=message) as error:
        train(source, **options)
    assert "\n" not in str(error.value)


# -- corrupt and incomplete samples -----------------------------------------------------------------------------------


def write(folder: Path, clips: list[dict]) -> str:
    samples = [{"__key__": f"clip{i:03d}", **clip} for i, clip in enumerate(clips)]
    write_shards(samples, folder, "train", samples_per_shard=4)
    return str(folder / "train-*.tar")


@pytest.fixture(scope="module")
def good(digits) -> list[dict]:
    index = Index.open(str(digits / "train-*.tar"))
    return [index.read(i) for i in range(12)]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, good, specs) -> Source:
    clips = [dict(clip) for clip in good]
    clips[2]["mp4"] = b""
    clips[5]["mp4"] = clips[5]["mp4"][: len(clips[5]["mp4"]) // 2]
    clips[9]["json"] = b'{"captions": ["cut o'
    return Source(write(tmp_path_factory.mktemp("damaged"), clips), specs)


def test_corrupt_samples_are_replaced_and_reported(damaged):
    batches = train(damaged, batch_size=12, steps=2)
    for epoch, batch in enumerate(batches):
        assert not {"clip002", "clip005", "clip009"} & set(batch.keys)
        assert batch.position.tolist() == list(range(12 * epoch, 12 * epoch + 12))
        assert all(bool(present.all()) for present in batch.present.values()) and bool((batch.bucket >= 0).all())
        assert {"clip002", "clip005", "clip009"} <= {skip.key for skip in batch.skipped}
        plan = Plan(12, seed=1)
        firsts = {skip.position: skip for skip in reversed(batch.skipped)}
        assert {damaged.index.key(plan.sample(position)) for position in firsts} == {"clip002", "clip005", "clip009"}
        for skip in batch.skipped:
            number = int(skip.key[4:])
            assert skip.shard.endswith(f"train-{number // 4:06d}.tar") and skip.offset == damaged.index.offset[number]
            assert skip.reason and "\n" not in skip.reason


def test_unreadable_headers_are_counted(damaged, source, good, tmp_path, specs, encode):
    assert damaged.check() == {"video": 10, "audio": 10, "text": 11, "unreadable": 3}
    assert "unreadable" not in source.check()
    text = Source(damaged.pattern, quickest(specs))
    assert text.check() == {"text": 11, "unreadable": 1}  # nobody wants the films
    blind = {**good[0], "mp4": encode(frames=10).replace(b"avc1", b"zzzz")}
    pattern = write(tmp_path, [*good[:2], blind])
    assert Source(pattern, specs).check() == {"video": 2, "audio": 3, "text": 3, "unreadable": 1}
    assert Source(pattern, {"audio": specs["audio"]}).check() == {"audio": 3}
    with pytest.raises(InputError, match="of 1 samples unreadable"):
        Source(write(tmp_path / "none", [blind]), specs).check()


def test_an_unknown_codec_is_replaced(tmp_path, good, specs, encode):
    clips = [*good[:5], {**good[5], "mp4": encode(frames=10).replace(b"avc1", b"encv")}]
    (batch,) = train(Source(write(tmp_path, clips), specs), batch_size=6, steps=1)
    assert "clip005" not in batch.keys and {skip.key for skip in batch.skipped} == {"clip005"}
    assert "unknown or encrypted" in batch.skipped[0].reason


def test_replacement_does_not_depend_on_workers_or_ranks(damaged):
    whole = train(damaged, batch_size=12, steps=2)
    assert joined(train(damaged, batch_size=12, steps=2, workers=2)) == joined(whole)
    ranks = [train(damaged, batch_size=12, steps=2, rank=rank, world=3) for rank in range(3)]
    for step in range(2):
        assert joined([batches[step] for batches in ranks]) == joined([whole[step]])


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_corrupt_samples_stops_the_run(workers, tmp_path, good, specs):
    clips = [{**clip, "mp4": b"<html>"} for clip in good]
    source = Source(write(tmp_path, clips), specs)
    first = train(source, workers=workers)[0]
    assert (
        first.error.startswith(f"{ATTEMPTS} samples drawn for position 0 are all corrupt") and "\n" not in first.error
    )
    assert not any(present.any() for present in first.present.values())  # blank, for the step's collectives


def test_samples_without_a_modality_take_part(tmp_path, good, specs, encode):
    clips = [dict(clip) for clip in good[:4]]
    clips[0]["mp4"] = encode(frames=20, audio=None)
    clips[1]["mp4"] = encode(video=False, seconds=1.0)
    clips[2]["json"] = json.dumps({"bucket": 3}).encode()
    source = Source(write(tmp_path, clips), specs)
    assert source.check() == {"video": 3, "audio": 3, "text": 3}
    (batch,) = evaluate(source)
    assert batch.present["video"].tolist() == [True, False, True, True]
    assert batch.present["audio"].tolist() == [False, True, True, True]
    assert batch.present["text"].tolist() == [True, True, False, True]
    assert not batch.skipped and batch.captions[2] == ()
    assert not batch.inputs["video"]["frames"][1].any() and not batch.inputs["audio"]["fbank"][0].any()
    assert batch.inputs["text"]["mask"][2].tolist() == [1] + [0] * 11
    assert torch.isfinite(batch.inputs["audio"]["fbank"]).all()


def test_a_sample_with_nothing_wanted_is_corrupt(tmp_path, good, specs, encode):
    clips = [*good[:3], {"mp4": encode(frames=5, audio=None), "json": good[0]["json"]}]
    source = Source(write(tmp_path, clips), {"audio": specs["audio"]})
    (batch,) = evaluate(source)
    assert [skip.key for skip in batch.skipped] == ["clip003"] and "none of the wanted" in batch.skipped[0].reason


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world, rows", [(1, 8), (2, 8), (3, 5), (7, 64), (25, 4)])
def test_every_sample_is_evaluated_once_and_ranks_keep_step(world, rows, digits, specs):
    source = Source(str(digits / "val-*.tar"), quickest(specs))
    ranks = [evaluate(source, batch_size=rows, rank=rank, world=world) for rank in range(world)]
    assert len({tuple(len(batch) for batch in batches) for batches in ranks}) == 1
    assert len({len(batch) for batch in ranks[0]}) == 1
    seen = Counter(p for batches in ranks for batch in batches for p in batch.position.tolist())
    padding = seen.pop(-1, 0)
    assert seen == Counter(range(20)) and padding + 20 == world * sum(len(batch) for batch in ranks[0])
    for rank, batches in enumerate(ranks):
        for batch in batches:
            for row, position in enumerate(batch.position.tolist()):
                assert bool(batch.present["text"][row]) == (position >= 0)
                assert batch.bucket[row] == (source.index.bucket[position] if position >= 0 else -1)
                assert position < 0 or (position % world == rank and batch.keys[row] == source.index.key(position))


def test_evaluation_draws_nothing(source):
    first = evaluate(source, workers=0)
    assert joined(evaluate(source, workers=2)) == joined(first)
    annotation = json.loads(source.index.read(0)["json"])
    text = source.specs["text"]
    from trivium.datasets.decode import tokenize

    expected = tokenize(annotation["captions"][0], text)["ids"]
    assert torch.equal(first[0].inputs["text"]["ids"][0], expected)


def test_corrupt_samples_stay_to_be_counted(damaged):
    batches = evaluate(damaged, batch_size=5)
    whole = joined(batches)
    assert whole["position"] == [*range(12), -1, -1, -1]
    missing = {2, 5, 9, 12, 13, 14}
    for present in whole["present"].values():
        assert [i for i, here in enumerate(present) if not here] == sorted(missing)
    assert [skip.position for skip in whole["skipped"]] == [2, 5, 9]
    assert whole["bucket"][2] == 2 and whole["bucket"][9] == -1  # the bucket stood in the broken part


# -- what a source refuses --------------------------------------------------------------------------------------------


def test_a_modality_that_no_sample_has(tmp_path, good, specs, encode):
    silent = [{**clip, "mp4": encode(frames=4, audio=None)} for clip in good[:2]]
    source = Source(write(tmp_path, silent), specs)
    with pytest.raises(InputError, match=r"no sample of .* has audio: .* data\.fields\.audio") as error:
        source.check()
    assert "\n" not in str(error.value)


def test_fields_are_read_and_checked(tmp_path, good, specs, encode):
    clips = [{"film.mp4": clip["mp4"], "json": clip["json"]} for clip in good[:4]]
    pattern = write(tmp_path, clips)
    with pytest.raises(InputError, match=r"film\.mp4"):
        Source(pattern, specs).check()
    fields = {"video": "film.mp4", "audio": ["wav", "film.mp4"]}
    source = Source(pattern, specs, fields=fields)
    assert source.check() == {"video": 4, "audio": 4, "text": 4}
    assert all(bool(present.all()) for present in evaluate(source)[0].present.values())


def test_captions_come_from_the_named_part(tmp_path, good, specs):
    clips = [{"json": clip["json"], "long.txt": f"clip {i}\nis moving".encode()} for i, clip in enumerate(good[:3])]
    source = Source(write(tmp_path, clips), {"text": specs["text"]}, fields={"text": ["none.json", "long.txt"]})
    assert source.check() == {"text": 3}
    (batch,) = evaluate(source)
    assert batch.captions == tuple((f"clip {i}", "is moving") for i in range(3)) and batch.bucket.tolist() == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_evaluation_stays_one_line(workers, digits):
    from tokenizers import Tokenizer, models

    bare = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).to_str()
    source = Source(str(digits / "val-*.tar"), {"text": TokenSpec(tokenizer=bare, max_tokens=4)})
    (batch,) = evaluate(source, workers=workers)[:1]
    assert "no padding token" in batch.error and "\n" not in batch.error


def test_buckets_for_all_or_none(tmp_path, good, specs):
    bare = [{**clip, "json": b'{"captions": ["x"]}'} for clip in good[:4]]
    source = Source(write(tmp_path / "bare", bare), specs)
    source.check()
    assert evaluate(source)[0].bucket is None and evaluate(source, world=3, rank=2)[0].bucket is None
    with pytest.raises(InputError, match="1 of the 5 samples"):
        Source(write(tmp_path / "mixed", [*good[:4], bare[0]]), specs).check()


def test_unknown_names(digits, specs):
    pattern = str(digits / "val-*.tar")
    with pytest.raises(InputError, match="did you mean 'decord'"):
        Source(pattern, specs, decoder="decor")
    with pytest.raises(InputError, match="did you mean 'video'"):
        Source(pattern, specs, fields={"vidio": "mp4"})
    with pytest.raises(InputError, match="no shards match"):
        Source(str(digits / "nothing-*.tar"), specs)


def test_decord_makes_the_same_batches(digits, specs):
    pattern = str(digits / "val-*.tar")
    video = {"video": specs["video"]}
    ours, theirs = Source(pattern, video), Source(pattern, video, decoder="decord")
    assert joined(train(theirs, steps=1)) == joined(train(ours, steps=1))


# -- processes --------------------------------------------------------------------------------------------------------

BEGIN = """
import os, signal, sys, time
from trivium.datasets.stream import Source, train_batches
from trivium.modalities import FrameSpec

SPECS = {"video": FrameSpec(2, 32, (0.5,) * 3, (0.5,) * 3)}
OPTIONS = {"batch_size": 4, "rank": 0, "world": 1, "seed": 0, "start_step": 0, "workers": 2}

def family(pid):
    tasks = [f"/proc/{pid}/task/{task}/children" for task in os.listdir(f"/proc/{pid}/task")]
    children = [child for task in tasks for child in open(task).read().split()]
    return children + [grandchild for child in children for grandchild in family(child)]

"""


@pytest.fixture
def start(tmp_path, digits) -> Iterator[Callable[[str], subprocess.Popen]]:
    """Runs a script as the leader of a process group of its own."""
    runs = []

    def run(script: str) -> subprocess.Popen:
        path = tmp_path / "run.py"
        path.write_text(BEGIN + script)
        command = [sys.executable, str(path), str(digits / "train-*.tar")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        runs.append(subprocess.Popen(command, **pipes, text=True, start_new_session=True))
        return runs[-1]

    yield run
    for process in runs:
        process.kill()
        process.communicate()


def wait_for_the_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their run"
        time.sleep(0.2)


def test_a_killed_run_leaves_no_process(start):
    script = """
if __name__ == "__main__":
    batches = train_batches(Source(sys.argv[1], SPECS), steps=10**6, **OPTIONS)
    next(iter(batches))
    print(*family(os.getpid()), flush=True)
    for batch in batches:
        pass
"""
    run = start(script)
    processes = [int(pid) for pid in run.stdout.readline().split()]
    assert len(processes) >= 4  # resource tracker, fork server, two workers
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    wait_for_the_end(processes)


def test_signals_to_the_group_end_no_worker(start):
    """The run decides what they mean, and gets all its batches."""
    script = """
class Slow(Source):
    def clip(self, *args):
        time.sleep(0.05)
        return super().clip(*args)

if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: print("heard", flush=True))
    batches = train_batches(Slow(sys.argv[1], SPECS), steps=20, **OPTIONS)
    count = 0
    for batch in batches:
        count += 1
        if count == 1:
            before = family(os.getpid())
            print(*before, flush=True)
    print(count, family(os.getpid()) == before, flush=True)
"""
    run = start(script)
    processes = [int(pid) for pid in run.stdout.readline().split()]
    os.killpg(run.pid, signal.SIGTERM)
    os.killpg(run.pid, signal.SIGINT)
    output, errors = run.communicate(timeout=60)
    assert (output.split(), run.returncode) == (["heard", "heard", "20", "True"], 0), errors
    assert not errors
    wait_for_the_end(processes)


def test_a_run_ends_although_a_worker_hangs(start):
    """In a decoder, say: the run terminates it, as it does with any worker of an iterator that is still alive."""
    script = """
class Hanging(Source):
    def clip(self, sample, position, seed):
        time.sleep(10**6 if position >= 8 else 0)
        return super().clip(sample, position, seed)

if __name__ == "__main__":
    iterator = iter(train_batches(Hanging(sys.argv[1], SPECS), steps=40, **OPTIONS))
    next(iterator), next(iterator)
    print(*family(os.getpid()), flush=True)
"""
    run = start(script)
    processes = [int(pid) for pid in run.stdout.readline().split()]
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 0 and not errors
    wait_for_the_end(processes)


def test_other_users_of_the_fork_server_can_be_terminated(start):
    script = """
import multiprocessing

if __name__ == "__main__":
    list(train_batches(Source(sys.argv[1], SPECS), steps=1, **OPTIONS))
    other = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(10**6,))
    other.start()
    time.sleep(2)
    other.terminate()
    other.join(20)
    print(other.exitcode, flush=True)
    other.kill()
"""
    run = start(script)
    output, errors = run.communicate(timeout=60)
    assert output.split() == [str(-signal.SIGTERM)], errors


def test_noise_words_are_those_that_no_caption_has(tmp_path, good, specs):
    shards = write(tmp_path, good)
    known = next(iter(Source(shards, specs).index.words()))
    source = Source(shards, specs, noise_words={"text": NoiseWords(0.5, (known, known.upper(), "quagga"))})
    assert source.noise_words["text"].words == ("quagga",)
    with pytest.raises(InputError, match=r"data\.noise_words\.text: all 1 words occur"):
        Source(shards, specs, noise_words={"text": NoiseWords(0.5, (known,))})
    with pytest.raises(InputError, match="'video' is no text but frames"):
        Source(shards, specs, noise_words={"video": NoiseWords(0.5, ("quagga",))})
    plain, noisy = (Source(shards, specs, noise_words=n) for n in (None, {"text": NoiseWords(1.0, ("quagga",))}))
    for a, b in zip(train(plain), train(noisy), strict=True):
        assert not torch.equal(a.inputs["text"]["ids"], b.inputs["text"]["ids"])
        assert torch.equal(a.inputs["video"]["frames"], b.inputs["video"]["frames"]) and a.captions == b.captions
