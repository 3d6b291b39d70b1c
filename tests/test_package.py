"""The packaging: six flat folders under one import name, and a `datasets` folder that hides nobody's `datasets`."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = sorted(SETUPTOOLS["package-dir"].values())
NOT_PACKAGED = {"tests", "benchmarks"}
NO_PACKAGE = {".venv", "data", "runs", "build", "dist", "wandb", "__pycache__"}


def test_packages_are_the_folders_with_code() -> None:
    with_code = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and path.name not in NO_PACKAGE and not path.name.startswith(".") and any(path.glob("*.py"))
    }
    assert with_code - NOT_PACKAGED == set(FOLDERS)
    assert SETUPTOOLS["packages"] == list(SETUPTOOLS["package-dir"])
    assert all(package == f"trivium.{folder}" for package, folder in SETUPTOOLS["package-dir"].items())


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_are_flat(folder: str) -> None:
    assert not [path for path in (ROOT / folder).rglob("*.py") if path.parent != ROOT / folder]
    assert (ROOT / folder / "__init__.py").exists() == (folder != "datasets")


def test_the_root_is_no_package() -> None:
    assert not (ROOT / "__init__.py").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the checkout, built offline with the build tools that are installed."""
    copy = tmp_path_factory.mktemp("checkout with a space")
    for folder in [*FOLDERS, "tests"]:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE", "Makefile", "CHANGELOG.md"):
        shutil.copy(ROOT / file, copy / file)
    command = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", command], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next((copy / "dist").glob("*.whl")))


def test_wheel_holds_the_six_folders(wheel: zipfile.ZipFile) -> None:
    patterns = {folder: ["*.py"] for folder in FOLDERS}
    for package, extra in SETUPTOOLS["package-data"].items():
        patterns[SETUPTOOLS["package-dir"][package]] += extra
    expected = {
        f"trivium/{path.relative_to(ROOT).as_posix()}"
        for folder, globs in patterns.items()
        for pattern in globs
        for path in (ROOT / folder).glob(pattern)
    }
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert {"trivium/pretrain/recipes/demo.yaml", "trivium/launch/cpu.yaml"} <= held


def test_wheel_says_licence_command_and_needs(wheel: zipfile.ZipFile) -> None:
    info = f"trivium-{PROJECT['project']['version']}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Version 2.0, January 2004" in wheel.read(f"{info}/licenses/LICENSE").decode()
    assert "trivium = trivium.launch.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert metadata.count("Requires-Dist:") >= len(PROJECT["project"]["dependencies"])


# Ours first, then theirs: the order in a training process. Both ways of starting put the current folder on sys.path.
PROBE = """
from trivium.datasets.registry import Registry
import accelerate.utils, transformers.utils
print("transformers", bool(transformers.utils.is_datasets_available()))
print("accelerate", bool(accelerate.utils.is_datasets_available()))
try:
    import datasets
    print("file", datasets.__file__)
except ImportError:
    print("file absent")
"""
STARTS = {"-m": ["-m", "probe_datasets"], "-c": ["-c", PROBE]}


def probe(start: str, site: Path, folder: Path) -> dict[str, str]:
    """What a process started in `folder` takes for `datasets`, with `site` on its path."""
    site.joinpath("probe_datasets.py").write_text(PROBE)
    done = subprocess.run(
        [sys.executable, *STARTS[start]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("transf", "accel", "file")))


@pytest.mark.parametrize("start", STARTS)
def test_our_folder_is_not_taken_for_hugging_face_datasets(start: str, tmp_path: Path) -> None:
    found = probe(start, tmp_path, ROOT)
    if not list(importlib.metadata.distributions(name="datasets")):
        assert found == {"transformers": "False", "accelerate": "False", "file": "absent"}
    else:
        assert found["transformers"] == found["accelerate"] == "True"
        assert not Path(found["file"]).is_relative_to(ROOT / "datasets")


def test_hugging_face_datasets_is_the_one_imported(tmp_path: Path) -> None:
    package = tmp_path / "datasets"
    package.mkdir()
    package.joinpath("__init__.py").write_text('__version__ = "4.0.0"\n')
    info = tmp_path / "datasets-4.0.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: datasets\nVersion: 4.0.0\n")
    found = probe("-m", tmp_path, ROOT)
    assert found == {"transformers": "True", "accelerate": "True", "file": str(package / "__init__.py")}


def test_the_root_is_no_import_path() -> None:
    command = "import sys; import trivium.datasets.registry; print(*sys.path, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"", str(ROOT)} & set(done.stdout.removesuffix("\n").split("\n"))
