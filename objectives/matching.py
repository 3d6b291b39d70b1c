"""Cross-entropy of finding a sample's own partner among all partners of the global batch, in both directions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..datasets.registry import InputError
from .embeddings import Embeddings
from .tiled import Inputs, Score, marginals


def match_both_ways(
    z: Embeddings,
    score: Score,
    rows: Inputs,
    columns: Inputs,
    shared: Inputs,
    *,
    positive: Tensor,
    row_mask: Tensor,
    column_mask: Tensor,
    both: Tensor,
    label_smoothing: float,
    tile: int | None,
) -> tuple[Tensor, Tensor]:
    """This rank's shares of the two losses: rows find their column, columns find their row. One pass over the tiles.

    A sample without its partner has no positive and leaves the mean, but what it has still serves as a negative.

    Args:
        score, rows, columns, shared, tile: as `marginals` takes them.
        positive: (n,), the score of each of this rank's samples with its own partner.
        row_mask: bool (n,), samples that have the row side.
        column_mask: bool (N,), samples of the global batch that have the column side.
        both: bool (n,), samples of this rank that have both.
        label_smoothing: share of the target spread evenly over all candidates, in [0, 1).
    """
    # a sample's score with its own partner enters by `positive` only: computed in two ways, here and in a tile, its two
    # gradients would not cancel where training succeeds (GRAM's, at V = 0.007 in float32, were wrong by 40 %)
    found = marginals(
        score,
        rows,
        columns,
        shared,
        row_mask=row_mask,
        column_mask=column_mask,
        own=z.start,
        sums=label_smoothing > 0,
        tile=tile,
    )
    row_loss = torch.logaddexp(found.row_lse, positive) - (1 - label_smoothing) * positive
    column_loss = torch.logaddexp(found.column_lse[z.rows], positive) - (1 - label_smoothing) * positive
    if label_smoothing > 0:
        row_loss = row_loss - label_smoothing * (found.row_sum + positive) / column_mask.sum().clamp_min(1)
        row_count = z.all_sum(row_mask.sum()).clamp_min(1)
        column_loss = column_loss - label_smoothing * (found.column_sum[z.rows] + positive) / row_count
    return z.mean(row_loss, both), z.mean(column_loss, both)


def checked_smoothing(label_smoothing: float) -> float:
    if not 0 <= label_smoothing < 1:
        raise InputError(f"label_smoothing={label_smoothing} is outside [0, 1); 0 switches it off, 0.1 is common")
    return label_smoothing
