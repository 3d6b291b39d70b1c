"""Softmax normalisers of a score matrix that is never stored: one primitive for every contrastive objective.

A score matrix has this rank's n samples as rows and all N samples of the global batch as columns. It is visited tile
by tile; the forward keeps one log-sum-exp per row and per column, the backward computes each tile again and gives the
exact gradient. Memory is O(tile² + N D) instead of O(n N).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import gather

Inputs = tuple[Tensor, ...]
Score = Callable[[Inputs, Inputs, Inputs], Tensor]


@dataclass(frozen=True)
class Marginals:
    """What is kept of a score matrix with n rows and N columns; None where it was not asked for.

    Attributes:
        row_lse: (n,), log-sum-exp over the columns that count; -inf where there is none, and for masked rows.
        column_lse: (N,), log-sum-exp over the rows of all ranks; -inf as above. The same on every rank.
        row_sum: (n,), plain sum of the scores over the columns that count.
        column_sum: (N,), plain sum over the rows of all ranks. The same on every rank.
    """

    row_lse: Tensor
    column_lse: Tensor | None
    row_sum: Tensor | None
    column_sum: Tensor | None


def tiled_logsumexp(
    score: Score,
    rows: Inputs,
    columns: Inputs,
    shared: Inputs = (),
    *,
    row_mask: Tensor | None = None,
    column_mask: Tensor | None = None,
    row_ids: Tensor | None = None,
    row_only: bool = False,
    sums: bool = False,
    tile: int = 2048,
) -> Marginals:
    """Log-sum-exp of every row and every column of `score(rows, columns, shared)`. All ranks.

    Rows belong to this rank, so their results need no communication; column results are merged over ranks. Give the
    columns as `Embeddings.columns` does: their gradient is this rank's part, and the gather's backward adds the parts
    up. The mean over ranks of the ranks' losses is the global loss, as everywhere.

    Args:
        score: a pure function (t row inputs, u column inputs, shared inputs) -> (t, u) that treats every pair alike
            and is finite, with finite gradients, for inputs of zeros (masked samples are seen as zeros).
        rows: tensors (n, ...), this rank's side.
        columns: tensors (N, ...), the gathered side.
        shared: tensors that every tile gets whole, such as a temperature.
        row_mask: bool (n,); rows that are False enter nothing.
        column_mask: bool (N,); columns that are False enter nothing, whatever they hold.
        row_ids: int64 (n,), index of each row among the columns: leaves a sample out of its own sum.
        row_only: skip the column side and its collectives.
        sums: also return plain sums of the scores.
        tile: largest number of rows and of columns in memory at a time; the result does not depend on it.

    float64 inputs are scored in float64, all others in full float32: no autocast, no TF32.
    """
    n, total = rows[0].shape[0], columns[0].shape[0]
    device = rows[0].device
    plan = _Plan(
        score=score,
        sides=(len(rows), len(columns)),
        row_mask=torch.ones(n, dtype=torch.bool, device=device) if row_mask is None else row_mask,
        column_mask=torch.ones(total, dtype=torch.bool, device=device) if column_mask is None else column_mask,
        row_ids=row_ids,
        row_only=row_only,
        sums=sums,
        tile=tile,
    )
    return Marginals(*_TiledLogSumExp.apply(plan, *rows, *columns, *shared))


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


@dataclass(frozen=True)
class _Plan:
    """Everything about one call but its differentiable tensors, which come as one flat tuple."""

    score: Score
    sides: tuple[int, int]
    row_mask: Tensor
    column_mask: Tensor
    row_ids: Tensor | None
    row_only: bool
    sums: bool
    tile: int

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        for row in range(0, len(self.row_mask), self.tile):
            for column in range(0, len(self.column_mask), self.tile):
                yield slice(row, row + self.tile), slice(column, column + self.tile)

    def window(self, index: int, r: slice, c: slice) -> slice:
        """The part of tensor `index` that the tile (r, c) sees."""
        if index < self.sides[0]:
            return r
        return c if index < sum(self.sides) else slice(None)

    def scores(self, parts: list[Tensor], r: slice, c: slice) -> tuple[Tensor, Tensor]:
        """Scores (t, u) of one tile from its parts of the tensors, and which of them count."""
        split, end = self.sides[0], sum(self.sides)
        rows = tuple(_keep(x, self.row_mask[r]) for x in parts[:split])
        columns = tuple(_keep(x, self.column_mask[c]) for x in parts[split:end])
        allowed = self.row_mask[r, None] & self.column_mask[None, c]
        if self.row_ids is not None:
            ids = torch.arange(len(self.column_mask), device=allowed.device)[c]
            allowed = allowed & (self.row_ids[r, None] != ids[None])
        return self.score(rows, columns, tuple(parts[end:])), allowed


class _TiledLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: _Plan, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(tensors[0].device.type):
            found = _reduce(plan, tensors)
        ctx.plan = plan
        ctx.save_for_backward(*tensors, found.row_lse, found.column_lse)
        return found.row_lse, found.column_lse, found.row_sum, found.column_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, d_row_lse, d_column_lse, d_row_sum, d_column_sum):
        plan = ctx.plan
        *tensors, row_lse, column_lse = ctx.saved_tensors
        if not plan.row_only:  # a column's result reached the losses of all ranks
            d_column_lse = gather.all_sum(d_column_lse)  # all ranks
            d_column_sum = gather.all_sum(d_column_sum) if plan.sums else None  # all ranks
        needed = [index for index, need in enumerate(ctx.needs_input_grad[1:]) if need]
        gradients = [torch.zeros_like(x) if index in needed else None for index, x in enumerate(tensors)]
        with full_precision(tensors[0].device.type):
            for r, c in plan.tiles():
                parts = [x[plan.window(index, r, c)].detach() for index, x in enumerate(tensors)]
                leaves = [parts[index].requires_grad_() for index in needed]
                with torch.enable_grad():
                    scores, allowed = plan.scores(parts, r, c)
                masked = scores.detach().masked_fill(~allowed, -torch.inf)
                weights = _share(masked, row_lse[r, None]) * d_row_lse[r, None]
                if not plan.row_only:
                    weights += _share(masked, column_lse[None, c]) * d_column_lse[None, c]
                if plan.sums:
                    weights += allowed * (d_row_sum[r, None] + (0 if plan.row_only else d_column_sum[None, c]))
                for index, gradient in zip(needed, torch.autograd.grad(scores, leaves, weights), strict=True):
                    gradients[index][plan.window(index, r, c)] += gradient
        return None, *gradients


def _share(scores: Tensor, lse: Tensor) -> Tensor:
    """d lse / d score. A sum over nothing is -inf; a finite stand-in gives its scores, all -inf, the share 0."""
    return (scores - lse.masked_fill(lse == -torch.inf, 0)).exp()


def _reduce(plan: _Plan, tensors: tuple[Tensor, ...]) -> Marginals:
    """Forward: one visit of all tiles; then the columns are merged over ranks."""
    like, n, total = tensors[0], len(plan.row_mask), len(plan.column_mask)
    row_lse, column_lse = like.new_full((n,), -torch.inf), like.new_full((total,), -torch.inf)
    row_sum, column_sum = like.new_zeros(n), like.new_zeros(total)
    for r, c in plan.tiles():
        parts = [x[plan.window(index, r, c)] for index, x in enumerate(tensors)]
        scores, allowed = plan.scores(parts, r, c)
        if plan.sums:
            plain = scores.masked_fill(~allowed, 0)
            row_sum[r] += plain.sum(1)
            column_sum[c] += plain.sum(0)
        scores = scores.masked_fill(~allowed, -torch.inf)
        row_lse[r] = torch.logaddexp(row_lse[r], scores.logsumexp(1))
        if not plan.row_only:
            column_lse[c] = torch.logaddexp(column_lse[c], scores.logsumexp(0))
    if plan.row_only:
        return Marginals(row_lse, None, row_sum if plan.sums else None, None)
    peak = gather.all_max(column_lse)  # all ranks
    peak = peak.masked_fill(peak == -torch.inf, 0)
    column_lse = gather.all_sum((column_lse - peak).exp()).log() + peak  # all ranks
    if not plan.sums:
        return Marginals(row_lse, column_lse, None, None)
    return Marginals(row_lse, column_lse, row_sum, gather.all_sum(column_sum))  # all ranks


def _keep(x: Tensor, mask: Tensor) -> Tensor:
    """x with zeros where the mask (t,) is False: 0 * NaN would be NaN in a matrix product and in its gradient."""
    return x.masked_fill(~mask.view(-1, *[1] * (x.ndim - 1)), 0)
