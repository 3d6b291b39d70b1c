"""A recipe (YAML) plus overrides -> a validated Config. Nothing else reads recipe files.

Every option is declared here once, with its meaning; `--help` and the error messages are made from these fields.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from ..datasets.registry import InputError, nearest

RECIPES = Path(__file__).parent / "recipes"


class ForeignRun(InputError):
    """The run directory holds another run, whose records are not ours to change."""


def _named(value: Any) -> Any:
    """`objective=gram` means `objective={name: gram}`."""
    return {"name": value} if isinstance(value, str) else value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Named(Section):
    """A registered class: its name, and its constructor's options beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(description="registered name")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


NamedOption = Annotated[Named, BeforeValidator(_named)]
Patterns = str | list[str]


class NoiseWords(Section):
    words: str | list[str] = Field(
        description="a file with a word a line, or the words; those of the captions are left out"
    )
    probability: float = Field(0.15, gt=0, le=1, description="that a caption gets one of them")


class Data(Section):
    train: Patterns = Field(description="shards to train on: path, glob or {000..012} range, or a list of them")
    val: Patterns | None = Field(None, description="shards of the periodic evaluation; chooses the best checkpoint")
    test: Patterns | None = Field(None, description="shards of the final evaluation; never used to choose anything")
    fields: dict[str, str | list[str]] | None = Field(
        None, description="by modality, the parts of a sample (file extensions) it is read from; default by kind"
    )
    decoder: str = Field("pyav", description="video decoder: pyav (planned decode) or decord")
    crop_area: float = Field(
        0.8, gt=0, le=1, description="training crops frames to a random square of at least this share; 1 does not crop"
    )
    noise_words: dict[str, NoiseWords] = Field(
        {}, description="by text modality, words put into its captions in training (bucket loss; see the paper)"
    )
    workers: int = Field(2, ge=0, description="decoding processes per rank; 0 decodes in the training process")
    corrupt_share: float = Field(
        0.01, ge=0, le=1, description="the run stops when more than this share of the samples seen is corrupt"
    )


class Head(Section):
    bias: bool = Field(False, description="give the linear head a bias")


class Modality(Section):
    tower: NamedOption = Field(description="tower name and its options (`trivium towers NAME`)")
    head: Head = Field(Head(), description="linear head to the shared space")


class Group(Section):
    match: str = Field(description="regular expression searched in parameter names; the first group that matches wins")
    lr_scale: float = Field(1.0, ge=0, description="multiplies train.lr")
    weight_decay: float | None = Field(None, ge=0, description="instead of train.weight_decay")
    frozen: bool = Field(False, description="do not train these parameters")

    @field_validator("match")
    @classmethod
    def _is_an_expression(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"no regular expression ({error})") from None
        return value


