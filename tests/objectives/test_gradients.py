"""Every derivative that is written by hand, and the primitives around them, against finite differences in float64."""

import pytest
import torch
import torch.distributed as dist
from torch.autograd import gradcheck
from torch.nn import functional as F

from trivium.objectives import Embeddings, gather
from trivium.objectives.heads import batch_normalise
from trivium.objectives.precision import matmul
from trivium.objectives.temperature import _ClampInside
from trivium.objectives.tiled import marginals
from trivium.objectives.unialign import angle_square, euclidean_score, geodesic_score


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def unit(*shape, seed=0):
    return F.normalize(draw(*shape, seed=seed).detach(), dim=-1).requires_grad_()


def test_product():
    assert gradcheck(matmul, (draw(3, 4), draw(4, 2, seed=1)))
    assert gradcheck(lambda x: matmul(x, x.T), (draw(3, 4),))


@pytest.mark.parametrize("sign, beyond", [(1, -2.0), (-1, 3.0)])
def test_clamp_inside(sign, beyond):
    """Beyond the bound, where a descent step would lead further away, it is the constant that it looks like."""
    x = torch.tensor([-0.9, 0.2, 1.9, beyond], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: sign * _ClampInside.apply(x, -1.0, 2.0), (x,))


def test_angle_square():
    quarters = torch.tensor([1e-4, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64, requires_grad=True)
    assert gradcheck(angle_square, (quarters,))


@pytest.mark.parametrize("score", [euclidean_score, geodesic_score])
def test_scores_of_unialign(score):
    tau = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, y, tau: score((x,), (y,), (tau,)), (unit(3, 4), unit(5, 4, seed=1), tau))


def test_log_mean_exp():
    z, mask = Embeddings({"text": torch.ones(6, 2)}), torch.tensor([True, False, True, True, False, True])
    assert gradcheck(lambda values: z.log_mean_exp(values, mask), (draw(6),))


def test_batch_normalise():
    z, valid = Embeddings({"text": torch.ones(6, 2)}), torch.tensor([True, False, True, True, False, True])
    assert gradcheck(lambda x: batch_normalise(z, x, valid), (draw(6, 3),))


@pytest.mark.parametrize("score", [euclidean_score, geodesic_score])
@pytest.mark.parametrize("rows_only", [False, True])
def test_marginals_with_masks_and_without_own(score, rows_only):
    row_mask, column_mask = torch.arange(4) != 1, torch.arange(6) != 3
    options = {"row_mask": row_mask, "column_mask": column_mask, "own": 1, "rows_only": rows_only, "sums": True}

    def kept(x, y, tau):
        found = marginals(score, (x,), (y,), (tau,), tile=2, **options)
        rows, columns = (found.row_lse[row_mask], found.row_sum), (found.column_lse, found.column_sum)
        return rows if rows_only else (*rows, columns[0][column_mask], columns[1])

    tau = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    assert gradcheck(kept, (unit(4, 3), unit(6, 3, seed=1), tau))


def collectives_on_a_rank() -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient at this rank's rows, and what the losses of all ranks change by when a row of any rank moves."""
    dist.init_process_group("gloo")
    rank, world, step = dist.get_rank(), dist.get_world_size(), 1e-6
    x = draw(3, 2, seed=rank)

    def loss(x):
        rows, total = gather.gather_rows(x), gather.all_sum(x.sin())
        return (rows.square() * draw(3 * world, 2, seed=rank + 10).detach()).sum() + (rank + 1) * total.exp().sum()

    found = torch.autograd.grad(loss(x), x)[0]
    with torch.no_grad():
        slopes = torch.zeros(world, x.numel(), dtype=x.dtype)
        for mover in range(world):
            for entry in range(x.numel()):
                shift = step * torch.eye(x.numel(), dtype=x.dtype)[entry].view_as(x) * (rank == mover)
                slopes[mover, entry] = (loss(x + shift) - loss(x - shift)) / (2 * step)
        dist.all_reduce(slopes)
    return found, slopes[rank].view_as(x)


@pytest.mark.two_process
def test_collectives(ranks):
    for found, expected in ranks(2, collectives_on_a_rank):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
