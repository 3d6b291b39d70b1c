"""Who may import whom, and what no file may do: read from the syntax trees, without running anything."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAF = "datasets.registry"
MAY_IMPORT = {
    "objectives": set(),
    "modalities": set(),
    "datasets": set(),
    "evals": {"modalities", "objectives", "datasets"},
    "pretrain": {"modalities", "objectives", "datasets", "evals"},
    "launch": {"modalities", "objectives", "datasets", "evals", "pretrain"},
}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
Finding = tuple[int, str]  # line, rule


def inside_functions(tree: ast.AST) -> set[ast.AST]:
    """All nodes that run only when a function is called."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {child for function in functions for child in ast.walk(function) if child is not function}


def targets(node: ast.ImportFrom, folder: str) -> list[str]:
    """The modules that a relative import names, as paths below `trivium`: `from ..evals.report import x` is one."""
    base = [folder] if node.level == 1 else []
    if node.module:
        return [".".join([*base, node.module])]
    return [".".join([*base, alias.name]) for alias in node.names]


def layer_findings(tree: ast.AST, folder: str) -> Iterator[Finding]:
    """What breaks the layers in a file of `folder`."""
    late = inside_functions(tree)
    for node in ast.walk(tree):
        absolute = []
        if isinstance(node, ast.Import):
            absolute = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute = [node.module or ""]
        for name in absolute:
            if name.split(".")[0] in {"trivium", *MAY_IMPORT}:
                yield node.lineno, f"imports {name!r} absolutely; inside the folders our imports are relative"
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        if node.level > 2:
            yield node.lineno, "imports from above the package; folders are flat, so two dots are the most"
            continue
        for target in targets(node, folder):
            other = target.split(".")[0]
            if other == folder or target == LEAF:
                continue
            if other not in MAY_IMPORT[folder]:
                known = ", ".join(sorted(MAY_IMPORT[folder])) or "nothing of ours"
                yield node.lineno, f"{folder} imports {target!r}; it may import {known} and {LEAF}"
            elif folder == "launch" and node not in late:
                yield node.lineno, f"launch imports {target!r} at the top; it does so inside the function that needs it"


def safety_findings(tree: ast.AST) -> Iterator[Finding]:
    """What could run code out of somebody's file: pickles, and torch.load or np.load that allow them."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] in PICKLES and not (name == "pickle" and only_its_error(tree)):
                yield node.lineno, f"imports {name!r}; data from outside is never unpickled"
            if name == "torch.load":
                yield node.lineno, "imports torch.load by name; call it as torch.load(..., weights_only=True)"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = [key.value for key in node.keywords if key.arg == "weights_only"]
            if not safe or not isinstance(safe[0], ast.Constant) or safe[0].value is not True:
                yield node.lineno, "calls torch.load without weights_only=True"
        if isinstance(node, ast.Call) and any(
            key.arg == "allow_pickle" and not (isinstance(key.value, ast.Constant) and key.value.value is False)
            for key in node.keywords
        ):
            yield node.lineno, "allows pickles in an array file"


def only_its_error(tree: ast.AST) -> bool:
    """Whether `pickle` serves for nothing but to catch the error that torch.load raises."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "pickle"]
    errors = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "UnpicklingError"]
    return bool(names) and {id(name) for name in names} <= {id(error.value) for error in errors}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def report(path: Path, findings: Iterator[Finding]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{line}: {rule}" for line, rule in findings]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_layers(folder: str) -> None:
    assert sources(folder), f"{folder}/ holds no code"
    broken = [line for path in sources(folder) for line in report(path, layer_findings(parse(path), folder))]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("folder", [*MAY_IMPORT, "benchmarks"])
def test_nothing_is_unpickled(folder: str) -> None:
    broken = [line for path in sources(folder) for line in report(path, safety_findings(parse(path)))]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("folder", [*MAY_IMPORT, "benchmarks", "tests"])
def test_no_file_without_a_subject(folder: str) -> None:
    assert not [path for path in sources(folder) if path.name in {"utils.py", "util.py", "helpers.py", "misc.py"}]


def parse(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("objectives", "from ..modalities import build"),
        ("objectives", "from .. import modalities"),
        ("datasets", "from ..datasets import stream\nfrom ..evals.report import write_report"),
        ("evals", "from ..pretrain.config import load"),
        ("evals", "def late():\n    from ..pretrain.config import load"),
        ("pretrain", "from ..launch.cli import main"),
        ("pretrain", "from trivium.datasets.batch import Batch"),
        ("pretrain", "import trivium.datasets.batch"),
        ("modalities", "import datasets"),
        ("modalities", "from ...trivium import x"),
        ("launch", "from ..evals.report import write_report"),
        ("launch", "class A:\n    from ..evals import report"),
    ],
)
def test_the_layer_rules_find_what_they_forbid(folder: str, line: str) -> None:
    assert list(layer_findings(ast.parse(line), folder))


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("objectives", "from ..datasets.registry import Registry"),
        ("objectives", "from . import gather\nfrom .gather import gather_rows\nfrom ..objectives import build"),
        ("evals", "from ..datasets.batch import Batch"),
        ("launch", "from .catalogue import page\nfrom ..datasets.registry import InputError"),
        ("launch", "def late():\n    from ..pretrain import config"),
        ("datasets", "import webdataset\nfrom torch import Tensor"),
    ],
)
def test_the_layer_rules_let_the_rest_pass(folder: str, line: str) -> None:
    assert not list(layer_findings(ast.parse(line), folder))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import pickle\npickle.loads(data)",
        "import pickle\ntry:\n    pickle.loads(data)\nexcept pickle.UnpicklingError:\n    raise",
        "import pickle as p\np.loads(data)",
        "from pickle import loads",
        "import dill as d",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=trust)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_safety_rules_find_what_they_forbid(line: str) -> None:
    assert list(safety_findings(ast.parse(line)))


def test_the_safety_rules_let_the_rest_pass() -> None:
    safe = """
import pickle
from torch import nn
try:
    torch.load(path, map_location="cpu", weights_only=True)
except pickle.UnpicklingError:
    np.load(path)
"""
    assert not list(safety_findings(ast.parse(safe)))
