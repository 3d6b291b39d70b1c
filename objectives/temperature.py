"""The temperature that divides the scores of a contrastive loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..datasets.registry import InputError
from . import gather


class Temperature(nn.Module):
    """Gives the scale 1 / tau, learnt as log(1 / tau) within bounds, or constant.

    The parameter has shape (1,) (DeepSpeed cannot broadcast one of shape ()) and is clamped when it is used, not when
    it is stored: engines keep their own copy of the weights, which an in-place clamp would not reach.

    Args:
        initial: tau at the start.
        learnable: whether it is trained.
        bounds: smallest and largest tau in use.
    """

    def __init__(self, initial: float, *, learnable: bool, bounds: tuple[float, float]) -> None:
        super().__init__()
        low, high = bounds
        if not 0 < low <= high < math.inf:
            raise InputError(f"temperature_range={list(bounds)} is no range of positive numbers; use e.g. [0.01, 1.0]")
        if not low <= initial <= high:
            raise InputError(
                f"temperature={initial} is outside temperature_range={list(bounds)}; widen the range or change it"
            )
        self.initial = initial
        self.bounds = (math.log(1 / high), math.log(1 / low))
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / initial)])) if learnable else None

    def forward(self, like: Tensor) -> Tensor:
        """1 / tau, shape (1,), in the dtype (float32 or float64) and on the device of `like`."""
        if self.log_scale is None:
            return like.new_full((1,), 1 / self.initial)
        return _ClampInside.apply(self.log_scale.to(like.dtype), *self.bounds).exp()


class _ClampInside(torch.autograd.Function):
    """Clamp to [low, high]; outside, the gradient passes only where a descent step along it leads back inside.

    Which way that is, the gradient of the global loss decides: the ranks' own may differ in sign.
    """

    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:
        ctx.above, ctx.below = x > high, x < low
        return x.clamp(low, high)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        everywhere = gather.all_sum(gradient)  # all ranks
        outwards = (ctx.above & (everywhere < 0)) | (ctx.below & (everywhere > 0))
        return gradient.masked_fill(outwards, 0), None, None
