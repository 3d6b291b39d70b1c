"""Names to classes, and the error for a user's mistake.

Standard library only at import time: this file is the one leaf that every folder of Trivium may import.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Any, TypeVar, get_type_hints

Class = TypeVar("Class", bound=type)

# A checkout's root is no place to import from, but `python -m` puts it on sys.path when it is the current folder. Other
# libraries would then find our folder `datasets` where they look for Hugging Face's package of that name: transformers
# asks only whether it can be found. (In an installed wheel this names site-packages/trivium, which is never there.)
_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != _ROOT]


class InputError(ValueError):
    """A user's mistake. The message is one line: the value, the rule, the remedy."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message for an unknown `name`: the nearest known names, then all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{hint}known: {', '.join(known) or 'none'}"


class Registry:
    """Classes of one kind by name: those of our own folder and those of other packages' entry points.

    Every module of the package `trivium.<folder>` that applies `@REGISTRY.register("name")` to a class adds it, so a
    new file in the folder is all that a new entry takes. Another package adds one through the entry-point group
    `trivium.<folder>`, `name = "their.module:Class"`.

    Args:
        kind: what an entry is called in messages, e.g. "objective".
        package: the import package whose modules register entries, e.g. "trivium.objectives"; it is also the name of
            the entry-point group.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._classes: dict[str, type] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[Class], Class]:
        """Class decorator. Raises ValueError when the name is taken, naming both places."""

        def add(cls: Class) -> Class:
            taken = self._classes.get(name)
            if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(
                    f"{self.kind} {name!r} is registered twice: {taken.__module__}.{taken.__qualname__} and "
                    f"{cls.__module__}.{cls.__qualname__}; rename one"
                )
            self._classes[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """All names, sorted."""
        self._discover()
        return sorted(self._classes)

    def get(self, name: str) -> type:
        """The class called `name`; InputError with the nearest names when there is none."""
        if name not in self._classes:
            self._discover()
        if name not in self._classes:
            raise InputError(f"no {self.kind} is called {name!r}; {nearest(name, self._classes)}")
        return self._classes[name]

    def build(self, name: str, **options: Any) -> Any:
        """An instance of `name`, its options checked against (and converted to) its constructor's annotations."""
        return self.get(name)(**self.validate(name, options))

    def validate(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """`options` converted to the types that the constructor of `name` asks for, defaults left out.

        Raises InputError for an unknown option, a missing one, or a value of another type.
        """
        from pydantic import ConfigDict, ValidationError, create_model

        parameters = self.parameters(name)
        for option in options:
            if option not in parameters:
                raise InputError(f"{self.kind} {name!r} has no option {option!r}; {nearest(option, parameters)}")
        fields = {
            key: (parameter.annotation, ... if parameter.default is parameter.empty else parameter.default)
            for key, parameter in parameters.items()
        }
        model = create_model(name, __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)
        try:
            values = model(**options)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            if first["type"] == "missing":
                raise InputError(f"{self.kind} {name!r} needs the option {where!r}; set it in the recipe") from None
            raise InputError(f"{self.kind} {name!r}, option {where}={first['input']!r}: {first['msg']}") from None
        return {key: getattr(values, key) for key in options}

    def parameters(self, name: str) -> dict[str, inspect.Parameter]:
        """The constructor's parameters by name, annotations resolved: the option schema of `name`."""
        cls = self.get(name)
        hints = get_type_hints(cls.__init__)
        return {
            key: parameter.replace(annotation=hints.get(key, Any))
            for key, parameter in inspect.signature(cls.__init__).parameters.items()
            if key != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        }

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):  # __main__ is a command, not a plug-in
                importlib.import_module(f"{self.package}.{module.name}")
        for entry in entry_points(group=self.package):
            self.register(entry.name)(entry.load())


SOURCES = Registry("source", "trivium.datasets")
