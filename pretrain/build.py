"""From a configuration to what it describes: the source of the data, model and objective with their first weights."""

from __future__ import annotations

from pathlib import Path

from ..datasets.decode import NoiseWords
from ..datasets.registry import InputError
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
    noise = {name: NoiseWords(noise.probability, _words(name, noise.words)) for name, noise in data.noise_words.items()}
    options = {"fields": data.fields, "decoder": data.decoder, "crop_area": data.crop_area}
    return Source(pattern, model.specs, noise_words=noise, **options)


def _words(name: str, words: str | list[str]) -> tuple[str, ...]:
    """The words of a list, or of a file with one a line."""
    if isinstance(words, list):
        return tuple(words)
    try:
        lines = Path(words).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data.noise_words.{name}.words={words!r} cannot be read ({error}); name a text file with a word a line"
        ) from None
    return tuple(word for line in lines if (word := line.strip()))


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
