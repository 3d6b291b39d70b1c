"""A rank of `trivium doctor grad`: one training batch's gradients under every engine, held against one process's.

- First weights (the seed's, or those of init_from) and the first clips of the plan, read by each rank as in training.
- Towers in float32 and without TF32, whatever the recipe says: in bf16 the rounding would hide what is looked for.
- The one process computes in float64: that is the gradient which all others are held against. It does the same in
  float32 as a yardstick, the rows "single": where the objective magnifies rounding (a batch norm of embeddings that
  still lie close together, say), no engine can be nearer to the truth than one process is. Where a tower does not
  compute in float64, the truth is float32 and the yardstick 0.
- Dropout off. The module is in evaluation mode for that, where BERT, BEATs and timm's towers drop nothing and the
  objectives are as in training. Batch norms stay in training mode: statistics over one rank's clips are a mistake that
  must be seen. Recomputing of layers that a tower leaves out in evaluation mode (BERT) is not exercised.
- ZeRO-3 keeps whole what is smaller than the recipe's distributed.persist_below; `distributed.persist_below=0` has it
  gather everything.
- Plain SGD at a huge rate, no clipping: the gradient is the difference of the weights divided by the rate. So it has
  gone all the way to the optimizer, and no engine's inside is looked into.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..datasets.registry import InputError

if TYPE_CHECKING:
    from torch import Tensor

Answer = tuple[float, "dict[str, Tensor]"]  # the loss, and gradients by parameter name
RATE = 2.0**40  # beside RATE * gradient the weight vanishes, so the difference is rounded as the gradient itself is
RECIPE, JOB, RESULTS = "recipe.yaml", "job.json", "results.jsonl"  # files of the folder that ranks and command share


@dataclass(frozen=True)
class Agreement:
    """How well the gradients of one part of the module, found under an engine, are the expected ones.

    Attributes:
        part: "tower NAME", "head NAME", "objective", or "loss" for the loss itself.
        values: how many numbers were compared.
        difference: the largest one, as a share of the largest expected gradient of all towers and heads (of the
            objective's own parameters: of everything); of a loss as a share of it, or of 1 if that is more.
        cosine: of expected and found gradient; None where one is zero, and for the loss.
        norm_ratio: found to expected; None likewise.
    """

    part: str
    values: int
    difference: float
    cosine: float | None = None
    norm_ratio: float | None = None


def main() -> None:
    """`python -m trivium.launch.gradients FOLDER`: one rank. A failure is told to the command in a file of its own."""
    from ..datasets.processes import end_with_the_parent, wait_without_spinning

    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    try:
        end_with_the_parent(signal.SIGKILL)
        wait_without_spinning()
        be_rank(folder)
    except BaseException as error:
        line = " ".join(str(error).split())
        mistake = isinstance(error, InputError)
        note = {"rank": rank, "mistake": mistake, "line": line if mistake else f"{type(error).__name__}: {line}"}
        scratch = folder / f"failed-{rank}.partial"
        scratch.write_text(json.dumps(note))
        scratch.replace(folder / f"failed-{rank}.json")
        raise


def be_rank(folder: Path) -> None:
    """All engines and forms, one after another. All ranks; rank 0 compares and writes."""
    import torch

    from ..datasets.stream import train_batches
    from ..pretrain.build import build_module, source_of
    from ..pretrain.config import load

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    job, config = json.loads((folder / JOB).read_text()), load(str(folder / RECIPE))
    source = source_of(config, build_module(config, None, []).model, config.data.train)

    def clips(rank: int, world: int):
        """The rank's part of the first batch."""
        split = {"batch_size": job["batch_size"], "rank": rank, "world": world}
        batch = next(iter(train_batches(source, **split, seed=config.seed, start_step=0, steps=1, workers=0)))
        if batch.error:
            raise InputError(batch.error)
        return batch

    own = clips(rank, world)
    expected = None

    def write(zero: int | None, chunk: int | None, found: Answer) -> None:
        agreements = [compare_losses(expected[0], found[0]), *compare(expected[1], found[1])]
        line = {"zero": zero, "chunk": chunk, "agreements": [asdict(one) for one in agreements]}
        with (folder / RESULTS).open("a") as results:
            results.write(json.dumps(line) + "\n")

    if rank == 0:  # before there is a process group: it knows no other, and the ranks that wait know nothing of this
        joined = clips(0, 1)
        expected, yardstick = references(config, joined)
        check_reference(config, joined, expected)
        write(None, None, yardstick)
    for zero, chunk in job["steps"]:
        gc.collect()  # what the step before has left: an engine's hooks are cycles
        torch.cuda.empty_cache()
        found = under_engine(config, zero, own, chunk)
        if rank == 0:
            write(zero, chunk, found)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def references(config, batch) -> tuple[Answer, Answer]:
    """The truth, and the same in float32; that is both where a part of the user's knows no other."""
    import torch

    in_float32 = one_process(config, batch, torch.float32)
    try:
        return one_process(config, batch, torch.float64), in_float32
    except RuntimeError:  # "expected Float but found Double"
        return in_float32, in_float32


def one_process(config, batch, dtype) -> Answer:
    """By plain autograd in this process alone, gradients on the CPU."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = build(config).to(device, dtype)
    inputs = {
        name: {key: x.to(dtype) if x.is_floating_point() else x for key, x in parts.items()}
        for name, parts in batch.inputs.items()
    }
    batch = replace(batch, inputs=inputs).to(device)
    if remembers(module.objective):
        module(batch)
        module.objective.after_step(0.0)
    loss, _ = module(batch)
    loss.total.backward()
    gradients = {
        name: (torch.zeros_like(p) if p.grad is None else p.grad).cpu()
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    return float(loss.total.detach()), gradients


def check_reference(config, batch, expected: Answer) -> None:
    """Raise InputError when there is nothing to compare with."""
    loss, gradients = expected
    broken = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    if broken or not math.isfinite(loss):
        what = f"the gradient of {broken[0]}" if broken else "the loss"
        raise InputError(
            f"{what} is not finite in one process already, so there is nothing to compare with; see if the objective's "
            "options suit the first weights, or begin with others by init_from="
        )
    if not any(gradient.any() for name, gradient in gradients.items() if part_of(name) != "objective"):
        raise InputError(
            f"objective {config.objective.name!r} gives the towers no gradient for the first {len(batch)} clips, so "
            "there is nothing to compare; use a larger --batch-size"
        )


def under_engine(config, zero: int, batch, chunk: int | None) -> Answer:
    """By one training step under an engine, each rank having its part of the batch. All ranks; rank 0 has
    the gradients."""
    import torch
    from accelerate.state import AcceleratorState

    from ..objectives import gather
    from ..pretrain.engine import Engine, build_accelerator
    from ..pretrain.step import train_step

    # one process makes many engines, DDP first, for DeepSpeed leaves its mark on the environment; the group stays
    AcceleratorState._reset_state(reset_partial_state=True)
    distributed = config.distributed.model_copy(update={"zero": zero})
    accelerator = build_accelerator(config.model_copy(update={"distributed": distributed}))
    module = build(config)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([{"params": parameters, "lr_scale": 1.0}], lr=0.0)  # DeepSpeed tries it once
    engine = Engine(accelerator, module, optimizer, clip_norm=None)
    batch, seed = batch.to(engine.device), (config.seed, 0, accelerator.process_index)
    if remembers(module.objective):
        train_step(engine, batch, chunk, seed)
        engine.step()
        engine.after_step(0.0)
    before = engine.weights()
    for group in optimizer.param_groups:
        group["lr"] = RATE
    loss, _ = train_step(engine, batch, chunk, seed)
    total = gather.all_sum(loss.total.detach().double()) / gather.world_size()
    engine.step()
    after = engine.weights()
    if zero:
        engine.prepared.destroy()
    return float(total), {name: (before[name] - x) / RATE for name, x in after.items() if name in trained}


def build(config):
    """The recipe's module at its first weights, frozen as it says, with dropout off."""
    from ..pretrain.build import build_module
    from ..pretrain.optim import freeze

    module = build_module(config, None, [])
    freeze(module, config.train)
    turn_dropout_off(module)
    return module


def turn_dropout_off(module) -> None:
    """Evaluation mode for all but batch norms, whose statistics must be seen."""
    from torch.nn.modules.batchnorm import _BatchNorm

    module.eval()
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.train()


def remembers(objective) -> bool:
    """Whether it keeps something from step to step. Then it sees the batch once before, with the weights held: a queue
    that is empty would be checked by nothing."""
    return any(True for _ in objective.buffers())


# -- the comparison ---------------------------------------------------------------------------------------------------


def compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[Agreement]:
    """An Agreement for each part of the module, its gradients given by parameter name."""
    import torch

    parts: dict[str, list[str]] = {}
    for name in expected:
        parts.setdefault(part_of(name), []).append(name)
    largest = {part: max(float(expected[name].abs().max()) for name in names) for part, names in parts.items()}
    of_all = max(largest.values())
    # a temperature's large gradient must not make room for errors of the towers
    of_model = max((x for part, x in largest.items() if part != "objective"), default=of_all)
    agreements = []
    for part, names in parts.items():
        worst, sums = torch.zeros((), dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        for name in names:  # one at a time, for float64 doubles the memory
            e, f = expected[name].double().flatten(), found[name].double().flatten()
            worst = torch.maximum(worst, (f - e).abs().max())  # torch's maximum keeps a NaN, Python's drops it
            sums += torch.stack([e @ f, e @ e, f @ f])
        ef, ee, ff = sums.tolist()
        scale = of_all if part == "objective" else of_model
        difference = float(worst) / scale if scale else (0.0 if worst == 0 else math.inf)
        cosine = None if 0 in (ee, ff) else ef / math.sqrt(ee) / math.sqrt(ff)
        ratio = None if ee == 0 else math.sqrt(ff / ee)
        agreements.append(Agreement(part, sum(expected[name].numel() for name in names), difference, cosine, ratio))
    return agreements


def compare_losses(expected: float, found: float) -> Agreement:
    return Agreement("loss", 1, abs(found - expected) / max(1.0, abs(expected)))


def part_of(parameter: str) -> str:
    """The part of the module that a parameter belongs to, as the table calls it."""
    whose, *path = parameter.split(".")
    return "objective" if whose == "objective" else f"{path[0].removesuffix('s')} {path[1]}"


if __name__ == "__main__":
    main()
