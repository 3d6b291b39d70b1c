"""The set-up script: what it makes, keeps and repeats, with stand-ins for uv, apt-get and the interpreter."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKE_UV = """#!/bin/bash
echo "uv $*" >>"$LOG"
if [[ $1 == venv ]]; then mkdir -p .venv/bin && cp /bin/true .venv/bin/python; fi
[[ $1 != pip || -z ${BREAK:-} ]]
"""
FAKE_PYTHON = """#!/bin/bash
case $* in
    *version_info\\ \\<*) echo "$0" ;;
    *ensurepip*) [[ -e $(dirname "$0")/ensurepip ]] ;;
    *python%d*) echo python3.12-venv ;;
    *-m\\ venv*) echo "python $*" >>"$LOG"; mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *-m\\ pip*) echo "python $*" >>"$LOG"; cp "$(dirname "$LOG")/bin/uv-later" .venv/bin/uv ;;
esac
"""
FAKE_APT = """#!/bin/bash
echo "apt-get $*" >>"$LOG"
if [[ $1 == install ]]; then touch "$(dirname "$0")/ensurepip"; fi
"""


class Checkout:
    """A folder with the script and pyproject.toml, a folder of stand-in programs, and the log they write."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a check out"
        self.bin = folder / "bin"
        self.log = folder / "log"
        self.bin.mkdir()
        (self.root / "launch").mkdir(parents=True)
        shutil.copy(ROOT / "launch" / "venv.sh", self.root / "launch")
        shutil.copy(ROOT / "pyproject.toml", self.root)

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def run(self, **variables: str) -> tuple[int, list[str], str]:
        """Exit code, the stand-ins' calls, and what was printed on stderr."""
        self.log.write_text("")
        env = {"PATH": f"{self.bin}:/usr/bin:/bin", "LOG": str(self.log), **variables}
        done = subprocess.run(["bash", "launch/venv.sh"], cwd=self.root, env=env, capture_output=True, text=True)
        return done.returncode, self.log.read_text().splitlines(), done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def with_uv(checkout: Checkout) -> Checkout:
    checkout.program("uv", FAKE_UV)
    return checkout


@pytest.fixture
def without_uv(checkout: Checkout) -> Checkout:
    checkout.program("uv", "#!/bin/bash\nexit 127\n")  # as pyenv's stand-in does where uv is not installed
    checkout.program("uv-later", FAKE_UV)
    checkout.program("python3", FAKE_PYTHON)
    checkout.program("apt-get", FAKE_APT)
    return checkout


def actions(calls: list[str]) -> list[str]:
    """The calls that do something, by their first words."""
    return [" ".join(call.split()[:3]) for call in calls if call != "uv --version"]


def test_made_once_and_then_kept(with_uv: Checkout) -> None:
    code, calls, _ = with_uv.run()
    assert code == 0
    assert [action.split(" --")[0] for action in actions(calls)] == ["uv venv", "uv pip install"]
    assert "--compile-bytecode --editable .[dev]" in calls[-1]
    assert with_uv.run() == (0, [], "")


def test_changed_dependencies_are_installed_into_the_same_environment(with_uv: Checkout) -> None:
    with_uv.run()
    marker = with_uv.root / ".venv" / "kept"
    marker.touch()
    with (with_uv.root / "pyproject.toml").open("a") as file:
        file.write("# another dependency\n")
    code, calls, _ = with_uv.run()
    assert (code, actions(calls)) == (0, ["uv pip install"])
    assert marker.exists()


def test_a_moved_checkout_gets_a_new_environment(with_uv: Checkout) -> None:
    with_uv.run()
    marker = with_uv.root / ".venv" / "old"
    marker.touch()
    with_uv.root = with_uv.root.rename(with_uv.root.with_name("moved"))
    code, calls, _ = with_uv.run()
    assert (code, len(actions(calls))) == (0, 2)
    assert not (with_uv.root / ".venv" / "old").exists()


def test_a_failed_installation_is_repeated(with_uv: Checkout) -> None:
    code, _, error = with_uv.run(BREAK="1")
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    code, calls, _ = with_uv.run()
    assert (code, actions(calls)) == (0, ["uv pip install"])


def test_an_interpreter_that_vanished_is_replaced(with_uv: Checkout) -> None:
    with_uv.run()
    (with_uv.root / ".venv" / "bin" / "python").unlink()
    code, calls, _ = with_uv.run()
    assert (code, len(actions(calls))) == (0, 2)


def test_without_uv_the_interpreter_makes_the_environment(without_uv: Checkout) -> None:
    (without_uv.bin / "ensurepip").touch()
    code, calls, error = without_uv.run()
    assert (code, error) == (0, "")
    made = [call.split(" --")[0] for call in calls]
    assert made == ["python -m venv .venv", "python -m pip install", "uv pip install"]
    assert without_uv.run() == (0, [], "")


def test_root_gets_the_missing_debian_package(without_uv: Checkout) -> None:
    without_uv.program("id", "#!/bin/bash\necho 0\n")
    code, calls, error = without_uv.run()
    assert (code, error) == (0, "")
    assert calls[:2] == ["apt-get update -qq", "apt-get install -y -qq python3.12-venv"]


def test_anybody_else_is_told_about_it(without_uv: Checkout) -> None:
    without_uv.program("id", "#!/bin/bash\necho 1000\n")
    code, calls, error = without_uv.run()
    assert (code, calls) == (2, [])
    assert error.splitlines()[-1].endswith("run: sudo apt-get install python3.12-venv")
    assert error.count("\n") == 1


def test_an_old_interpreter_is_refused(with_uv: Checkout) -> None:
    with_uv.program("old", "#!/bin/bash\nexit 1\n")
    code, calls, error = with_uv.run(PYTHON=str(with_uv.bin / "old"))
    assert (code, actions(calls)) == (2, [])
    assert error.startswith("error: ")
    assert "PYTHON=" in error
