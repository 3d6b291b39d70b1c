"""From a configuration to what it describes: the source of the data, model and objective with their first weights."""

from __future__ import annotations

from pathlib import Path

from ..datasets.stream import Source
from ..evals.cli import checkpoint_folder
from ..modalities.model import MultimodalModel
from ..modalities.weights import load_matching
from ..objectives import OBJECTIVES
from . import state as checkpoints
from .config import Config, Patterns
from .step import TrainModule, seed_everything


def source_of(config: Config, model: MultimodalModel, pattern: Patterns) -> Source:
    """The clips that `pattern` names, to be decoded as the model's towers want them."""
    data = config.data
    return Source(pattern, model.specs, fields=data.fields, decoder=data.decoder, crop_area=data.crop_area)


def build_module(config: Config, folder: Path | None, messages: list[str]) -> TrainModule:
    """Model and objective with the weights to start from: a checkpoint of this run, `init_from`, or the seed's."""
    seed_everything(config.seed)
    model = MultimodalModel(config.tree()["modalities"], config.dim)
    objective = OBJECTIVES.build(config.objective.name, **config.objective.options)
    module = TrainModule(model, objective, config.train.precision)
    if folder:
        checkpoints.load_weights(folder, module)
    elif config.init_from:
        messages.append(str(load_matching(model, weights_source(config.init_from))))
    return module


def weights_source(init_from: str) -> str:
    """What `init_from` means: of a run directory, its best checkpoint."""
    run = Path(init_from)
    return str(checkpoint_folder(run)[0]) if (run / "checkpoints").is_dir() else init_from
