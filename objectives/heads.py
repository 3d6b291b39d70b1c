"""Projection heads of self-supervised objectives: linear layers with batch normalisation over the global batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .embeddings import Embeddings
from .precision import matmul

BATCH_NORM_EPSILON = 1e-5


class Head(nn.Module):
    """Linear -> batch norm -> ReLU, again and again, and a last Linear (with batch norm if asked for).

    Batch norm takes its statistics over the samples of the global batch that are there, so ranks and missing
    modalities change nothing. It keeps no running averages: heads are used in training only.

    Args:
        widths: of the input and of every layer's output.
        last_norm: batch norm, without scale and shift, after the last layer too (SimSiam's projector).
    """

    def __init__(self, widths: Sequence[int], *, last_norm: bool = False) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        # no bias in front of a batch norm, which would remove it
        self.linears = nn.ModuleList(
            nn.Linear(a, b, bias=index == len(pairs) - 1 and not last_norm) for index, (a, b) in enumerate(pairs)
        )
        self.norms = nn.ModuleList(_GlobalBatchNorm(b) for _, b in pairs[:-1])
        self.last_norm = last_norm

    def forward(self, z: Embeddings, x: Tensor, valid: Tensor) -> Tensor:
        """(n, widths[0]) -> (n, widths[-1]); `valid` (n,) says which rows count. All ranks."""
        for linear, norm in zip(self.linears[:-1], self.norms, strict=True):
            x = norm(z, matmul(x, linear.weight.T), valid).relu()
        for linear in self.linears[-1:]:
            x = matmul(x, linear.weight.T) + (0 if linear.bias is None else linear.bias)
        return batch_normalise(z, x, valid) if self.last_norm else x


class _GlobalBatchNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, z: Embeddings, x: Tensor, valid: Tensor) -> Tensor:
        return batch_normalise(z, x, valid) * self.weight + self.bias


def batch_normalise(z: Embeddings, x: Tensor, valid: Tensor) -> Tensor:
    """x (n, d) with mean 0 and (biased) variance 1 over the valid rows of the global batch. All ranks."""
    mean, variance = moments(z, x, valid)
    return (x - mean) / (variance + BATCH_NORM_EPSILON).sqrt()


def moments(z: Embeddings, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (d,) of x (n, d) over the valid rows of the global batch, whole. All ranks."""
    count = z.count(valid).to(x.dtype).clamp_min(1)
    rows = valid[:, None].to(x.dtype)
    mean = z.all_sum((x * rows).sum(0)) / count
    return mean, z.all_sum(((x - mean).square() * rows).sum(0)) / count


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy whose weights are buffers: no optimizer and no engine touches them, checkpoints keep them."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach().clone())
    return copied


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """Move the weights of a `frozen_copy` towards those of the module: w <- momentum w + (1 - momentum) online."""
    for name, parameter in online.named_parameters():
        target.get_buffer(name).lerp_(parameter.to(target.get_buffer(name).dtype), 1 - momentum)
