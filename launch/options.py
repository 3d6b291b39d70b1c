"""Words of a command line -> the options of a registered class."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, get_args

from ..datasets.registry import InputError


def parse(words: list[str], parameters: dict[str, inspect.Parameter]) -> dict[str, Any]:
    """Options by name out of `--name value`, `--name=value`, `name=value` and, for true, the bare `--name`.

    A value is read as YAML (6000, 0.5, [a, b], null), except where the parameter takes text: that stays as typed.
    Unknown names pass through for the registry to answer. Raises InputError for a word in another form.
    """
    texts: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not equals and not word.startswith("--"):
            raise InputError(f"{word!r} belongs to no option; write it as --option {word} or option={word}")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        texts[name.replace("-", "_")] = text
    return {name: _value(name, text, parameters.get(name)) for name, text in texts.items()}


def _value(name: str, text: str, parameter: inspect.Parameter | None) -> Any:
    if parameter is None or {str, Path} & {parameter.annotation, *get_args(parameter.annotation)}:
        return text
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--{name} {text!r} is not a YAML value; write it like 3, 0.5, null or [1, 2]") from None
