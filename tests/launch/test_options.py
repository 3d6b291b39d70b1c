"""Command-line words -> constructor options."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from trivium.datasets.registry import InputError
from trivium.launch.options import parse


def parameter(annotation: Any) -> inspect.Parameter:
    return inspect.Parameter("x", inspect.Parameter.KEYWORD_ONLY, annotation=annotation)


PARAMETERS = {
    "count": parameter(int),
    "share": parameter(float | None),
    "sizes": parameter(list[int]),
    "two_digits": parameter(bool),
    "label": parameter(str | None),
    "folder": parameter(Path),
}


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {}),
        (["--count", "3"], {"count": 3}),
        (["--count=3"], {"count": 3}),
        (["count=3"], {"count": 3}),
        (["--count", "-3"], {"count": -3}),
        (["--share", "null"], {"share": None}),
        (["--sizes", "[1, 2]"], {"sizes": [1, 2]}),
        (["--two-digits", "--count", "3"], {"two_digits": True, "count": 3}),
        (["--two-digits", "false"], {"two_digits": False}),
        (["--label", "007"], {"label": "007"}),
        (["--folder", "1"], {"folder": "1"}),
        (["label=a=b"], {"label": "a=b"}),
        (["--unknown", "7"], {"unknown": "7"}),
    ],
)
def test_every_form(words: list[str], options: dict[str, Any]) -> None:
    assert parse(words, PARAMETERS) == options


@pytest.mark.parametrize(
    ("words", "named"), [(["3"], "'3'"), (["--count", "3", "4"], "'4'"), (["--sizes=[1"], "sizes")]
)
def test_mistakes(words: list[str], named: str) -> None:
    with pytest.raises(InputError, match=named):
        parse(words, PARAMETERS)
