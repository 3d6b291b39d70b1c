"""MultimodalModel: towers by modality, a linear head each, unit vectors out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..datasets.registry import InputError, nearest
from . import Features, InputSpec, build

FEATURES = "features/"


class MultimodalModel(nn.Module):
    """Towers and heads for any set of modalities.

    It has no parameters of its own: every one is used by the forward of the module that owns it, as ZeRO-3 needs.

    Args:
        modalities: by modality name (any name), `{"tower": {"name": ..., options}, "head": {"bias": bool}}`; the head
            is a linear map, without bias unless asked for.
        dim: D, the dimension of the shared space.
    """

    def __init__(self, modalities: Mapping[str, Mapping[str, Any]], dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise InputError(f"dim={dim} is no dimension of a space; give at least 1, such as 512")
        if not modalities:
            raise InputError("the model has no modalities; name at least one with its tower")
        self.dim = dim
        self.towers = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self._tower_names: dict[str, str] = {}
        for name, part in modalities.items():
            tower, options, bias = _parse(name, part)
            self._tower_names[name] = tower
            self.towers[name] = build(tower, **options)
            self.heads[name] = nn.Linear(self.towers[name].width, dim, bias=bias)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.towers)

    @property
    def tower_names(self) -> dict[str, str]:
        """By modality, the registered name of its tower."""
        return dict(self._tower_names)

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
        with torch.autocast(device_type=pooled.device.type, enabled=False):
            z = head(pooled.to(head.weight.dtype))
        return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=-1), features  # in bf16 it is not unit

    def forward(self, inputs: Mapping[str, Mapping[str, Tensor]], *, features: bool = False) -> dict[str, Tensor]:
        """By modality, unit vectors (n, D). Every tower runs, whatever is present: collectives stay in step.

        With `features` also, by `FEATURES + modality`, what its tower says before the head, (n, width).
        """
        encoded = {name: self.encode(name, inputs[name]) for name in self.towers}
        vectors = {name: z for name, (z, _) in encoded.items()}
        return vectors | ({FEATURES + name: found.pooled for name, (_, found) in encoded.items()} if features else {})


def _parse(name: str, part: Mapping[str, Any]) -> tuple[str, dict[str, Any], bool]:
    """Tower name, tower options and head bias of one modality's configuration."""
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise InputError(f"{name!r} cannot name a modality; use a plain word such as 'video'")
    if not isinstance(part, Mapping) or not isinstance(part.get("tower"), Mapping) or "name" not in part["tower"]:
        raise InputError(f"modality {name!r} has no tower; give it one: tower: {{name: ..., its options}}")
    _check_keys(f"modality {name!r}", part, ("tower", "head"))
    head = part.get("head") or {}
    _check_keys(f"the head of modality {name!r}", head, ("bias",))
    options = dict(part["tower"])
    return options.pop("name"), options, bool(head.get("bias", False))


def _check_keys(what: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            raise InputError(f"{what} has no option {key!r}; {nearest(str(key), known)}")
