"""Weights on disk: a model of ours saved and loaded, and the checkpoints of other projects read by name.

Foreign files are described by functions `names -> {name in the file: name in our tower}`, one for each tower class
that publishes it as `translate`; a name that they leave out belongs to another part of the file. Read so far: VAST and
GRAM (all three towers and their heads), BEATs, EVA-CLIP, open_clip, timm, Hugging Face BERT. Nothing is ever unpickled
beyond tensors and plain containers.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..datasets.registry import InputError
from .model import MultimodalModel

WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"


# A model of ours


def save_model(folder: Path, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write `model.safetensors` and `model.json` into `folder`, which is made if need be.

    Args:
        state: a MultimodalModel's state dict; tensors may be strided, on any device, or share memory.
        description: `MultimodalModel.description()`.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(_unshared(state), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_model(folder: Path, device: str | torch.device = "cpu") -> MultimodalModel:
    """The model that `save_model` wrote, in evaluation mode. Random generators are left as they were.

    Raises InputError when a file is absent or damaged, or when the two files belong to different models.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a checkpoint folder, which holds {DESCRIPTION} and {WEIGHTS}")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        with torch.random.fork_rng(devices=[]):
            model = MultimodalModel(**description)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise InputError(f"{path} describes no model ({error}); take another checkpoint of the run") from None
    load_strict(model, read_state(folder / WEIGHTS), folder / WEIGHTS)
    return model.to(device).eval()


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Load `state`, whose names and shapes must be exactly the model's; InputError naming `source` otherwise."""
    own = model.state_dict()
    problems = [
        _listed("missing", [key for key in own if key not in state]),
        _listed("unexpected", [key for key in state if key not in own]),
        _listed("of another shape", [_shapes(key, state[key], own[key]) for key in own if _misfits(key, state, own)]),
    ]
    if any(problems):
        raise InputError(
            f"{source} is the checkpoint of another model ({'; '.join(filter(None, problems))}); "
            "give the model the same towers and sizes, or start from matching weights with init_from"
        )
    model.load_state_dict(state)


# Other runs' and projects' weights


@dataclass(frozen=True)
class LoadReport:
    """What `load_matching` did.

    Attributes:
        source: the file.
        loaded: names in the model that got their weights from the file.
        missing: names in the model that did not.
        unexpected: names in the file that read as parts of the model but have no place there.
        resized: names in `loaded` whose position embedding was interpolated to the model's grid.
        mismatched: `name: file shape, model shape` of those in `missing` that the file has in another shape.
        ignored: how many tensors of the file belong to parts that the model does not have.
    """

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    resized: tuple[str, ...]
    mismatched: tuple[str, ...]
    ignored: int

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing)
        parts = [f"{self.source}: {len(self.loaded)} of {total} tensors loaded"]
        for label in ("resized", "mismatched", "missing", "unexpected"):
            parts.append(_listed(label, getattr(self, label)))
        parts.append(f"{self.ignored} of other parts ignored" if self.ignored else "")
        return "; ".join(filter(None, parts))


def load_matching(model: nn.Module, source: str | Path) -> LoadReport:
    """Start `model` from the weights in `source` that match its own by name and shape.

    Args:
        model: a MultimodalModel or a tower.
        source: a folder with `model.safetensors` (a checkpoint of ours, a Hugging Face model), a `.safetensors`, `.pt`
            or `.bin` file, or the name of a Hugging Face repository. Foreign names are translated; an absolute position
            embedding of another grid is interpolated.

    Raises InputError when the file cannot be read or nothing in it matches.
    """
    path = locate(str(source))
    state = read_state(path)
    names = _translate(model, state) or {key: (key,) for key in state}
    own = model.state_dict()
    found, resized, mismatched, unexpected = {}, [], [], []
    for theirs, ours in names.items():
        for key in ours:
            if key not in own:
                unexpected.append(theirs)
                continue
            value, was_resized = _fit(key, state[theirs], own[key])
            if value is None:
                mismatched.append(_shapes(key, state[theirs], own[key]))
                continue
            found[key] = value
            resized += [key] if was_resized else []
    if not found:
        raise InputError(
            f"{path} has no weights for this model ({_listed('file', list(state))}; {_listed('model', list(own))}); "
            "give a checkpoint of the same architecture"
        )
    model.load_state_dict(found, strict=False)
    missing = tuple(key for key in own if key not in found)
    ignored = len(state.keys() - names.keys())
    return LoadReport(
        str(path), tuple(found), missing, tuple(unexpected), tuple(resized), tuple(mismatched), ignored
    )  # fmt: skip


