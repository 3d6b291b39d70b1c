"""What is registered, as text: the lists and pages that `trivium objectives`, `towers`, `tasks` and `sources` print."""

from __future__ import annotations

import inspect
from typing import Any

from ..datasets.registry import Registry


def listing(registry: Registry) -> str:
    """One line per entry: its name and the first line of its docstring."""
    return columns([(name, _doc(registry.get(name)).partition("\n")[0]) for name in registry.names()])


def page(registry: Registry, name: str) -> str:
    """Everything about one entry: what it needs, its options with types and defaults, its docstring, where it is.

    Raises InputError, naming the nearest, when there is no entry called `name`.
    """
    cls = registry.get(name)
    options = [
        (key, f"{_type(parameter.annotation)}{_default(parameter)}")
        for key, parameter in registry.parameters(name).items()
    ]
    table = columns([(f"  {key}", kind) for key, kind in options]) if options else "  none"
    facts = [("needs", ", ".join(sorted(getattr(cls, "needs", ())))), ("memory", getattr(cls, "memory", ""))]
    lines = columns([(f"{key}:", text) for key, text in facts if text])
    head = f"{registry.kind} {name} ({cls.__module__})" + (f"\n{lines}" if lines else "")
    return f"{head}\n\noptions:\n{table}\n\n{_doc(cls)}"


def card(facts: dict[str, Any]) -> str:
    """Nested facts, of a source's shards or of a checked recipe, as YAML: short parts on one line."""
    import yaml

    return yaml.safe_dump(facts, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120).rstrip()


def columns(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns of text."""
    width = max((len(left) for left, _ in rows), default=0)
    return "\n".join(f"{left:<{width}}  {right}".rstrip() for left, right in rows)


def _doc(cls: type) -> str:
    """The docstring of `cls` itself: an inherited one (nn.Module's, say) would describe another class."""
    return inspect.cleandoc(cls.__doc__ or "")


def _type(annotation: Any) -> str:
    return annotation.__name__ if type(annotation) is type else inspect.formatannotation(annotation)


def _default(parameter: inspect.Parameter) -> str:
    return ", must be given" if parameter.default is parameter.empty else f" = {parameter.default!r}"
