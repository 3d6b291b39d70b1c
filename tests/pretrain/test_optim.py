"""Schedules against their closed forms, groups against names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trivium.datasets.registry import InputError
from trivium.pretrain.config import Train
from trivium.pretrain.optim import build_optimizer, freeze, learning_rate_scale, parameter_groups, set_learning_rate


def settings(**options) -> Train:
    return Train(**({"steps": 110, "batch_size": 8, "warmup_steps": 10} | options))


def test_warm_up_rises_by_equal_steps_to_the_peak():
    assert [learning_rate_scale(step, settings()) for step in range(10)] == pytest.approx(
        [0.1 * (i + 1) for i in range(10)]
    )


def test_cosine_falls_along_a_quarter_wave_pair():
    train = settings(final_lr_scale=0.1)
    assert learning_rate_scale(10, train) == pytest.approx(1.0)
    assert learning_rate_scale(60, train) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate_scale(35, train) == pytest.approx(0.1 + 0.9 * math.cos(math.pi / 8) ** 2)
    assert learning_rate_scale(110, train) == pytest.approx(0.1)


def test_linear_and_constant():
    assert learning_rate_scale(85, settings(schedule="linear")) == pytest.approx(0.25)
    assert learning_rate_scale(109, settings(schedule="constant")) == 1.0


def net() -> nn.ModuleDict:
    return nn.ModuleDict({"video": nn.Linear(3, 2), "text": nn.LayerNorm(4), "audio": nn.Linear(2, 2)})


def test_vectors_are_not_decayed_and_the_first_match_wins():
    module = net()
    groups = [{"match": "audio.weight", "frozen": True}, {"match": "video", "lr_scale": 0.1, "weight_decay": 0.5}]
    train = settings(groups=[*groups, {"match": "audio|video", "lr_scale": 7}], lr=0.01, weight_decay=0.2)
    freeze(module, train)
    assert not module["audio"].weight.requires_grad and module["audio"].bias.requires_grad
    of = {id(p): group for group in parameter_groups(module, train) for p in group["params"]}
    assert of[id(module["video"].weight)]["weight_decay"] == 0.5
    assert of[id(module["video"].bias)] | {"params": 0} == {"params": 0, "lr_scale": 0.1, "weight_decay": 0.0}
    assert of[id(module["audio"].bias)]["lr_scale"] == 7
    assert of[id(module["text"].weight)] | {"params": 0} == {"params": 0, "lr_scale": 1.0, "weight_decay": 0.0}
    assert id(module["audio"].weight) not in of


def test_the_rate_of_each_group_is_its_share_of_the_schedule():
    module = net()
    train = settings(groups=[{"match": "video", "lr_scale": 0.5}], lr=0.02)
    optimizer = build_optimizer(module, train)
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    assert set_learning_rate(optimizer, 4, train) == pytest.approx(0.01)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.005, 0.01])


def test_a_group_that_matches_nothing_is_a_mistake():
    with pytest.raises(InputError, match="vidio"):
        parameter_groups(net(), settings(groups=[{"match": "vidio"}]))


def test_everything_frozen_is_a_mistake():
    module = net()
    train = settings(groups=[{"match": ".", "frozen": True}])
    freeze(module, train)
    with pytest.raises(InputError, match="freeze every parameter"):
        torch.optim.AdamW(parameter_groups(module, train))