def load_pretrained(tower: nn.Module, source: str) -> LoadReport:
    """Give every parameter of `tower` its weights from `source` (see `load_matching`); InputError if any is left."""
    report = load_matching(tower, source)
    if report.missing or report.unexpected:
        raise InputError(f"pretrained weights do not fit the tower: {report}; set the tower's sizes to the file's")
    return report


def locate(source: str) -> Path:
    """The local path `source`, or a local copy of the Hugging Face repository of that name.

    Raises InputError when it is neither, or the repository cannot be reached.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    is_file_name = path.suffix in {".safetensors", ".pt", ".pth", ".bin", ".json", ".txt"}
    if is_file_name or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise InputError(f"{source} does not exist; give an existing file or folder, or the name of a hub repository")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.txt", "*.bin"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{source!r} is neither a local path nor a repository that can be reached ({reason}); "
            "check the name, or download it on a machine with network and give the folder"
        ) from None
    return folder


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: a safetensors file, a `torch.save` file, or a folder that holds one.

    Of a `torch.save` file only tensors and plain containers are unpickled; the wrappings "model", "state_dict" and
    "module" around the state dict, and a "module." before every name, are taken off.
    """
    file = _weights_file(path) if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file} does not exist; give a .safetensors, .pt or .bin file, or a folder that holds one")
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    return _read_torch(file)


def bert_names(names: Iterable[str]) -> dict[str, str]:
    """BERT in the files of Hugging Face (with or without heads, old and new names), VAST and GRAM."""
    names = set(names)
    prefix = _prefix(names, ("multimodal_encoder.bert.", "bert.", ""), "embeddings.word_embeddings.weight")
    dropped = ("pooler.", "embeddings.position_ids", "cls.")
    found = {}
    for name, key in _under(names, prefix):
        if key.startswith(dropped) or ".crossattention." in key:
            continue
        found[name] = "bert." + key.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        )
    return found


def eva_names(names: Iterable[str]) -> dict[str, str]:
    """The visual tower in the files of EVA-CLIP, open_clip, timm, VAST and GRAM."""
    names = set(names)
    prefixes = ("vision_encoder.visual.", "visual.trunk.", "visual.", "trunk.", "")
    prefix = _prefix(names, prefixes, "patch_embed.proj.weight")
    split = f"{prefix}blocks.0.attn.q_proj.weight" in names  # EVA-02: q, k and v in matrices of their own
    table = {"attn.inner_attn_ln.": "attn.norm.", "mlp.ffn_ln.": "mlp.norm."}
    table |= {"mlp.w1.": "mlp.fc1_g.", "mlp.w2.": "mlp.fc1_x.", "mlp.w3.": "mlp.fc2."}
    table |= {"attn.q_bias": "attn.q_proj.bias", "attn.v_bias": "attn.v_proj.bias"} if split else {}
    found = {}
    for name, key in _under(names, prefix):
        if key.startswith(("head.", "mask_token", "lm_head.", "rope.")) or ".rope." in key:
            continue
        for theirs, ours in table.items():
            key = key.replace(theirs, ours)
        found[name] = "trunk." + key
    return found


def beats_names(names: Iterable[str]) -> dict[str, str]:
    """BEATs in its own releases (pretrained, or fine-tuned with a predictor), in VAST and in GRAM."""
    names = set(names)
    prefix = _prefix(names, ("audio_encoder.", ""), "patch_embedding.weight")
    table = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    found = {}
    for name, key in _under(names, prefix):
        repeated = key.endswith("relative_attention_bias.weight") and not key.startswith("encoder.layers.0.")
        if key.startswith("predictor.") or repeated:
            continue
        for theirs, ours in table.items():
            key = key.replace(theirs, ours)
        found[name] = key
    return found


