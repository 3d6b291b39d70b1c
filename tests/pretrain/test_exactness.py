"""The promise: gradients on several ranks, under every engine, plain or by cached embeddings, are those of one process.

Every registered objective with its options, on real (tiny) towers of its own; all of them are parts of one module, so
that an engine is built once for all. The reference is one process with the joined batch and plain autograd.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import nn

from trivium.datasets.batch import Batch
from trivium.modalities.model import MultimodalModel
from trivium.objectives import OBJECTIVES, Loss, gather, names
from trivium.pretrain.config import load
from trivium.pretrain.engine import Engine, build_accelerator
from trivium.pretrain.step import TrainModule, seed_everything, train_step

N = 12  # global batch: divides over 1, 2 and 3 ranks
RATE = 64.0  # of plain SGD: the gradient is the difference of the weights, divided by it
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijk"]
MISSING = {
    "none": {},
    "one rank": {"audio": range(4)},
    "all ranks": {"audio": [0, 1, 2, 3, 4, 7, 9], "video": [5, 10]},
    "every sample": {"audio": range(N)},
}
ENGINES = {"ddp64": (0, "float64"), "ddp": (0, "float32")} | {f"zero{k}": (k, "float32") for k in (1, 2, 3)}
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}  # of the largest gradient
CASES = {  # by objective, other options than the defaults; whatever is not listed is tested with those
    "infonce": [{}, {"anchor": "video", "label_smoothing": 0.1, "tile": 5}],
    "gram": [{}, {"compat": "gram", "anchor": "audio"}],
    "unialign": [{"tau": 0.2}, {"geometry": "geodesic", "detach_anchor": True, "centroid": False, "tile": 5}],
    "holder": [{"tau": 0.5}, {"taus": {"audio": 0.1}, "leave_one_out": True, "average_anchors": True}],
    "bucket": [{}, {"anchor": "audio", "normalise": "negatives"}],
    "vicreg": [{"expander": [12, 10]}],
    "byol": [{"hidden": 12, "width": 8, "predictor_hidden": 12, "momentum": 0.5}],
    "simsiam": [{"hidden": 12, "width": 8, "predictor_hidden": 6}],
    "sink_anchored": [
        {"anchors": 6, "chosen": 3, "queue": 8},
        {"anchors": 5, "chosen": 2, "queue": 30, "design": "graded", "logit": "exp"},
    ],
    "sum": [{"terms": [{"name": "infonce"}, {"name": "sink_anchored", "anchors": 4, "chosen": 2, "weight": 0.5}]}],
}
EVERY_CASE = [(name, options) for name in names() for options in CASES.get(name, [{}])]


def modalities(folder: str, dropout: float = 0.0) -> dict:
    vocabulary = f"{folder}/vocab.txt"
    sizes = {"width": 16, "heads": 2}
    text = {"name": "bert", "tokenizer": vocabulary, "max_tokens": 6, "layers": 1, "feedforward": 32}
    video = {"name": "eva_clip", "frames": 2, "size": 16, "patch": 8, "depth": 1}
    audio = {"name": "beats", "length": 32, "mel_bins": 32, "patch": 16, "patch_width": 8, "layers": 1}
    audio |= {"feedforward": 32, "conv_kernel": 4, "conv_groups": 2, "attention_dropout": dropout}
    noisy = {"dropout": dropout} | sizes
    return {"text": {"tower": text | noisy}, "video": {"tower": video | sizes}, "audio": {"tower": audio | noisy}}


def joined_batch(missing: str, dtype: torch.dtype, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
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


class EveryCase(nn.Module):
    """A TrainModule a case, with the face of one: `train_step` and `Engine` see no difference."""

    def __init__(self, folder: str, dropout: float = 0.0) -> None:
        super().__init__()
        seed_everything(0)
        self.parts = nn.ModuleList(
            TrainModule(MultimodalModel(modalities(folder, dropout), 8), OBJECTIVES.build(name, **options), "fp32")
            for name, options in EVERY_CASE
        )

    @property
    def objective(self) -> nn.Module:
        return Together(part.objective for part in self.parts)

    def forward(self, batch: Batch, z=None, *, embed_only: bool = False):
        found = []
        for index, part in enumerate(self.parts):
            own = z and {key.partition("|")[2]: x for key, x in z.items() if key.startswith(f"{index}|")}
            found.append(part(batch, own, embed_only=embed_only))
        vectors = found if embed_only else [z for _, z in found]
        joined = {f"{index}|{key}": x for index, one in enumerate(vectors) for key, x in one.items()}
        if embed_only:
            return joined
        totals = [loss.total for loss, _ in found]
        return Loss(sum(totals), {}, {str(i): total.detach() for i, total in enumerate(totals)}), joined


class Together(nn.ModuleList):
    def after_step(self, progress: float) -> None:
        for objective in self:
            objective.after_step(progress)


def module_of(folder: str, dtype: torch.dtype, dropout: float = 0.0) -> EveryCase:
    return EveryCase(folder, dropout).to(dtype)


Answer = tuple[list[float], dict[str, torch.Tensor]]  # the losses of the cases; gradients and, after the step, buffers


def reference(missing: str, folder: str, dtype: torch.dtype) -> Answer:
    """One process that knows no other: a first step that leaves the weights, for queues to fill, and a second."""
    module, world_size = module_of(folder, dtype), gather.world_size
    gather.world_size = lambda: 1
    try:
        module(joined_batch("none", dtype, seed=2))
        module.objective.after_step(0.1)
        loss, _ = module(joined_batch(missing, dtype, seed=1))
        loss.total.backward()
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter -= RATE * gradients[name]
        module.objective.after_step(0.2)
    finally:
        gather.world_size = world_size
    return [float(total) for total in loss.parts.values()], module.state_dict() | gradients


def under_an_engine(missing: str, folder: str, dtype: torch.dtype, zero: int, chunk: int | None) -> Answer:
    """The same two steps by the engine under test. All ranks; whole tensors on rank 0."""
    # the towers are tiny: kept whole, ZeRO-3 would have nothing to gather; as it is, it keeps norms and biases
    settings = [f"distributed.zero={zero}", "distributed.persist_below=64"]
    config = load("demo", [*settings, "log.wandb=false", "train.clip_norm=null"])
    AcceleratorState._reset_state()  # one process tries many engines; the process group stays
    accelerator = build_accelerator(config)
    module = module_of(folder, dtype)
    optimizer = torch.optim.SGD([{"params": list(module.parameters()), "lr_scale": 1.0}], lr=0.0)
    engine = Engine(accelerator, module, optimizer, clip_norm=None)
    rank, world = accelerator.process_index, accelerator.num_processes
    own = slice(rank * N // world, (rank + 1) * N // world)
    train_step(engine, joined_batch("none", dtype, seed=2).slice(own.start, own.stop), chunk, (0, 0, rank))
    engine.step()
    engine.after_step(0.1)
    before = engine.weights()
    for group in optimizer.param_groups:
        group["lr"] = RATE
    loss, _ = train_step(engine, joined_batch(missing, dtype, seed=1).slice(own.start, own.stop), chunk, (0, 1, rank))
    totals = torch.stack([total.double() for total in loss.parts.values()])
    dist.all_reduce(totals)
    engine.step()
    engine.after_step(0.2)
    after = engine.weights()
    parameters = dict(module.named_parameters())
    changed = {name: (before[name] - x) / RATE if name in parameters else x for name, x in after.items()}
    return (totals / world).tolist(), changed


def worst_errors(engine: str, cases: list[tuple[str, int | None]], folder: str) -> dict[tuple, float]:
    """For each (missing, chunk, objective, its case): error over the largest gradient. Runs on every rank."""
    zero, dtype_name = ENGINES[engine]
    dtype, worst = getattr(torch, dtype_name), {}
    for missing, chunk in cases:
        losses, found = under_an_engine(missing, folder, dtype, zero, chunk)
        if dist.get_rank() > 0:
            continue
        expected_losses, expected = reference(missing, folder, dtype)
        for index, (name, options) in enumerate(EVERY_CASE):
            own = [key for key in expected if key.startswith(f"parts.{index}.")]
            scale = max(float(expected[key].abs().max()) for key in own if ".objective." not in key)
            # without audio GRAM has no tuple, and an anchor that is audio nothing to compare with
            nothing = missing == "every sample" and (name == "gram" or options.get("anchor") == "audio")
            assert scale > 1e-3 or nothing, f"{name} {options} has no gradient: nothing would be compared"
            differences = [found[key].double() - expected[key].double() for key in own if key in found]
            errors = [difference.abs().max() / (scale or 1) for difference in differences]
            assert len(errors) == len(own)
            loss_error = abs(losses[index] - expected_losses[index]) / (abs(expected_losses[index]) or 1)
            # torch's maximum keeps a NaN, Python's drops it
            worst[missing, chunk, name, index] = float(torch.stack([*errors, torch.tensor(loss_error)]).max())
    dist.barrier()
    return worst


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("vocabulary")
    (path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return str(path)


def check(ranks, world: int, engine: str, cases: list[tuple[str, int | None]], folder: str) -> None:
    worst = ranks(world, worst_errors, engine, cases, folder, timeout=900)[0]
    assert len(worst) == len(cases) * len(EVERY_CASE)
    tolerance = TOLERANCE[ENGINES[engine][1]]
    failures = {case: error for case, error in worst.items() if not error <= tolerance}
    assert not failures, failures


def chunk_of(world: int) -> int:
    return {2: 4, 3: 3}[world]  # of 6 and of 4 rows a rank: the last chunk is a short one


def quick_rows() -> list[tuple[str, int, str, bool]]:
    """(engine, world, missing, cached): not every combination, but any two of the values meet in one."""
    return [
        (engine, 2 + (i + j) % 2, missing, (i + j // 2) % 2 == 1)
        for i, engine in enumerate(ENGINES)
        for j, missing in enumerate(MISSING)
    ]


def test_every_registered_objective_is_tested():
    assert {name for name, _ in EVERY_CASE} == set(names()) and set(CASES) <= set(names())


def test_any_two_values_meet_in_the_quick_rows():
    values = [list(ENGINES), [2, 3], list(MISSING), [False, True]]
    for a, b in itertools.combinations(range(4), 2):
        assert {(row[a], row[b]) for row in quick_rows()} == set(itertools.product(values[a], values[b]))


@pytest.mark.two_process
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_equal_one_process(ranks, world, engine, folder):
    rows = [(m, chunk_of(world) if cached else None) for e, w, m, cached in quick_rows() if (e, w) == (engine, world)]
    check(ranks, world, engine, rows, folder)


@pytest.mark.slow
@pytest.mark.two_process
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_equal_one_process_in_every_combination(ranks, world, engine, folder):
    check(ranks, world, engine, list(itertools.product(MISSING, (None, chunk_of(world)))), folder)


def test_cached_embeddings_replay_dropout(ranks, folder):
    error, apart = ranks(1, dropout_error, folder)[0]
    assert error < 1e-9 and apart > 1e-2


def dropout_error(folder: str) -> tuple[float, float]:
    """Relative difference of the cached gradients to autograd through the chunks, drawn alike; and drawn otherwise."""
    config = load("demo", ["distributed.zero=0", "log.wandb=false"])
    module = module_of(folder, torch.float64, dropout=0.3)
    optimizer = torch.optim.SGD([{"params": list(module.parameters()), "lr_scale": 1.0}], lr=0.0)
    engine = Engine(build_accelerator(config), module, optimizer, clip_norm=None)
    batch = joined_batch("all ranks", torch.float64, seed=1)

    def flat() -> torch.Tensor:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
        module.zero_grad()
        return torch.cat([g.flatten() for g in gradients])

    train_step(engine, batch, 5, (3, 7, 0))
    cached = flat()
    wanted = []
    for seed in ((3, 7, 0), (3, 8, 0)):
        parts = []
        for index, start in enumerate(range(0, N, 5)):
            seed_everything(*seed, index)
            parts.append(module(batch.slice(start, start + 5), embed_only=True))
        z = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        module(batch, z)[0].total.backward()
        wanted.append(flat())
    return tuple(float((cached - other).norm() / other.norm()) for other in wanted)
