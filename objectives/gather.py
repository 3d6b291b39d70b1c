"""The collectives of the losses: one differentiable gather over ranks, and sums and maxima that every rank agrees on.

The convention, used everywhere: each rank returns its own loss, the engine averages parameter gradients over ranks,
and the mean of the ranks' losses is the global loss. Under it the exact backward of "every rank sees x" is the *sum*
over ranks of the incoming gradients: a reduce-scatter for the gather, an all-reduce for the sum. Without
`torch.distributed` each function is the identity. All ranks call them in the same order with equal shapes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        out = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(out, x.contiguous())  # all ranks
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        n = gradient.shape[0] // world_size()
        if dist.get_backend() == "gloo":  # has no reduce-scatter
            everywhere = gradient.clone(memory_format=torch.contiguous_format)  # autograd may use `gradient` again
            dist.all_reduce(everywhere)  # all ranks
            return everywhere.narrow(0, rank() * n, n).clone()
        out = gradient.new_empty((n, *gradient.shape[1:]))
        dist.reduce_scatter_tensor(out, gradient.contiguous())  # all ranks
        return out


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out)  # all ranks
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        out = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out)  # all ranks
        return out


def gather_rows(x: Tensor) -> Tensor:
    """Concatenate x (n, ...) of all ranks to (N, ...), in rank order. Backward: reduce-scatter sum."""
    if world_size() == 1:
        return x
    if x.dtype == torch.bool:
        return _GatherRows.apply(x.to(torch.uint8)).bool()
    return _GatherRows.apply(x)


def all_sum(x: Tensor) -> Tensor:
    """Sum x over ranks, elementwise. Backward: all-reduce sum."""
    return x if world_size() == 1 else _AllSum.apply(x)


def all_max(x: Tensor) -> Tensor:
    """Maximum of x over ranks, elementwise; not differentiable."""
    out = x.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(out, op=dist.ReduceOp.MAX)  # all ranks
    return out
