"""Losses, forward and backward, against a naive reference of each: time, peak memory, and whether they agree.

The references below write each loss down as published code does: the whole B x B logits into `cross_entropy`
(infonce); the B x B Gram matrices stacked and handed to `torch.linalg.det` (gram); a B x B matrix of log kernels a
modality (unialign). They are fair peers: plain, fast PyTorch, the same equations with the same gradient for every
modality and for the temperature, on the same unit vectors in float32. The scores are computed once for both directions,
though the released GRAM code does so twice, and the kernels stay logarithms, because as numbers they are 0 in float32.

Time is the median of alternating runs in this process. Memory is the peak of the resident memory above its level just
before the loss, each case in a fresh process, gradients included. `difference` is the largest one between the losses
or an entry of their gradients, relative to the loss or the largest entry; 1e-3 stops the benchmark.

    .venv/bin/python benchmarks/losses.py --batch-sizes 512,1024,2048
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
from collections.abc import Callable
from itertools import combinations

import torch
from paired import alternate, listed, machine, parser, positive, table
from torch import Tensor
from torch.nn import functional as F

from trivium.objectives import Embeddings, build

NAMES = ("text", "video", "audio")
TAU = 0.07
SMOOTHING = 0.1  # gram's label smoothing, as published
NOISE = 1.0  # of the modalities about what they share: cosines near 0.5, volumes near 0.7
TOLERANCE = 1e-3

Vectors = dict[str, Tensor]


def naive_infonce(z: Vectors, scale: Tensor) -> Tensor:
    """Cross-entropy of the full logits, both directions, mean over pairs."""
    target = torch.arange(len(z["text"]))
    losses = []
    for m, n in combinations(NAMES, 2):
        logits = scale * z[m] @ z[n].T
        losses += [F.cross_entropy(logits, target), F.cross_entropy(logits.T, target)]
    return sum(losses) / len(losses)


def naive_gram(z: Vectors, scale: Tensor) -> Tensor:
    """All B x B Gram matrices of text i and (video, audio) j, their determinants, cross-entropy both ways."""
    text, others, size = z["text"], [z["video"], z["audio"]], len(z["text"])
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


def naive_unialign(z: Vectors, scale: Tensor) -> Tensor:
    """Full kernel matrices for the three modalities and the centroids, squared distances, one Gram matrix a sample."""
    text = z["text"]
    alignment = torch.stack([(text - z[name]).square().sum(-1) for name in NAMES[1:]]).mean()
    stacked = torch.stack([z[name] for name in NAMES], dim=1)
    volume = torch.linalg.det(stacked @ stacked.transpose(1, 2)).abs().sqrt().mean()
    centroids = F.normalize(stacked.mean(1), dim=-1)
    return sum(_naive_uniformity(x) for x in (*z.values(), centroids)) + alignment + volume


def _naive_uniformity(x: Tensor) -> Tensor:
    square_distances = 2 - 2 * x @ x.T
    itself = torch.eye(len(x), dtype=torch.bool)
    log_kernels = (-square_distances / (2 * TAU**2)).masked_fill(itself, -torch.inf)
    return (log_kernels.logsumexp(1) - math.log(len(x) - 1)).mean()


NAIVE = {"infonce": naive_infonce, "gram": naive_gram, "unialign": naive_unialign}
Step = Callable[[], tuple[Tensor, list[Tensor]]]  # -> the loss, and the gradients of the vectors and the temperature


def naive(name: str, size: int, dim: int, tile: int) -> Step:
    """One forward and backward of the reference."""
    z = vectors(size, dim)
    log_scale = torch.tensor([math.log(1 / TAU)], requires_grad=True)

    def run() -> tuple[Tensor, list[Tensor]]:
        loss = NAIVE[name](z, log_scale.exp())
        wanted = [*z.values()] if name == "unialign" else [*z.values(), log_scale]
        return loss.detach(), list(torch.autograd.grad(loss, wanted))

    return run


def trivium(name: str, size: int, dim: int, tile: int) -> Step:
    """One forward and backward of the objective called `name`."""
    z = vectors(size, dim)
    objective = build(name, tile=tile)

    def run() -> tuple[Tensor, list[Tensor]]:
        loss = objective(Embeddings(z)).total
        return loss.detach(), list(torch.autograd.grad(loss, [*z.values(), *objective.parameters()]))

    return run


def vectors(size: int, dim: int) -> Vectors:
    """Unit vectors (size, dim) by modality, those of a sample related; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(size, dim, generator=generator)
    each = {name: shared + NOISE * torch.randn(size, dim, generator=generator) for name in NAMES}
    return {name: F.normalize(x, dim=-1).requires_grad_() for name, x in each.items()}


