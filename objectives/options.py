"""Rules for the options of objectives, each with the remedy in its message. NaN keeps none of them."""

from __future__ import annotations

import math

from ..datasets.registry import InputError


def finite(remedy: str, **values: float) -> None:
    """InputError unless each of the named values is finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise InputError(f"{name}={value} is not finite; {remedy}")


def positive(remedy: str, **values: float) -> None:
    """InputError unless each of the named values is finite and above 0."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise InputError(f"{name}={value} is not positive and finite; {remedy}")


def not_negative(remedy: str, **values: float) -> None:
    """InputError unless each of the named values is finite and 0 or more."""
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise InputError(f"{name}={value} is negative or not finite; {remedy}")


def share(remedy: str, **values: float) -> None:
    """InputError unless each of the named values is in [0, 1]."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise InputError(f"{name}={value} is outside [0, 1]; {remedy}")
