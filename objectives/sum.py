"""Weighted sum of other objectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..datasets.registry import InputError
from . import OBJECTIVES, register
from .embeddings import Embeddings, Loss, Objective
from .options import positive


@register("sum")
class Sum(Objective):
    """L = sum_k weight_k L_k over any registered objectives, each with its own options.

    Every part is logged under its objective's name (`unialign/alignment`), the weighted totals are the `terms`.

    Args:
        terms: the objectives, each `{name: unialign, weight: 0.1, its options}`; weight is 1 by default. One that
            occurs a second time is called `name_2`.
    """

    memory = "that of its terms together"

    def __init__(self, *, terms: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        if not terms:
            raise InputError("terms is empty; list objectives, such as terms: [{name: unialign}, {name: siglip}]")
        self.objectives = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        seen: Counter[str] = Counter()
        for index, term in enumerate(terms):
            options = dict(term)
            if "name" not in options:
                raise InputError(f"terms[{index}]={options} has no name; give it one, such as {{name: unialign}}")
            name, weight = options.pop("name"), options.pop("weight", 1.0)
            if not isinstance(weight, (int, float)):
                raise InputError(f"terms[{index}].weight={weight!r} is no number; give one such as 0.1")
            positive("leave the objective out instead", **{f"terms[{index}].weight": float(weight)})
            seen[name] += 1
            label = name if seen[name] == 1 else f"{name}_{seen[name]}"
            self.objectives[label] = OBJECTIVES.build(name, **options)
            self.weights[label] = weight
        self.needs = frozenset().union(*(objective.needs for objective in self.objectives.values()))

    def check(self, names: tuple[str, ...]) -> None:
        for objective in self.objectives.values():
            objective.check(names)

    def setup(self, names: tuple[str, ...], dim: int, widths: Mapping[str, int]) -> None:
        for objective in self.objectives.values():
            objective.setup(names, dim, widths)

    def forward(self, z: Embeddings) -> Loss:
        terms, parts = {}, {}
        for label, objective in self.objectives.items():
            loss = objective(z)
            terms[label] = self.weights[label] * loss.total
            parts |= {label: loss.total.detach()} | {f"{label}/{name}": part for name, part in loss.parts.items()}
        return Loss(sum(terms.values()), terms, parts)

    def after_step(self, progress: float) -> None:
        for objective in self.objectives.values():
            objective.after_step(progress)
