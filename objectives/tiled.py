"""Marginals of a score matrix that is never stored: one primitive for every objective that compares all with all.

A score matrix has this rank's n samples as rows and all N samples of the global batch as columns. It is visited tile
by tile; the forward keeps one number per row and per column, the backward computes each tile again and gives the exact
gradient. Memory is O(tile² + N D) instead of O(n N).

Where rows and columns are both asked for, one exponential of a tile serves both, in the forward and in the backward:
relative to the tile's maximum every row and column must keep a sum above e^-60, which float32 holds exactly enough.
A tile in which one does not (temperatures near 0.01) is done again with an exponential for each side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import gather
from .precision import full_precision

TILED_MEMORY = "O(tile² + N D): score tiles, computed again in the backward pass"
Inputs = tuple[Tensor, ...]
Score = Callable[[Inputs, Inputs, Inputs], Tensor]

# Below, what float32 loses (entries under e^-87 of the maximum, thousands of them) is no longer negligible
SMALLEST_SUM = math.exp(-60)


@dataclass(frozen=True)
class Marginals:
    """What is kept of a score matrix with n rows and N columns; None where it was not asked for.

    Attributes:
        row_lse: (n,), log-sum-exp over the columns that count; -inf where there is none, and for masked rows.
        column_lse: (N,), log-sum-exp over the rows of all ranks; -inf as above. The same on every rank.
        row_sum: (n,), plain sum of the scores over the columns that count; 0 for masked rows.
        column_sum: (N,), plain sum over the rows of all ranks; 0 for masked columns. The same on every rank.
    """

    row_lse: Tensor | None
    column_lse: Tensor | None
    row_sum: Tensor | None
    column_sum: Tensor | None


def marginals(
    score: Score,
    rows: Inputs,
    columns: Inputs,
    shared: Inputs = (),
    *,
    row_mask: Tensor | None = None,
    column_mask: Tensor | None = None,
    own: int | None = None,
    rows_only: bool = False,
    symmetric_at: int | None = None,
    lse: bool = True,
    sums: bool = False,
    tile: int | None = None,
) -> Marginals:
    """Log-sum-exp or plain sum of every row and every column of `score(rows, columns, shared)`. All ranks.

    Rows belong to this rank, so their results need no communication; column results are merged over ranks. Give the
    columns as `Embeddings.columns` does: their gradient is this rank's part, and the gather's backward adds the parts
    up. The mean over ranks of the ranks' losses is the global loss, as everywhere.

    Args:
        score: a pure function (t row inputs, u column inputs, shared inputs) -> new tensor (t, u) that treats every
            pair alike and is finite, with finite gradients, also for inputs of zeros (so masked samples are seen).
        rows: tensors (n, ...), this rank's side.
        columns: tensors (N, ...), the gathered side.
        shared: tensors that every tile gets whole, such as a temperature.
        row_mask: bool (n,); rows that are False enter nothing, whatever they hold.
        column_mask: bool (N,); likewise.
        own: the column of row 0, row i having column `own + i`: leaves a sample out of its own marginals.
        rows_only: skip the column side and its collectives.
        symmetric_at: the score is symmetric and rows i are columns `symmetric_at + i`, masks too: of that block half is
            computed. With `rows_only` and log-sum-exps alone.
        lse: return log-sum-exps.
        sums: return plain sums.
        tile: largest number of rows and of columns in memory at a time; the result does not depend on it. By default
            512 on a CPU (a tile stays in its cache), 4096 on a GPU.

    float64 inputs are scored in float64, all others in full float32: no autocast, no TF32.
    """
    assert symmetric_at is None or (rows_only and lse and not sums)
    row_mask, column_mask = _unless_all(row_mask), _unless_all(column_mask)
    plan = _Plan(
        score=score,
        sides=(len(rows), len(columns)),
        shape=(rows[0].shape[0], columns[0].shape[0]),
        row_mask=row_mask,
        column_mask=column_mask,
        own=own,
        rows_only=rows_only,
        symmetric_at=symmetric_at,
        lse=lse,
        sums=sums,
        tile=tile or (4096 if rows[0].is_cuda else 512),
    )
    rows, columns = _keep(rows, row_mask), _keep(columns, column_mask)
    return Marginals(*_Marginals.apply(plan, *rows, *columns, *shared))


def _unless_all(mask: Tensor | None) -> Tensor | None:
    return None if mask is None or bool(mask.all()) else mask


def _keep(inputs: Inputs, mask: Tensor | None) -> Inputs:
    """Zeros where the mask (t,) is False: 0 * NaN would be NaN in a matrix product and in its gradient."""
    if mask is None:
        return inputs
    return tuple(x.masked_fill(~mask.view(-1, *[1] * (x.ndim - 1)), 0) for x in inputs)


@dataclass(frozen=True)
class _Plan:
    """Everything about one call but its differentiable tensors, which come as one flat tuple."""

    score: Score
    sides: tuple[int, int]
    shape: tuple[int, int]
    row_mask: Tensor | None
    column_mask: Tensor | None
    own: int | None
    rows_only: bool
    symmetric_at: int | None
    lse: bool
    sums: bool
    tile: int
    # by tile (first row, first column), the maximum that served rows and columns; None where each side needed its own
    maxima: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)

    def tiles(self) -> Iterator[tuple[slice, slice, slice | None]]:
        """Rows, columns, and where the tile's mirror image is left out, the rows that it would have."""
        n, total = self.shape
        if self.symmetric_at is None:
            yield from ((r, c, None) for r in self._cut(0, n) for c in self._cut(0, total))
            return
        start, stop = self.symmetric_at, self.symmetric_at + n
        for r in self._cut(0, n):
            yield from ((r, c, None) for c in [*self._cut(0, start), *self._cut(stop, total)])
            for mirror in self._cut(r.start, n):
                columns = slice(mirror.start + start, mirror.stop + start)
                yield r, columns, mirror if mirror.start > r.start else None

    def _cut(self, start: int, stop: int) -> list[slice]:
        return [slice(i, min(i + self.tile, stop)) for i in range(start, stop, self.tile)]

    def window(self, index: int, r: slice, c: slice) -> slice:
        """The part of tensor `index` that the tile (r, c) sees."""
        if index < self.sides[0]:
            return r
        return c if index < sum(self.sides) else slice(None)

    def scores(self, parts: list[Tensor]) -> Tensor:
        """Scores (t, u) of one tile from its parts of the tensors."""
        split, end = self.sides[0], sum(self.sides)
        return self.score(tuple(parts[:split]), tuple(parts[split:end]), tuple(parts[end:]))

    def drop_own(self, x: Tensor, r: slice, c: slice, value: float) -> None:
        """Overwrite what the tile x (t, u) holds of samples with themselves."""
        if self.own is None:
            return
        offset = self.own + r.start - c.start
        if -x.shape[0] < offset < x.shape[1]:
            x.diagonal(offset).fill_(value)

    def weights(self, like: Tensor, r: slice, c: slice) -> tuple[Tensor, Tensor]:
        """1 for the rows (t,) and columns (u,) of a tile that count, 0 for the others."""
        row = like.new_ones(r.stop - r.start) if self.row_mask is None else self.row_mask[r].to(like.dtype)
        column = like.new_ones(c.stop - c.start) if self.column_mask is None else self.column_mask[c].to(like.dtype)
        return row, column

    def exclude(self, x: Tensor, r: slice, c: slice, value: float) -> Tensor:
        """The tile x (t, u) with `value` wherever a pair does not count, in place."""
        if self.row_mask is not None:
            x.masked_fill_(~self.row_mask[r, None], value)
        if self.column_mask is not None:
            x.masked_fill_(~self.column_mask[None, c], value)
        self.drop_own(x, r, c, value)
        return x


