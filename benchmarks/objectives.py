"""Objectives, forward and backward, against a named peer of each: time, peak memory, and whether they agree.

| case | peer |
| --- | --- |
| infonce | open_clip's ClipLoss, two modalities |
| siglip | open_clip's SigLipLoss, two modalities |
| gram-3, gram-4 | stacked B x B Gram matrices and torch.linalg.det, as published code has it; 3 and 4 modalities |
| unialign | a B x B matrix of log kernels for each of three modalities and the centroids |

The peers without a library are written here plainly, with the same gradient for every modality and the temperature;
the kernels stay logarithms, because as numbers they are 0 in float32.

Time is the median of alternating runs in this process. Memory is the peak of the resident memory above its level just
before the loss, each side in a fresh process, gradients included. `difference` is the largest one between the losses
or an entry of their gradients, relative to the loss or the largest entry; 1e-3 stops the benchmark. The second table
has Trivium alone at growing batches.

    .venv/bin/python benchmarks/objectives.py
    .venv/bin/python benchmarks/objectives.py --cases gram-3 --batch-size 1024 --tile 256
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from paired import alternate, listed, machine, parser, positive, table
from torch import Tensor
from torch.nn import functional as F

from trivium.objectives import Embeddings, build

TAU = 0.07
SMOOTHING = 0.1  # gram's label smoothing, as published
NOISE = 1.0  # of the modalities about what they share: cosines near 0.5, volumes near 0.7
TOLERANCE = 1e-3

Vectors = dict[str, Tensor]
Step = Callable[[], tuple[Tensor, list[Tensor]]]  # -> the loss, and the gradients of the vectors and of the scales


def clip_loss(z: Vectors, scale: Tensor) -> Tensor:
    from open_clip.loss import ClipLoss

    return ClipLoss()(z["text"], z["video"], scale)


def siglip_loss(z: Vectors, scale: Tensor, bias: Tensor) -> Tensor:
    from open_clip.loss import SigLipLoss

    return SigLipLoss()(z["text"], z["video"], scale, bias)


def stacked_gram(z: Vectors, scale: Tensor) -> Tensor:
    """All B x B Gram matrices of text i and the others' tuple j, their determinants, cross-entropy both ways."""
    text, *others = z.values()
    size = len(text)
    corner = text.square().sum(-1)[:, None].expand(size, size)
    border = [text @ other.T for other in others]
    inner = [[(x * y).sum(-1)[None].expand(size, size) for y in others] for x in others]
    rows = [[corner, *border], *([edge, *row] for edge, row in zip(border, inner, strict=True))]
    grams = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    logits = -scale * torch.linalg.det(grams).abs().sqrt()
    target = torch.arange(size)
    there = F.cross_entropy(logits, target, label_smoothing=SMOOTHING)
    back = F.cross_entropy(logits.T, target, label_smoothing=SMOOTHING)
    return (there + back) / 2


def full_kernels(z: Vectors) -> Tensor:
    """Squared distances of all pairs in each modality and of the centroids, and one Gram matrix a sample."""
    text, *others = z.values()
    alignment = torch.stack([(text - other).square().sum(-1) for other in others]).mean()
    stacked = torch.stack([*z.values()], dim=1)
    volume = torch.linalg.det(stacked @ stacked.transpose(1, 2)).abs().sqrt().mean()
    centroids = F.normalize(stacked.mean(1), dim=-1)
    return sum(_uniformity(x) for x in (*z.values(), centroids)) + alignment + volume


def _uniformity(x: Tensor) -> Tensor:
    square_distances = 2 - 2 * x @ x.T
    itself = torch.eye(len(x), dtype=torch.bool)
    log_kernels = (-square_distances / (2 * TAU**2)).masked_fill(itself, -torch.inf)
    return (log_kernels.logsumexp(1) - math.log(len(x) - 1)).mean()


class Case(NamedTuple):
    """What is compared.

    Attributes:
        objective: registered name; its options are the peer's.
        options: of the objective.
        peer: the other side, a function of the vectors and of the scalars that learn.
        scalars: starts of the scalars: the logarithm of the scale, and the bias.
        names: modalities.
        size: samples in the batch.
    """

    objective: str
    options: dict
    peer: Callable[..., Tensor]
    scalars: tuple[float, ...]
    names: tuple[str, ...]
    size: int


SCALE = (math.log(1 / TAU),)
CASES = {
    "infonce": Case("infonce", {}, clip_loss, SCALE, ("text", "video"), 8192),
    "siglip": Case("siglip", {}, siglip_loss, (math.log(10), -10.0), ("text", "video"), 8192),
    "gram-3": Case("gram", {}, stacked_gram, SCALE, ("text", "video", "audio"), 2048),
    "gram-4": Case("gram", {}, stacked_gram, SCALE, ("text", "video", "audio", "depth"), 2048),
    "unialign": Case("unialign", {}, full_kernels, (), ("text", "video", "audio"), 8192),
}


def peer(case: Case, dim: int, tile: int | None) -> Step:
    """One forward and backward of the other side."""
    z = vectors(case, dim)
    scalars = [torch.tensor(value, requires_grad=True) for value in case.scalars]

    def run() -> tuple[Tensor, list[Tensor]]:
        loss = case.peer(z, *(scalar.exp() if index == 0 else scalar for index, scalar in enumerate(scalars)))
        return loss.detach(), list(torch.autograd.grad(loss, [*z.values(), *scalars]))

    return run