def peak_mebibytes(make: Callable[..., Step], name: str, size: int, dim: int, tile: int, threads: int) -> float:
    """Peak resident memory of one forward and backward above the level before it, in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "trivium.objectives"])
    with context.Pool(1) as pool:
        return pool.apply(_peak_here, (make, name, size, dim, tile, threads))


def _peak_here(make: Callable[..., Step], name: str, size: int, dim: int, tile: int, threads: int) -> float:
    torch.set_num_threads(threads)
    make(name, 8, dim, tile)()  # what libraries set aside once
    step = make(name, size, dim, tile)
    with open("/proc/self/clear_refs", "w") as switch:
        switch.write("5")  # the peak starts again from here
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """A field of this process's status in KiB. Unlike ru_maxrss it starts anew with the process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(f"{field}:"))


def compare(name: str, size: int, dim: int, tile: int, repeats: int) -> dict[str, str]:
    """A row of the table. Raises ArithmeticError where the two losses or their gradients differ."""
    peer, ours = naive(name, size, dim, tile), trivium(name, size, dim, tile)
    difference = _difference(name, size, peer(), ours())
    times = alternate(peer, ours, repeats)
    threads = torch.get_num_threads()
    naive_peak, our_peak = (peak_mebibytes(make, name, size, dim, tile, threads) for make in (naive, trivium))
    return {
        "objective": name,
        "batch": str(size),
        "naive ms": times.peer_ms(),
        "trivium ms": times.our_ms(),
        "time ratio": f"{times.ratio():.2f}",
        "of neighbours": times.range(),
        "CPU ratio": f"{times.ratio('cpu'):.2f}",
        "naive MiB": f"{naive_peak:.0f}",
        "trivium MiB": f"{our_peak:.0f}",
        "memory ratio": f"{our_peak / naive_peak:.2f}",
        "difference": f"{difference:.0e}",
    }


def _difference(name: str, size: int, peer: tuple[Tensor, list[Tensor]], ours: tuple[Tensor, list[Tensor]]) -> float:
    loss = abs(float(ours[0] - peer[0]) / float(peer[0]))
    # each tensor against its own largest: the temperature's gradient is of another size
    gradient = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours[1], peer[1], strict=True))
    if not max(loss, gradient) < TOLERANCE:
        raise ArithmeticError(f"{name}, batch {size}: losses differ by {loss:.1e}, gradients by {gradient:.1e}")
    return max(loss, gradient)


def _objective(text: str) -> str:
    if text not in NAIVE:
        raise argparse.ArgumentTypeError(f"there is no reference of {text!r}; take some of {','.join(NAIVE)}")
    return text


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--objectives", type=listed(_objective), default=list(NAIVE), help=f"[{','.join(NAIVE)}]")
    options.add_argument("--batch-sizes", type=listed(positive), default=[512, 1024, 2048], help="[512,1024,2048]")
    options.add_argument("--dim", type=positive, default=512, help="of the vectors [512]")
    options.add_argument("--tile", type=positive, default=None, help="side of Trivium's score tiles [2048, as shipped]")
    options.add_argument("--repeats", type=positive, default=7, help="timed runs of each side [7]")
    chosen = options.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # in the processes to come freed memory is returned at once
    rows = [
        compare(name, size, chosen.dim, chosen.tile, chosen.repeats)
        for name in chosen.objectives
        for size in chosen.batch_sizes
    ]
    print(f"three modalities of {chosen.dim} dimensions, float32, tile {chosen.tile}; medians of {chosen.repeats} runs")
    print(f"{machine()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