class _Marginals(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: _Plan, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(tensors[0].device.type):
            row_lse, column_lse, row_sum, column_sum = _reduce(plan, tensors)
        ctx.plan = plan
        ctx.save_for_backward(*tensors, row_lse, column_lse)
        return row_lse, column_lse, row_sum, column_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, d_row_lse, d_column_lse, d_row_sum, d_column_sum):
        plan = ctx.plan
        *tensors, row_lse, column_lse = ctx.saved_tensors
        if not plan.rows_only:  # a column's result reached the losses of all ranks
            d_column_lse = gather.all_sum(d_column_lse) if plan.lse else None  # all ranks
            d_column_sum = gather.all_sum(d_column_sum) if plan.sums else None  # all ranks
        needed = [index for index, need in enumerate(ctx.needs_input_grad[1:]) if need]
        gradients = [torch.zeros_like(x) if index in needed else None for index, x in enumerate(tensors)]
        with full_precision(tensors[0].device.type):
            for r, c, mirror in plan.tiles():
                parts = [x[plan.window(index, r, c)].detach() for index, x in enumerate(tensors)]
                leaves = [parts[index].requires_grad_() for index in needed]
                with torch.enable_grad():
                    scores = plan.scores(parts)
                weights = None
                if plan.lse and plan.rows_only and mirror is None:
                    weights = _softmax(scores.detach(), row_lse[r], d_row_lse[r])
                elif plan.lse:
                    columns = (row_lse[mirror], d_row_lse[mirror]) if mirror else (column_lse[c], d_column_lse[c])
                    peak = plan.maxima[r.start, c.start]
                    weights = _two_softmaxes(scores.detach(), peak, row_lse[r], d_row_lse[r], *columns)
                if plan.sums:
                    plain = d_row_sum[r, None] if plan.rows_only else d_row_sum[r, None] + d_column_sum[None, c]
                    weights = plain.expand_as(scores).clone() if weights is None else weights.add_(plain)
                plan.exclude(weights, r, c, 0)
                for index, gradient in zip(needed, torch.autograd.grad(scores, leaves, weights), strict=True):
                    gradients[index][plan.window(index, r, c)] += gradient
        return None, *gradients


