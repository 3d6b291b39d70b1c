"""MultimodalModel: towers by modality, a linear head each, unit vectors out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import Features, InputSpec, build


class MultimodalModel(nn.Module):
    """Towers and heads for any set of modalities.

    Args:
        modalities: by modality name (any name), `{"tower": {"name": ..., options}, "head": {"bias": bool}}`.
        dim: D, the dimension of the shared space.
    """

    def __init__(self, modalities: Mapping[str, Mapping[str, Any]], dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.towers = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self._tower_names: dict[str, str] = {}
        for name, part in modalities.items():
            options = dict(part["tower"])
            self._tower_names[name] = options.pop("name")
            self.towers[name] = build(self._tower_names[name], **options)
            head = part.get("head") or {}
            self.heads[name] = nn.Linear(self.towers[name].width, dim, bias=head.get("bias", False))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.towers)

    @property
    def specs(self) -> dict[str, InputSpec]:
        """By modality, what its tower eats."""
        return {name: tower.spec for name, tower in self.towers.items()}

    def description(self) -> dict[str, Any]:
        """What rebuilds this model anywhere: `MultimodalModel(**description)`; JSON-serialisable."""
        modalities = {
            name: {
                "tower": {"name": self._tower_names[name], **tower.options},
                "head": {"bias": self.heads[name].bias is not None},
            }
            for name, tower in self.towers.items()
        }
        return {"modalities": modalities, "dim": self.dim}

    def encode(self, name: str, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Features]:
        """Unit vectors (n, D) in float32 (float64 for a float64 model) of one modality, and the tower's features."""
        features = self.towers[name](**inputs)
        pooled = features.pooled
        head = self.heads[name]
        with torch.autocast(device_type=pooled.device.type, enabled=False):  # a unit vector in bf16 is not unit
            return F.normalize(head(pooled.to(head.weight.dtype)), dim=-1), features

    def forward(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """By modality, unit vectors (n, D). Every tower runs, whatever is present: collectives stay in step."""
        return {name: self.encode(name, inputs[name])[0] for name in self.towers}