class Train(Section):
    steps: int = Field(gt=0, description="optimizer steps of the whole run")
    batch_size: int = Field(gt=1, description="clips per step over all ranks")
    chunk: int | None = Field(
        None, gt=0, description="clips per forward pass of a rank: larger batches by cached embeddings (exact)"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the towers; scores are always fp32")
    lr: float = Field(1e-4, gt=0, description="peak learning rate (AdamW)")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW betas")
    eps: float = Field(1e-6, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(0.01, ge=0, description="of matrices; vectors (norms, biases, temperatures) get none")
    clip_norm: float | None = Field(1.0, gt=0, description="gradient norm limit; null turns clipping off")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warm-up")
    final_lr_scale: float = Field(0.0, ge=0, le=1, description="share of train.lr left at the last step")
    groups: list[Group] = Field([], description="parameter groups, each {match: ..., and what differs for it}")


class Distributed(Section):
    zero: Literal["auto", 0, 1, 2, 3] = Field(
        "auto", description="DeepSpeed ZeRO stage; 0 = plain DDP; auto = 1 from two GPUs on, else 0"
    )
    bucket_mb: int = Field(200, gt=0, description="size of ZeRO's communication buckets in MB")
    persist_below: int = Field(
        100_000, ge=0, description="ZeRO-3 keeps parameters of fewer elements than this whole on every rank"
    )
    timeout_minutes: float = Field(30, gt=0, description="a collective that takes longer ends the job")


class Evals(Section):
    every: int | None = Field(None, gt=0, description="steps between evaluations on data.val; null = only at the end")
    tasks: dict[str, dict[str, Any]] = Field({"retrieval": {}}, description="task name: its options")
    batch_size: int = Field(64, gt=0, description="clips per forward pass of a rank")
    best: list[str] = Field(
        ["retrieval/text->video/cosine/R@1"],
        min_length=1,
        description="TASK/METRIC on data.val, one or several: the checkpoint with the highest mean of them is the best",
    )

    @field_validator("best", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Checkpoint(Section):
    every: int | None = Field(None, gt=0, description="steps between checkpoints; one is always written at the end")
    minutes: float | None = Field(None, gt=0, description="minutes between checkpoints")
    keep: int = Field(2, gt=0, description="how many of the newest stay (the best one stays besides)")


class Log(Section):
    every: int = Field(10, gt=0, description="steps between log lines")
    geometry: bool = Field(
        True, description="log the geometry of the batch's embeddings (alignment, gap, zeta, volumes ...)"
    )
    conflicts: int | None = Field(
        100, ge=50, description="steps between measurements of how the loss's terms conflict; not under ZeRO-3"
    )
    wandb: bool = Field(True, description="log to Weights & Biases: offline unless WANDB_API_KEY is set")
    project: str = Field("trivium", description="W&B project")


class Config(Section):
    name: str = Field(description="name of the experiment")
    run: Path = Field(description="run directory: everything the run writes is in it")
    seed: int = Field(0, ge=0, description="keys the order of the data and every random draw")
    data: Data = Field(description="shards and decoding")
    modalities: dict[str, Modality] = Field(min_length=2, description="by modality name: its tower and head")
    dim: int = Field(512, gt=1, description="dimension of the shared embedding space")
    objective: NamedOption = Field(description="objective name and its options (`trivium objectives NAME`)")
    train: Train = Field(description="optimisation")
    distributed: Distributed = Field(Distributed(), description="engine")
    evals: Evals = Field(Evals(), description="zero-shot evaluation")
    checkpoint: Checkpoint = Field(Checkpoint(), description="checkpoints")
    log: Log = Field(Log(), description="telemetry")
    init_from: str | None = Field(
        None, description="start from these weights: a run, a checkpoint folder or a weights file of another project"
    )

    def tree(self) -> dict[str, Any]:
        """As plain YAML-able data; `Config.model_validate` of it gives the same Config."""
        return self.model_dump(mode="json")


def recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def load(recipe: str, overrides: list[str] = ()) -> Config:
    """The validated configuration of a recipe (a shipped name or a YAML file) with `key.subkey=value` overrides.

    Raises InputError for an unknown recipe, key or value, naming the nearest known.
    """
    return validate(read(recipe, overrides))


def read(recipe: str, overrides: list[str] = ()) -> dict[str, Any]:
    """A recipe and what it extends, with the overrides, as plain data that is not validated yet."""
    tree = _read(recipe)
    for override in overrides:
        _apply(tree, override)
    return tree


def validate(tree: dict[str, Any]) -> Config:
    """The Config of plain data. Raises InputError for an unknown key or a wrong value."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(_explain(error)) from None


def save(config: Config, path: Path) -> None:
    """Write the resolved configuration; as a recipe it starts the same run again."""
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(yaml.safe_dump(config.tree(), sort_keys=False, allow_unicode=True))
    scratch.replace(path)


def _read(recipe: str, folder: Path = Path(), seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tree of a shipped recipe's name or of a file, a relative path being seen from `folder`."""
    path = recipes().get(recipe, folder / recipe)
    if not path.is_file():
        raise InputError(f"no recipe is called {recipe!r} and no such file exists; {nearest(recipe, recipes())}")
    if str(path) in seen:
        raise InputError(f"recipe {recipe!r} extends itself: {' -> '.join(seen)}; remove one `extends`")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}; mend that line") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds {type(tree).__name__}, not `key: value` lines; see `trivium recipes demo`")
    base = tree.pop("extends", None)
    return _merge(_read(base, path.parent, (*seen, str(path))), tree) if base else tree


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; a registered class with another name drops the options of the former one."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        sections = isinstance(value, dict) and isinstance(old, dict)
        renamed = sections and value.get("name", old.get("name")) != old.get("name")
        merged[key] = _merge(old, value) if sections and not renamed else value
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise InputError(f"override {override!r} is not of the form key.subkey=value, e.g. train.lr=0.001")
    *parents, last = path.split(".")
    for parent in parents:
        node = tree.setdefault(parent, {})
        if isinstance(node, str):  # objective: gram, then objective.anchor=video
            node = tree[parent] = {"name": node}
        if not isinstance(node, dict):
            raise InputError(f"override {override!r}: {parent!r} is a value, not a section; set it as {parent}=...")
        tree = node
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: {text!r} is not a YAML value; quote it") from None
    old = tree.get(last)
    if not (isinstance(old, dict) and isinstance(value, str) and old.get("name") == value):
        tree[last] = value  # the name that is there already keeps its options


def _explain(error: ValidationError) -> str:
    # a key with a typo is also one that is missing: the first says more
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    path = [str(part) for part in first["loc"]]
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        return f"no option is called {where!r}; {nearest(path[-1], _keys(path[:-1]))}"
    if first["type"] == "missing":
        return f"the recipe lacks {where!r}; add it, or start from one of: {', '.join(recipes())}"
    message = first["msg"].removeprefix("Value error, ")
    meaning = describe().get(_described(path), "see --help")
    return f"{where}={first['input']!r}: {message}; {where} is: {meaning}"


def _keys(path: list[str]) -> list[str]:
    """The options of the section at `path`."""
    prefix = f"{_described(path)}." if path else ""
    return sorted({key[len(prefix) :].split(".")[0] for key in describe() if key.startswith(prefix)})


def _described(path: list[str]) -> str:
    """The name under which `describe` knows an option: NAME for a key of the user's own, N for a place in a list."""
    known, prefix = describe(), ""
    for part in path:
        spelled = next(
            (p for p in (part, "NAME", "N") if any(f"{key}.".startswith(f"{prefix}{p}.") for key in known)), part
        )
        prefix += f"{spelled}."
    return prefix.removesuffix(".")


def describe(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, str]:
    """Every option by its dotted name, with its meaning and default: the text of `--help`."""
    lines: dict[str, str] = {}
    for key, field in section.model_fields.items():
        silent = field.is_required() or isinstance(field.default, (BaseModel, list))
        default = (
            "" if silent else f" [{yaml.safe_dump(field.default, default_flow_style=True).splitlines()[0]}]"
        )  # as a recipe spells it
        lines[prefix + key] = f"{field.description}{default}"
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            lines |= describe(kind, f"{prefix}{key}.")
        for part in get_args(kind):  # of a list or of a dict of sections
            if isinstance(part, type) and issubclass(part, Section):
                lines |= describe(part, f"{prefix}{key}.{'N' if get_origin(kind) is list else 'NAME'}.")
    return lines
