"""Tiled marginals against sums and torch.logsumexp of the whole score matrix."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from trivium.objectives import gather
from trivium.objectives.precision import full_precision
from trivium.objectives.tiled import marginals


def score(rows, columns, shared):
    """Something curved in all its inputs, with two inputs on the row side."""
    (x, bias), (y,), (scale,) = rows, columns, shared
    return (scale * x @ y.T + bias[:, None]).sin() * 3


def inputs(n=7, total=10, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, 4), (n,), (total, 4), (1,)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def whole(x, bias, y, scale, allowed):
    scores = score((x, bias), (y,), (scale,))
    masked = scores.masked_fill(~allowed, -torch.inf)
    plain = scores.masked_fill(~allowed, 0)
    return masked.logsumexp(1), masked.logsumexp(0), plain.sum(1), plain.sum(0)


def weighted(outputs, seed=1):
    """A loss that pulls on every output that is finite, differently."""
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for output in outputs:
        if output is not None:
            weights = torch.randn(output.shape, generator=generator, dtype=output.dtype)
            total = total + torch.where(output.isinf(), torch.zeros_like(output), output * weights).sum()
    return total


@pytest.mark.parametrize("tile", [1, 3, 4, 7, 1000])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
def test_values_and_gradients_equal_those_of_the_whole_matrix(tile, masked, diagonal):
    row_mask = torch.tensor([1, 1, 0, 1, 1, 0, 1], dtype=torch.bool) if masked else torch.ones(7, dtype=torch.bool)
    column_mask = torch.arange(10) % 3 != 1 if masked else torch.ones(10, dtype=torch.bool)
    allowed = row_mask[:, None] & column_mask
    if diagonal:
        allowed = allowed & (torch.arange(7)[:, None] + 2 != torch.arange(10))
    ours, theirs = inputs(), inputs()
    found = marginals(
        score,
        tuple(ours[:2]),
        (ours[2],),
        (ours[3],),
        row_mask=row_mask,
        column_mask=column_mask,
        own=2 if diagonal else None,
        sums=True,
        tile=tile,
    )
    got = (found.row_lse, found.column_lse, found.row_sum, found.column_sum)
    expected = whole(*theirs, allowed)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(weighted(got), ours), torch.autograd.grad(weighted(expected), theirs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_row_only_gives_the_same_rows_and_nothing_else():
    x, bias, y, scale = inputs()
    full = marginals(score, (x, bias), (y,), (scale,), sums=True, tile=3)
    rows = marginals(score, (x, bias), (y,), (scale,), sums=True, rows_only=True, tile=4)
    assert rows.column_lse is None and rows.column_sum is None
    torch.testing.assert_close(rows.row_lse, full.row_lse)
    torch.testing.assert_close(rows.row_sum, full.row_sum)
    ours = torch.autograd.grad(rows.row_lse.sum() + rows.row_sum.sum(), (x, y), retain_graph=True)
    theirs = torch.autograd.grad(full.row_lse.sum() + full.row_sum.sum(), (x, y))
    torch.testing.assert_close(ours, theirs)


def test_masked_samples_may_be_nan():
    x, bias, y, scale = inputs()
    row_mask, column_mask = torch.ones(7, dtype=torch.bool), torch.ones(10, dtype=torch.bool)
    row_mask[2], column_mask[5] = False, False
    with torch.no_grad():
        x[2], bias[2], y[5] = torch.nan, torch.nan, torch.inf
    found = marginals(score, (x, bias), (y,), (scale,), row_mask=row_mask, column_mask=column_mask, sums=True, tile=3)
    outputs = (found.row_lse, found.column_lse, found.row_sum, found.column_sum)
    gradients = torch.autograd.grad(weighted(outputs), (x, bias, y, scale))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0][2].eq(0).all() and gradients[2][5].eq(0).all()
    kept = score((x[row_mask], bias[row_mask]), (y[column_mask],), (scale,))
    torch.testing.assert_close(found.row_lse[row_mask], kept.logsumexp(1))


def test_a_row_without_columns_is_minus_infinity_and_has_no_gradient():
    x, bias, y, scale = inputs()
    nothing = torch.zeros(10, dtype=torch.bool)
    found = marginals(score, (x, bias), (y,), (scale,), column_mask=nothing, tile=4)
    assert found.row_lse.eq(-torch.inf).all() and found.column_lse.eq(-torch.inf).all()
    loss = torch.where(torch.zeros(7, dtype=torch.bool), found.row_lse, torch.zeros(7, dtype=torch.float64)).sum()
    assert all(gradient.eq(0).all() for gradient in torch.autograd.grad(loss, (x, bias, y, scale)))


def test_scores_far_outside_the_range_of_exp_in_float32():
    x = torch.tensor([[300.0], [-300.0]])
    found = marginals(lambda r, c, s: r[0] @ c[0].T, (x,), (x,), tile=1)
    torch.testing.assert_close(found.row_lse, torch.tensor([90000.0, 90000.0]))
    torch.testing.assert_close(found.column_lse, found.row_lse)


@pytest.mark.parametrize("switch", ["older", "newer"])
def test_products_run_in_full_precision_forward_and_backward(switch):
    matmul, seen = torch.backends.cuda.matmul, []

    def watching(rows, columns, shared):
        scores = rows[0] @ columns[0].T
        seen.append((scores.dtype, matmul.fp32_precision))
        return scores

    before = matmul.fp32_precision
    if switch == "older":
        torch.set_float32_matmul_precision("medium")
    else:
        matmul.fp32_precision = "tf32"
    try:
        x = torch.randn(4, 3, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            marginals(watching, (x,), (x,)).row_lse.sum().backward()
        assert len(seen) == 2
        assert all(dtype == torch.float32 and precision != "tf32" for dtype, precision in seen)
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def test_precision_is_restored_after_an_error():
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ZeroDivisionError), full_precision("cpu"):
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("tile, expected", [(16, 16 * 16), (96, 96 * 96)])
def test_no_tensor_is_larger_than_a_tile(tile, expected):
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest[0] = max(largest[0], out.numel())
            return out

    x = torch.randn(96, 2, requires_grad=True)
    with Watch():
        found = marginals(lambda r, c, s: r[0] @ c[0].T, (x,), (x.detach(),), tile=tile)
        (found.row_lse.sum() + found.column_lse.sum()).backward()
    assert largest[0] == expected


def on_a_rank(seed: int):
    """Rows of this rank against all columns; returns results and this rank's gradients of its own loss."""
    dist.init_process_group("gloo")
    x, bias, y, scale = [x.detach() for x in inputs(n=4 * dist.get_world_size(), total=4 * dist.get_world_size())]
    own = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    leaves = [part.clone().requires_grad_() for part in (x[own], bias[own], y[own], scale)]
    found = marginals(score, tuple(leaves[:2]), (gather.gather_rows(leaves[2]),), (leaves[3],), sums=True, tile=3)
    rows, columns = own_losses(found, own)
    (rows + columns).backward()
    return [leaf.grad for leaf in leaves], found.column_lse.detach(), found.column_sum.detach()