_VAST_HEADS = {"bert": "contra_head_t", "eva_clip": "contra_head_v", "beats": "contra_head_a"}


def _translate(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """By name in a foreign file, the names in `model` (two towers of a kind get the same weights); {} if none is."""
    found: dict[str, tuple[str, ...]] = {}
    for place, module in model.named_modules():
        if hasattr(module, "translate"):
            for theirs, ours in module.translate(state).items():
                found[theirs] = (*found.get(theirs, ()), f"{place}.{ours}" if place else ours)
    if found and isinstance(model, MultimodalModel):
        for tower, head in _VAST_HEADS.items():
            users = [name for name in model.names if model.tower_names[name] == tower]
            if users and f"{head}.linear.weight" in state:  # the first of its kind: VAST's subtitle head is another
                found[f"{head}.linear.weight"] = (f"heads.{users[0]}.weight",)
    return found


def _prefix(names: set[str], prefixes: tuple[str, ...], probe: str) -> str | None:
    return next((prefix for prefix in prefixes if prefix + probe in names), None)


def _under(names: set[str], prefix: str | None) -> list[tuple[str, str]]:
    """(name, name without the prefix) of all that start with it, sorted; none for no prefix."""
    if prefix is None:
        return []
    return [(name, name.removeprefix(prefix)) for name in sorted(names) if name.startswith(prefix)]


def _fit(key: str, value: Tensor, own: Tensor) -> tuple[Tensor | None, bool]:
    """`value` in the shape of `own` and whether it was resized; (None, False) where that cannot be."""
    if value.shape == own.shape:
        return value, False
    if key.endswith("pos_embed") and value.dim() == own.dim() == 3 and value.shape[-1] == own.shape[-1]:
        resized = resize_positions(value, own.shape[1])
        return resized, resized is not None
    return None, False


def resize_positions(positions: Tensor, tokens: int) -> Tensor | None:
    """(1, 1 + side², d) -> (1, tokens, d): the grid interpolated (bicubic), the class token's row kept.

    None when one of the two is not a class token and a square grid.
    """
    old, new = math.isqrt(positions.shape[1] - 1), math.isqrt(tokens - 1)
    if old * old + 1 != positions.shape[1] or new * new + 1 != tokens:
        return None
    grid = positions[:, 1:].float().transpose(1, 2).unflatten(-1, (old, old))
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


def _weights_file(folder: Path) -> Path:
    for name in (WEIGHTS, "open_clip_model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    files = sorted(file for file in folder.iterdir() if file.suffix in {".safetensors", ".pt", ".bin"})
    if len(files) == 1:
        return files[0]
    there = ", ".join(file.name for file in files) or "none"
    raise InputError(f"{folder} holds no {WEIGHTS} (weight files there: {there}); name the file itself")


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file} is no whole safetensors file ({error}); copy or download it again") from None


def _read_torch(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{file} does not read as tensors and plain containers ({reason}); code inside a checkpoint is never run: "
            "convert it to safetensors where you trust it"
        ) from None
    for wrapping in ("model", "state_dict", "module"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapping), Mapping):
            content = content[wrapping]
    if not isinstance(content, Mapping):
        raise InputError(f"{file} holds a {type(content).__name__}, not a state dict; give a file of named tensors")
    state = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, no two in the same memory, as safetensors asks."""
    seen: set[int] = set()
    out = {}
    for key, value in state.items():
        value = value.detach().to("cpu").contiguous()
        storage = value.untyped_storage().data_ptr()
        out[key] = value.clone() if storage in seen else value
        seen.add(storage)
    return out


def _misfits(key: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    return key in state and state[key].shape != own[key].shape


def _shapes(key: str, theirs: Tensor, ours: Tensor) -> str:
    return f"{key}: {list(theirs.shape)} in the file, {list(ours.shape)} in the model"


def _listed(label: str, names: Iterable[str]) -> str:
    """`label` and the first three names, "" when there are none."""
    names = list(names)
    if not names:
        return ""
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{label}: {', '.join(names[:3])}{more}"
