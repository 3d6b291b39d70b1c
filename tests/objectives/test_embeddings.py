"""Embeddings and the collectives below them, on one process and on several."""

import pytest
import torch
import torch.distributed as dist

from trivium.datasets.registry import InputError
from trivium.objectives import Embeddings, gather


def test_invalid_rows_are_zeros_and_get_no_gradient():
    x = torch.full((3, 2), torch.nan)
    x[0] = 1.0
    x.requires_grad_()
    z = Embeddings({"text": x}, {"text": torch.tensor([True, False, False])})
    assert z.z["text"].tolist() == [[1, 1], [0, 0], [0, 0]]
    z.z["text"].sum().backward()
    assert x.grad.tolist() == [[1, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    "given, scored",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_scores_are_at_least_float32(given, scored):
    assert Embeddings({"text": torch.ones(2, 2, dtype=given)}).z["text"].dtype == scored


def test_one_process_is_the_whole_batch():
    x = torch.randn(3, 2, requires_grad=True)
    z = Embeddings({"text": x}, keys=("a", "b", "c"), bucket=torch.tensor([0, 0, 1]))
    assert z.names == ("text",) and z.rows.tolist() == [0, 1, 2] and z.valid["text"].all()
    assert z.columns("text") is z.columns("text")
    torch.testing.assert_close(z.columns("text"), x)
    values, mask = torch.tensor([1.0, torch.nan, 5.0]), torch.tensor([True, False, True])
    assert z.mean(values, mask) == 3
    assert z.mean(values, torch.zeros(3, dtype=torch.bool)) == 0


def test_a_batch_of_one_is_refused():
    with pytest.raises(InputError, match="nothing to compare it with"):
        Embeddings({"text": torch.ones(1, 2)})


def every_collective(world: int) -> dict:
    """What each collective returns and the gradient of a loss that weighs it differently on each rank."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x = (torch.arange(4.0).view(2, 2) + 10 * rank).T.requires_grad_()  # not contiguous
    own = torch.zeros(2 * world, 2, requires_grad=True)
    tripled = 3 * own  # older than the gather, so its backward runs later, on the very same gradient tensor
    gathered = gather.gather_rows(x)
    weights = torch.arange(float(gathered.numel())).view_as(gathered) * (rank + 1)
    ((gathered + tripled) * weights).sum().backward()
    y = torch.tensor([rank + 1.0], requires_grad=True)
    (gather.all_sum(y) * (rank + 2)).sum().backward()
    z = Embeddings({"a": x.detach()}, {"a": torch.tensor([rank == 0, True])})
    share = z.mean(torch.tensor([1.0, 2.0]) + 10 * rank, z.valid["a"])
    return {
        "gathered": gathered.detach(),
        "gradient": x.grad,
        "own_gradient": own.grad,
        "sum": gather.all_sum(y.detach()),
        "sum_gradient": y.grad,
        "max": gather.all_max(y),
        "rows": z.rows,
        "valid": z.columns_valid("a"),
        "ids": gather.gather_rows(torch.tensor([[rank]])),
        "share": share,
        "one_row": Embeddings({"a": x.detach()[:1]}).rows,
    }


@pytest.mark.two_process
@pytest.mark.parametrize("world", [2, 3])
def test_collectives(ranks, world):
    answers = ranks(world, every_collective, world)
    whole = torch.cat([(torch.arange(4.0).view(2, 2) + 10 * rank).T for rank in range(world)]).requires_grad_()
    total = sum(rank + 1 for rank in range(world))
    weights = torch.arange(float(whole.numel())).view_as(whole) * total
    (whole * weights).sum().backward()
    for rank, answer in enumerate(answers):
        torch.testing.assert_close(answer["gathered"], whole.detach())
        torch.testing.assert_close(answer["gradient"], whole.grad[2 * rank : 2 * rank + 2])
        torch.testing.assert_close(answer["own_gradient"], 3 * weights / total * (rank + 1))
        assert answer["sum"] == total and answer["max"] == world
        assert answer["sum_gradient"] == sum(other + 2 for other in range(world))
        assert answer["rows"].tolist() == [2 * rank, 2 * rank + 1]
        assert answer["one_row"].tolist() == [rank]
        assert answer["valid"].tolist() == [True, True] + [False, True] * (world - 1)
        assert answer["ids"].flatten().tolist() == list(range(world))
    values = [1.0] + [2.0 + 10 * rank for rank in range(world)]
    mean_of_shares = sum(answer["share"].item() for answer in answers) / world
    assert mean_of_shares == pytest.approx(sum(values) / len(values))
