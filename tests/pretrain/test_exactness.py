"""The promise: gradients on several ranks, under every engine, plain or by cached embeddings, are those of one process.

Every registered objective, real (tiny) towers. The reference is one process with the joined batch and plain autograd.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from trivium.datasets.batch import Batch
from trivium.modalities.model import MultimodalModel
from trivium.objectives import OBJECTIVES, gather, names
from trivium.pretrain.config import load
from trivium.pretrain.engine import Engine, build_accelerator
from trivium.pretrain.step import TrainModule, seed_everything, train_step

N = 12  # global batch: divides over 1, 2 and 3 ranks
RATE = 64.0  # of plain SGD: the gradient is the difference of the weights, divided by it
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijk"]
MISSING = {
    "none": {},
    "one rank": {"audio": range(4)},
    "unequal": {"audio": [0, 1, 2, 3, 4, 7], "video": [5]},
    "every sample": {"audio": range(N)},
}


OPTIONS = {  # by objective, where the defaults do not do
    "byol": {"hidden": 12, "width": 8, "predictor_hidden": 12},
    "simsiam": {"hidden": 12, "width": 8, "predictor_hidden": 6},
    "vicreg": {"expander": [12, 10]},
    "sink_anchored": {"anchors": 6, "chosen": 3, "queue": 8},
    "sum": {"terms": [{"name": "infonce"}, {"name": "sink_anchored", "anchors": 4, "chosen": 2, "weight": 0.5}]},
}


def modalities(folder) -> dict:
    vocabulary = f"{folder}/vocab.txt"
    sizes = {"width": 16, "heads": 2}
    text = {"name": "bert", "tokenizer": vocabulary, "max_tokens": 6, "layers": 1, "feedforward": 32, "dropout": 0.0}
    video = {"name": "eva_clip", "frames": 2, "size": 16, "patch": 8, "depth": 1}
    audio = {"name": "beats", "length": 32, "mel_bins": 32, "patch": 16, "patch_width": 8, "layers": 1}
    audio |= {"feedforward": 32, "conv_kernel": 4, "conv_groups": 2, "dropout": 0.0, "attention_dropout": 0.0}
    return {"text": {"tower": text | sizes}, "video": {"tower": video | sizes}, "audio": {"tower": audio | sizes}}


def joined_batch(missing: str, dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, len(VOCABULARY), (N, 6), generator=generator)
    frames = torch.randint(0, 256, (N, 2, 3, 16, 16), generator=generator, dtype=torch.uint8)
    fbank = torch.randn(N, 1, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
    present = {name: torch.ones(N, dtype=torch.bool) for name in ("text", "video", "audio")}
    for name, rows in MISSING[missing].items():
        present[name][list(rows)] = False
    return Batch(
        keys=tuple(str(i) for i in range(N)),
        position=torch.arange(N),
        inputs={
            "text": {"ids": ids, "mask": torch.ones_like(ids)},
            "video": {"frames": frames},
            "audio": {"fbank": fbank},
        },
        present=present,
        bucket=torch.arange(N) % 4,
        captions=tuple(("a",) for _ in range(N)),
    )


def module_of(objective: str, folder, dtype: torch.dtype) -> TrainModule:
    seed_everything(0)
    return TrainModule(
        MultimodalModel(modalities(folder), 8), OBJECTIVES.build(objective, **OPTIONS.get(objective, {})), "fp32"
    ).to(dtype)


def reference(objective: str, missing: str, folder, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one process that knows no other."""
    module, world_size = module_of(objective, folder, dtype), gather.world_size
    gather.world_size = lambda: 1
    try:
        loss, _ = module(joined_batch(missing, dtype))
        loss.total.backward()
    finally:
        gather.world_size = world_size
    return float(loss.total.detach()), {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()
    }