def trivium(case: Case, dim: int, tile: int | None) -> Step:
    """One forward and backward of the objective."""
    z = vectors(case, dim)
    objective = build(case.objective, **case.options, tile=tile)
    learnt = dict(objective.named_parameters())
    scalars = [learnt[name] for name in ("temperature.log_scale", "bias") if name in learnt]

    def run() -> tuple[Tensor, list[Tensor]]:
        loss = objective(Embeddings(z)).total
        return loss.detach(), list(torch.autograd.grad(loss, [*z.values(), *scalars]))

    return run


def vectors(case: Case, dim: int) -> Vectors:
    """Unit vectors (size, dim) by modality, those of a sample related; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(case.size, dim, generator=generator)
    each = {name: shared + NOISE * torch.randn(case.size, dim, generator=generator) for name in case.names}
    return {name: F.normalize(x, dim=-1).requires_grad_() for name, x in each.items()}


def peak_mebibytes(make: Callable[..., Step], case: Case, dim: int, tile: int | None, threads: int) -> float:
    """Peak resident memory of one forward and backward above the level before it, in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "trivium.objectives"])
    with context.Pool(1) as pool:
        return pool.apply(_peak_here, (make, case, dim, tile, threads))


def _peak_here(make: Callable[..., Step], case: Case, dim: int, tile: int | None, threads: int) -> float:
    torch.set_num_threads(threads)
    make(case._replace(size=8), dim, tile)()  # what libraries set aside once
    step = make(case, dim, tile)
    with open("/proc/self/clear_refs", "w") as switch:
        switch.write("5")  # the peak starts again from here
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """A field of this process's status in KiB. Unlike ru_maxrss it starts anew with the process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(f"{field}:"))


def compare(name: str, case: Case, dim: int, tile: int | None, repeats: int) -> dict[str, str]:
    """A row of the first table. Raises ArithmeticError where the two losses or their gradients differ."""
    theirs, ours = peer(case, dim, tile), trivium(case, dim, tile)
    difference = _difference(name, theirs(), ours())
    times = alternate(theirs, ours, repeats)
    threads = torch.get_num_threads()
    their_peak, our_peak = (peak_mebibytes(make, case, dim, tile, threads) for make in (peer, trivium))
    return {
        "case": name,
        "batch": str(case.size),
        "peer ms": times.peer_ms(),
        "trivium ms": times.our_ms(),
        "time ratio": f"{times.ratio():.2f}",
        "of neighbours": times.range(),
        "times faster": f"{1 / times.ratio():.1f}",
        "peer MiB": f"{their_peak:.0f}",
        "trivium MiB": f"{our_peak:.0f}",
        "times smaller": f"{their_peak / our_peak:.1f}",
        "difference": f"{difference:.0e}",
    }


def _difference(name: str, theirs: tuple[Tensor, list[Tensor]], ours: tuple[Tensor, list[Tensor]]) -> float:
    loss = abs(float(ours[0] - theirs[0]) / float(theirs[0]))
    # each tensor against its own largest: the temperature's gradient is of another size
    gradient = max(
        float((a - b.reshape(a.shape)).abs().max() / b.abs().max()) for a, b in zip(ours[1], theirs[1], strict=True)
    )
    if not max(loss, gradient) < TOLERANCE:
        raise ArithmeticError(f"{name}: losses differ by {loss:.1e}, gradients by {gradient:.1e}")
    return max(loss, gradient)


def growth(name: str, case: Case, sizes: list[int], dim: int, tile: int | None) -> dict[str, str]:
    """A row of the second table: peak memory at growing batches."""
    threads = torch.get_num_threads()
    peaks = {size: peak_mebibytes(trivium, case._replace(size=size), dim, tile, threads) for size in sizes}
    return {"case": name} | {f"MiB at {size}": f"{peak:.0f}" for size, peak in peaks.items()}


def _case(text: str) -> str:
    if text not in CASES:
        raise argparse.ArgumentTypeError(f"there is no case {text!r}; take some of {','.join(CASES)}")
    return text


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--cases", type=listed(_case), default=list(CASES), help=f"[{','.join(CASES)}]")
    options.add_argument("--batch-size", type=positive, help="of every case [2048 for gram, else 8192]")
    options.add_argument("--dim", type=positive, default=512, help="of the vectors [512]")
    options.add_argument("--tile", type=positive, help="side of Trivium's score tiles [512 on a CPU]")
    options.add_argument("--repeats", type=positive, default=5, help="timed runs of each side [5]")
    options.add_argument(
        "--growth", type=listed(positive), default=[4096, 8192, 16384, 32768], help="batches of the second table"
    )
    chosen = options.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # in the processes to come freed memory is returned at once
    cases = {name: CASES[name] for name in chosen.cases}
    if chosen.batch_size:
        cases = {name: case._replace(size=chosen.batch_size) for name, case in cases.items()}
    rows = [compare(name, case, chosen.dim, chosen.tile, chosen.repeats) for name, case in cases.items()]
    print(f"{chosen.dim} dimensions, float32; medians of {chosen.repeats} runs\n{machine()}\n\n{table(rows)}\n")
    grown = [growth(name, case, chosen.growth, chosen.dim, chosen.tile) for name, case in cases.items()]
    print(f"Peak memory of Trivium alone\n\n{table(grown)}")


if __name__ == "__main__":
    main()
