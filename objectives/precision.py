"""Matrix products of losses: full float32 whatever the towers run in, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """No autocast, no TF32 and no bf16 passes inside float32 matrix products."""
    matmul = torch.backends.cuda.matmul
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # somebody used torch's newer switch, after which the older one refuses to be read
        newer, matmul.fp32_precision = matmul.fp32_precision, "ieee"
        restore = lambda: setattr(matmul, "fp32_precision", newer)  # noqa: E731
    else:
        torch.set_float32_matmul_precision("highest")
        restore = lambda: torch.set_float32_matmul_precision(before)  # noqa: E731
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        restore()


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """x (n, d) @ y (d, m) in full precision; its backward too, whatever is switched on when that runs."""
    return _Product.apply(x, y)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        with full_precision(x.device.type):
            return x @ y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, y = ctx.saved_tensors
        with full_precision(x.device.type):
            return (
                gradient @ y.T if ctx.needs_input_grad[0] else None,
                x.T @ gradient if ctx.needs_input_grad[1] else None,
            )