def engine_gradients(
    objective: str, missing: str, folder, dtype: torch.dtype, zero: int, chunk: int | None
) -> tuple[float, dict[str, torch.Tensor]]:
    """Global loss and gradients of the engine under test. All ranks; full gradients on rank 0."""
    config = load("demo", [f"distributed.zero={zero}", "log.wandb=false", "train.clip_norm=null"])
    AcceleratorState._reset_state()  # one process tries many engines; the process group stays
    accelerator = build_accelerator(config)
    module = module_of(objective, folder, dtype)
    optimizer = torch.optim.SGD([{"params": list(module.parameters()), "lr_scale": 1.0}], lr=RATE)
    engine = Engine(accelerator, module, optimizer, clip_norm=None)
    before = engine.weights()
    rank, world = accelerator.process_index, accelerator.num_processes
    own = joined_batch(missing, dtype).slice(rank * N // world, (rank + 1) * N // world)
    loss, _ = train_step(engine, own, chunk, (0, 0, rank))
    total = loss.total.detach().double()
    if world > 1:
        dist.all_reduce(total)
    engine.step()
    after = engine.weights()
    changed = {name: (before[name] - after[name]) / RATE for name, _ in module.named_parameters() if name in after}
    return float(total) / world, changed


def worst_case(zero: int, dtype_name: str, cases: list[tuple[str, str, int | None]], folder: str) -> dict[tuple, float]:
    """For each (objective, missing, chunk): largest gradient error over the largest gradient. Runs on every rank."""
    dtype, worst = getattr(torch, dtype_name), {}
    for objective, missing, chunk in cases:
        loss, gradients = engine_gradients(objective, missing, folder, dtype, zero, chunk)
        expected_loss, expected = reference(objective, missing, folder, dtype)
        if dist.get_rank() == 0:
            scale = max(float(g.abs().max()) for g in expected.values())
            error = max(float((gradients[name] - g).abs().max()) for name, g in expected.items())
            assert scale > 1e-3 or missing == "every sample", "no gradient: nothing would be compared"
            worst[objective, missing, chunk] = max(
                error / (scale or 1), abs(loss - expected_loss) / (abs(expected_loss) or 1)
            )
    return worst


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("vocabulary")
    (path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return str(path)


def check(ranks, world: int, zero: int, dtype: str, cases: list, folder: str, tolerance: float) -> None:
    worst = ranks(world, worst_case, zero, dtype, cases, folder, timeout=600)[0]
    assert set(worst) == set(cases)
    failures = {case: error for case, error in worst.items() if not error <= tolerance}
    assert not failures, failures


QUICK = {  # engine: what is missing, clips per chunk (N / 2 = 6 is one pass on 2 ranks)
    0: [("unequal", None), ("every sample", 4)],
    1: [("none", None), ("one rank", 4)],
    2: [("unequal", None), ("none", 4)],
    3: [("one rank", None), ("unequal", 4)],
}


@pytest.mark.two_process
@pytest.mark.parametrize("zero", QUICK)
def test_two_ranks_equal_one_process(ranks, zero, folder):
    cases = [(objective, missing, chunk) for objective in names() for missing, chunk in QUICK[zero]]
    check(ranks, 2, zero, "float32", cases, folder, 1e-5)


@pytest.mark.two_process
def test_two_ranks_equal_one_process_in_float64(ranks, folder):
    cases = [(objective, missing, chunk) for objective in names() for missing in MISSING for chunk in (None, 4)]
    check(ranks, 2, 0, "float64", cases, folder, 1e-9)


@pytest.mark.slow
@pytest.mark.two_process
@pytest.mark.parametrize("world, zero", list(itertools.product((2, 3), (0, 1, 2, 3))))
def test_every_engine_with_every_missing_pattern(ranks, world, zero, folder):
    cases = [(objective, missing, chunk) for objective in names() for missing in MISSING for chunk in (None, 3)]
    check(ranks, world, zero, "float32", cases, folder, 1e-5)


@pytest.mark.slow
@pytest.mark.two_process
def test_three_ranks_equal_one_process_in_float64(ranks, folder):
    cases = [(objective, missing, chunk) for objective in names() for missing in MISSING for chunk in (None, 3)]
    check(ranks, 3, 0, "float64", cases, folder, 1e-9)
