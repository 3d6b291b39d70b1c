"""The learnt temperature: its value, its bounds, and the gradient at and beyond them."""

import math

import pytest
import torch
import torch.distributed as dist

from trivium.datasets.registry import InputError
from trivium.objectives.temperature import Temperature

LIKE = torch.zeros(1)


def with_log_scale(value: float, bounds=(0.01, 1.0)) -> Temperature:
    temperature = Temperature(0.07, learnable=True, bounds=bounds)
    with torch.no_grad():
        temperature.log_scale.fill_(value)
    return temperature


@pytest.mark.parametrize("learnable", [True, False])
def test_value(learnable):
    temperature = Temperature(0.07, learnable=learnable, bounds=(0.01, 1.0))
    torch.testing.assert_close(temperature(LIKE), torch.tensor([1 / 0.07]), rtol=1e-6, atol=0)
    assert temperature(LIKE.double()).dtype == torch.float64
    assert len(list(temperature.parameters())) == learnable
    assert len(temperature.state_dict()) == learnable


def test_the_parameter_has_an_axis():
    assert Temperature(0.07, learnable=True, bounds=(0.01, 1.0)).log_scale.shape == (1,)


def test_a_half_precision_parameter_is_exponentiated_in_float32():
    temperature = with_log_scale(math.log(20)).bfloat16()
    stored = temperature.log_scale.float().item()
    torch.testing.assert_close(temperature(LIKE).item(), math.exp(stored), rtol=1e-6, atol=0)


def test_inside_the_gradient_is_that_of_exp():
    temperature = with_log_scale(1.5)
    temperature(LIKE).sum().backward()
    torch.testing.assert_close(temperature.log_scale.grad, torch.tensor([math.exp(1.5)]))


@pytest.mark.parametrize(
    "value, pull, clamped, passes",
    [
        (6.0, +1.0, 100.0, True),  # scale too large, descent makes it smaller
        (6.0, -1.0, 100.0, False),
        (-1.0, -1.0, 1.0, True),  # scale too small, descent makes it larger
        (-1.0, +1.0, 1.0, False),
    ],
)
def test_outside_only_a_gradient_that_leads_back_passes(value, pull, clamped, passes):
    temperature = with_log_scale(value)
    scale = temperature(LIKE)
    torch.testing.assert_close(scale.item(), clamped, rtol=1e-6, atol=0)
    (pull * scale).sum().backward()
    assert temperature.log_scale.grad.item() == (pytest.approx(pull * clamped) if passes else 0)


@pytest.mark.parametrize(
    "initial, bounds",
    [(0.07, (0.1, 1.0)), (2.0, (0.01, 1.0)), (0.07, (0.0, 1.0)), (0.5, (1.0, 0.1)), (0.07, (0.01, math.inf))],
)
def test_bad_bounds_are_refused(initial, bounds):
    with pytest.raises(InputError, match="temperature"):
        Temperature(initial, learnable=True, bounds=bounds)


def opposed_ranks(pulls: list[float]) -> float:
    """Each rank pulls its own way on a scale beyond the bound; returns this rank's gradient."""
    dist.init_process_group("gloo")
    temperature = with_log_scale(6.0)
    (pulls[dist.get_rank()] * temperature(LIKE)).sum().backward()
    return temperature.log_scale.grad.item()


@pytest.mark.two_process
def test_the_gradient_of_all_ranks_together_decides(ranks):
    """Their sum leads back, though one of them alone would not: both pass, or the mean would be wrong."""
    assert ranks(2, opposed_ranks, [3.0, -1.0]) == [pytest.approx(300.0), pytest.approx(-100.0)]
    assert ranks(2, opposed_ranks, [1.0, -3.0]) == [0.0, 0.0]