def _softmax(scores: Tensor, row_lse: Tensor, d_row_lse: Tensor) -> Tensor:
    """d loss / d scores (t, u) through the rows' log-sum-exps: softmax times the gradient of the sum."""
    return (scores - _finite(row_lse)[:, None]).exp_().mul_(d_row_lse[:, None])


def _two_softmaxes(
    scores: Tensor, peak: Tensor | None, row_lse: Tensor, d_row_lse: Tensor, column_lse: Tensor, d_column_lse: Tensor
) -> Tensor:
    """The same through those of rows and columns, with one exponential where a common maximum served both."""
    row_lse, column_lse = _finite(row_lse), _finite(column_lse)
    if peak is None:
        by_column = (scores - column_lse).exp_().mul_(d_column_lse)
        return _softmax(scores, row_lse, d_row_lse).add_(by_column)
    of_row, of_column = (peak - row_lse).exp() * d_row_lse, (peak - column_lse).exp() * d_column_lse
    return (scores - peak).exp_().mul_(of_row[:, None] + of_column)


def _finite(lse: Tensor) -> Tensor:
    """A sum over nothing is -inf; as its scores are excluded, any finite stand-in serves."""
    return lse.masked_fill(lse == -torch.inf, 0)


def _reduce(plan: _Plan, tensors: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Forward: one visit of all tiles; then the columns are merged over ranks."""
    like, (n, total) = tensors[0], plan.shape
    row_lse, column_lse = like.new_full((n,), -torch.inf), like.new_full((total,), -torch.inf)
    row_sum, column_sum = like.new_zeros(n), like.new_zeros(total)
    for r, c, mirror in plan.tiles():
        parts = [x[plan.window(index, r, c)] for index, x in enumerate(tensors)]
        scores = plan.scores(parts)
        if plan.sums:
            _add_sums(plan, scores, (r, c), row_sum, column_sum)
        if plan.lse and plan.rows_only and mirror is None:
            row_lse[r] = torch.logaddexp(row_lse[r], _of_rows(plan.exclude(scores, r, c, -torch.inf)))
        elif plan.lse:
            by_row, by_column = _both_sides(plan, parts, scores, (r, c))
            row_lse[r] = torch.logaddexp(row_lse[r], by_row)
            side, place = (row_lse, mirror) if mirror else (column_lse, c)
            side[place] = torch.logaddexp(side[place], by_column)
    if not plan.rows_only:
        column_lse = _merged(column_lse) if plan.lse else None  # all ranks
        column_sum = gather.all_sum(column_sum) if plan.sums else None  # all ranks
    return (
        row_lse if plan.lse else None,
        None if plan.rows_only else column_lse,
        row_sum if plan.sums else None,
        column_sum if plan.sums and not plan.rows_only else None,
    )


def _add_sums(plan: _Plan, scores: Tensor, tile: tuple[slice, slice], row_sum: Tensor, column_sum: Tensor) -> None:
    """Add a tile's plain sums; what it holds of samples with themselves becomes 0."""
    r, c = tile
    plan.drop_own(scores, r, c, 0)
    rows, columns = plan.weights(scores, r, c)
    row_sum[r] += rows * (scores @ columns)
    if not plan.rows_only:
        column_sum[c] += columns * (rows @ scores)


def _of_rows(scores: Tensor) -> Tensor:
    """Log-sum-exp of each row (t,); the scores are used up."""
    peak = scores.amax(1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0)
    return scores.sub_(peak).exp_().sum(1).log() + peak[:, 0]


def _both_sides(plan: _Plan, parts: list[Tensor], scores: Tensor, tile: tuple[slice, slice]) -> tuple[Tensor, Tensor]:
    """Log-sum-exps of the rows (t,) and columns (u,) of one tile, whose `scores` are used up."""
    rows, columns = plan.weights(scores, *tile)
    plan.drop_own(scores, *tile, -torch.inf)  # before the maximum, which it often is
    peak = scores.max().clamp_min(torch.finfo(scores.dtype).min)  # -inf where nothing else is in the tile
    shares = scores.sub_(peak).exp_()
    by_row, by_column = rows * (shares @ columns), columns * (rows @ shares)
    smallest = torch.cat([by_row.masked_fill(rows == 0, 1), by_column.masked_fill(columns == 0, 1)]).amin()
    if smallest > SMALLEST_SUM:
        plan.maxima[tile[0].start, tile[1].start] = peak
        return by_row.log() + peak, by_column.log() + peak
    plan.maxima[tile[0].start, tile[1].start] = None
    scores = plan.exclude(plan.scores(parts), *tile, -torch.inf)
    return scores.logsumexp(1), scores.logsumexp(0)


def _merged(column_lse: Tensor) -> Tensor:
    """Log-sum-exps of the columns over the rows of all ranks, from those of each rank. All ranks."""
    if gather.world_size() == 1:
        return column_lse
    peak = gather.all_max(column_lse)  # all ranks
    peak = peak.masked_fill(peak == -torch.inf, 0)
    return gather.all_sum((column_lse - peak).exp()).log() + peak  # all ranks