def own_losses(found, own):
    """This rank uses its own rows and, differently, its own columns."""
    weights = torch.arange(1.0, 5.0, dtype=torch.float64)
    rows = (found.row_lse * weights).sum() + (found.row_sum * weights).sum()
    return rows, (found.column_lse[own] * weights.square()).sum() + (found.column_sum[own] * weights).sum()


@pytest.mark.two_process
@pytest.mark.parametrize("world", [2, 3])
def test_on_ranks_as_on_one(ranks, world):
    answers = ranks(world, on_a_rank, 0)
    x, bias, y, scale = inputs(n=4 * world, total=4 * world)
    found = marginals(score, (x, bias), (y,), (scale,), sums=True)
    for rank in range(world):
        own = slice(4 * rank, 4 * rank + 4)
        part = type(found)(found.row_lse[own], found.column_lse, found.row_sum[own], found.column_sum)
        sum(own_losses(part, own)).backward(retain_graph=True)
    for name, leaf, index in (("x", x, 0), ("bias", bias, 1), ("y", y, 2)):
        together = torch.cat([gradients[index] for gradients, _, _ in answers])
        torch.testing.assert_close(together, leaf.grad, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(sum(gradients[3] for gradients, _, _ in answers), scale.grad, rtol=1e-11, atol=1e-12)
    for _, column_lse, column_sum in answers:
        torch.testing.assert_close(column_lse, found.column_lse.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(column_sum, found.column_sum.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", [2, 64])
def test_rows_and_columns_far_below_the_rest_keep_their_own_exponential(tile):
    """Column 1 and row 2 lie hundreds of nats below the others, as at temperature 0.01."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(5, 1, generator=generator) * 5 + 100
    y = torch.tensor([[1.0], [-1.0], [0.9], [0.95]])
    x[2] = -150.0
    x.requires_grad_(), y.requires_grad_()
    found = marginals(lambda r, c, s: r[0] @ c[0].T, (x,), (y,), tile=tile)
    outputs = (found.row_lse, found.column_lse)
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    exact = wide[0] @ wide[1].T
    expected = (exact.logsumexp(1), exact.logsumexp(0))
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-5)
    ours, theirs = torch.autograd.grad(weighted(outputs), (x, y)), torch.autograd.grad(weighted(expected), wide)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_plain_sums_alone():
    x, bias, y, scale = inputs()
    found = marginals(score, (x, bias), (y,), (scale,), own=2, rows_only=True, lse=False, sums=True, tile=3)
    assert found.row_lse is None and found.column_lse is None and found.column_sum is None
    allowed = torch.arange(7)[:, None] + 2 != torch.arange(10)
    expected = score((x, bias), (y,), (scale,)).masked_fill(~allowed, 0).sum(1)
    torch.testing.assert_close(found.row_sum, expected)
    ours = torch.autograd.grad(weighted((found.row_sum,)), (x, bias, y, scale))
    theirs = torch.autograd.grad(weighted((expected,)), (x, bias, y, scale))
    torch.testing.assert_close(ours, theirs)


def test_gradients_pass_gradcheck():
    def both(x, bias, y, scale):
        found = marginals(score, (x, bias), (y,), (scale,), sums=True, own=0, tile=3)
        return found.row_lse, found.column_lse, found.row_sum, found.column_sum

    assert torch.autograd.gradcheck(both, inputs(n=5, total=5))
