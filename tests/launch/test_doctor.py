"""`trivium doctor grad`: it finds equal gradients equal and wrong ones wrong, and says what stopped it."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trivium.datasets.registry import InputError
from trivium.launch import doctor, gradients
from trivium.launch.cli import main

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "pretrain" / "conftest.py")
_tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tiny)
digits, recipe = _tiny.digits, _tiny.recipe

PARTS = ["loss", *(f"{kind} {name}" for kind in ("tower", "head") for name in ("text", "video", "audio")), "objective"]
SPLICE = '''
import torch
from torch.nn import functional as F
from trivium.objectives import Loss, Objective


class Splice(Objective):
    """The right loss with half a gradient: of the gathered vectors, those of other ranks are held constant."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, z) -> Loss:
        a, b = z.names[:2]
        columns = z.columns(b).detach().index_copy(0, z.rows, z.z[b])
        costs = F.cross_entropy(z.z[a] @ columns.T / 0.1, z.rows, reduction="none")
        total = z.mean(costs, torch.ones_like(costs, dtype=torch.bool))
        return Loss(total, {"splice": total}, {"splice": total.detach()})
'''


def grad(recipe: Path, *words: str, site: Path | None = None) -> subprocess.CompletedProcess:
    """`trivium doctor grad RECIPE WORDS...` as a user starts it, on the CPU."""
    start = "import sys; from trivium.launch.cli import main; sys.argv[0] = 'trivium'; main()"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": ""}
    environment |= {"PYTHONPATH": str(site)} if site else {}
    command = [sys.executable, "-c", start, "doctor", "grad", str(recipe), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def table(text: str) -> dict[tuple[str, str, str], float]:
    """The differences by (engine, form, part)."""
    _, _, rest = text.partition("\nengine ")
    rows = [line.split("  ") for line in rest.split("\n\n")[0].splitlines()[1:]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {(engine, form, part): float(difference) for engine, form, part, _, difference, *_ in cells}


@pytest.mark.two_process
def test_equal_gradients(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: another run\n")
    # small as the towers are, ZeRO-3 is to gather them
    done = grad(recipe, "train.precision=bf16", "distributed.persist_below=64", "--zero", "0,3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks on the CPU" in done.stdout and "(the recipe: bf16)" in done.stdout
    found = table(done.stdout)
    engines = {(engine, form, part) for engine in ("DDP", "ZeRO-3") for form in ("plain", "cached") for part in PARTS}
    assert set(found) == engines | {("single", "plain", part) for part in PARTS}
    assert all(difference < 1e-5 for difference in found.values())
    assert any(found["ZeRO-3", form, "tower text"] > 0 for form in ("plain", "cached")), "nothing was computed anew"
    last = done.stdout.splitlines()[-1]
    assert last.startswith("ok: all 32 rows agree; worst ") and "(limit 1.0e-05)" in last
    assert max(len(line) for line in done.stdout.splitlines()) <= 110
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


@pytest.mark.two_process
def test_half_a_gradient_is_found_and_named(recipe: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "stub-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "stub_splice.py").write_text(SPLICE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stub\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trivium.objectives]\nsplice = stub_splice:Splice\n")
    done = grad(recipe, "objective=splice", "--zero", "0", site=site)
    assert done.returncode == 1, done.stdout + done.stderr
    found = table(done.stdout.replace("  differs", ""))
    wrong = {row for row, difference in found.items() if difference > 0.1}
    # the loss is right, and so are the rows, which are not gathered: those of the recipe's first modality
    assert {part for *_, part in wrong} in ({"tower text", "head text"}, {"tower video", "head video"})
    assert len(wrong) == 4 and {engine for engine, *_ in wrong} == {"DDP"}
    last = done.stdout.splitlines()[-1]
    assert last.startswith("error: 4 of 14 rows differ; worst DDP, ") and ", tower " in last
    assert done.stdout.count("  differs") == 4


def test_a_mistake_is_one_line(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for words, reason in (
        (["--batch-size", "7", "--ranks", "2"], "--batch-size 7 does not divide over 2 ranks; use 6 or 8"),
        (["--ranks", "32"], "train.batch_size=16 has no clip for each of 32 ranks"),
        (
            ["--batch-size", "100", "--ranks", "2"],
            "--batch-size 100 is larger than the dataset (64 clips); use at most",
        ),
        (["--zero", "0,4"], "'4' is no ZeRO stage"),
        (["--chunk", "6", "--ranks", "2"], "--chunk 6 is not less than the 6 clips of a rank; use 1 to 5"),
        (["objective=unialing"], "did you mean 'unialign'"),
        (["data.train=nowhere/*.tar"], "nowhere/*.tar"),
    ):
        monkeypatch.setattr(sys, "argv", ["trivium", "doctor", "grad", str(recipe), *words])
        with pytest.raises(SystemExit) as ending:
            main()
        captured = capsys.readouterr()
        assert (ending.value.code, captured.out) == (2, ""), words
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and reason in captured.err


@pytest.mark.parametrize(
    ("wanted", "ranks", "of_recipe", "clips"),
    [(None, 2, 256, 12), (None, 5, 256, 15), (None, 8, 256, 16), (None, 2, 7, 6), (None, 5, 14, 10), (40, 4, 16, 40)],
)
def test_the_joined_batch(wanted: int | None, ranks: int, of_recipe: int, clips: int) -> None:
    assert doctor.joined_clips(wanted, ranks, of_recipe) == clips


def test_the_clips_of_a_pass() -> None:
    assert [doctor.cached_clips(None, rows) for rows in (1, 2, 5, 6)] == [None, 1, 3, 3]
    assert doctor.cached_clips(2, 6) == 2
    with pytest.raises(InputError, match="use a larger --batch-size"):
        doctor.cached_clips(1, 1)


def test_dropout_is_off_and_batch_norm_is_seen() -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4), torch.nn.LayerNorm(4))
    gradients.turn_dropout_off(module)
    assert [part.training for part in module] == [False, True, False]


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from trivium.launch.cli import main\nsys.argv = ['trivium', 'doctor', 'grad', '--help']\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False"
    assert "\n      trivium doctor grad " in done.stdout


def expected_gradients() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ["model.towers.text.a", "model.towers.text.b", "model.towers.video.a", "model.heads.text.weight"]
    found = {name: torch.randn(3, 4, generator=generator) for name in names}
    return found | {"objective.temperature.log_scale": torch.tensor([1000.0])}


def altered(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, gradients.Agreement]:
    expected = expected_gradients()
    found = expected | {name: change(expected[name])}
    return {one.part: one for one in gradients.compare(expected, found)}


def test_equal_gradients_agree() -> None:
    found = altered("model.towers.text.a", torch.clone)
    assert list(found) == ["tower text", "tower video", "head text", "objective"]
    assert [one.values for one in found.values()] == [24, 12, 12, 1]
    assert all(one.difference == 0 for one in found.values())
    assert all((one.cosine, one.norm_ratio) == pytest.approx((1, 1)) for one in found.values())


def test_an_altered_gradient_is_found_in_its_part_alone() -> None:
    largest = max(float(x.abs().max()) for name, x in expected_gradients().items() if name.startswith("model"))
    video = float(expected_gradients()["model.towers.video.a"].abs().max())
    found = altered("model.towers.video.a", lambda x: x / 2)
    # of the towers' largest gradient: the temperature's, much larger, makes no room for it
    assert found["tower video"].difference == pytest.approx(video / 2 / largest)
    assert (found["tower video"].cosine, found["tower video"].norm_ratio) == pytest.approx((1, 0.5))
    assert [part for part, one in found.items() if one.difference] == ["tower video"]
    found = altered("model.towers.video.a", torch.neg)
    assert (found["tower video"].cosine, found["tower video"].norm_ratio) == pytest.approx((-1, 1))
    found = altered("model.heads.text.weight", torch.zeros_like)["head text"]
    assert found.difference > 0.1 and found.cosine is None and found.norm_ratio == 0
    found = altered("objective.temperature.log_scale", lambda x: x + 1)
    assert found["objective"].difference == pytest.approx(1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_differs(bad: float, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(x: torch.Tensor) -> torch.Tensor:
        return x.flatten().index_fill(0, torch.tensor([2]), bad).view_as(x)

    report = doctor.Report(["text", "video"], 1e-5)
    report.add([doctor.Row(None, None, gradients.compare_losses(1.0, 1.0))])
    report.add([doctor.Row(3, 4, one) for one in altered("model.towers.text.a", spoil).values()])
    assert report.conclude() == 1
    assert "error: 1 of 4 rows differ; worst ZeRO-3, cached, tower text: " in capsys.readouterr().out


def test_the_truth_is_float32_where_there_is_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_process(config, batch, dtype: torch.dtype) -> tuple[float, dict]:
        if dtype in unknown:
            raise RuntimeError("expected scalar type Float but found Double")
        return 1.0, {"dtype": dtype}

    monkeypatch.setattr(gradients, "one_process", one_process)
    unknown: set[torch.dtype] = set()
    assert [one["dtype"] for _, one in gradients.references(None, None)] == [torch.float64, torch.float32]
    unknown = {torch.float64}
    assert [one["dtype"] for _, one in gradients.references(None, None)] == [torch.float32, torch.float32]


@pytest.mark.parametrize(
    ("rounding", "difference", "code"), [(0, 2e-5, 1), (1e-3, 2e-3, 0), (1e-3, 5e-3, 1), (1, 0.2, 1)]
)
def test_what_one_process_rounds_is_no_difference(rounding: float, difference: float, code: int, capsys) -> None:
    report = doctor.Report(["text"], 1e-5)
    report.add([doctor.Row(None, None, gradients.Agreement("tower text", 1, rounding))])
    report.add([doctor.Row(0, None, gradients.Agreement("tower text", 1, difference))])
    assert report.conclude() == code
    said = capsys.readouterr().out
    assert ("in float32 is off by" in said, "does not compute in float64" in said) == (rounding > 0, rounding == 0)


ENDINGS = {
    "raises": "if rank == 1:\n        raise RuntimeError('two\\nlines')\n    time.sleep(60)",
    "mistake": "if rank == 0:\n        raise InputError('x=1 is wrong; use 2')\n    time.sleep(60)",
    "killed": "if rank == 1:\n        print('so far')\n        sys.stdout.flush()\n        os.kill(os.getpid(), 9)\n"
    "    raise RuntimeError('the other is gone')",
    "exits": "sys.exit(5)",
    "hangs": "time.sleep(60)",
    "finds": "(folder / 'results.jsonl').write_text('{\"zero\": 1, \"chunk\": null, \"agreements\": "
    "[{\"part\": \"loss\", \"values\": 1, \"difference\": 0.5}]}\\n') if rank == 0 else None",
}  # fmt: skip


@pytest.fixture
def ending_as(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], list]:
    """Starts two ranks that end in one of ENDINGS; what they found."""

    def run(ending: str, seconds: float = 30.0) -> list:
        script = (
            "import os, sys, time\nfrom trivium.launch import gradients\n"
            "from trivium.launch.gradients import InputError\n"
            f"def be_rank(folder):\n    rank = int(os.environ['RANK'])\n    {ENDINGS[ending]}\n"
            "gradients.be_rank = be_rank\ngradients.main()\n"
        )
        monkeypatch.setattr(doctor, "rank_command", lambda folder: [sys.executable, "-c", script, str(folder)])
        monkeypatch.setattr(doctor, "GRACE_SECONDS", 0.5)
        return list(doctor.run_ranks(tmp_path, 2, False, seconds))

    return run


def test_what_a_rank_found_is_handed_on(ending_as: Callable[..., list]) -> None:
    assert ending_as("finds") == [[doctor.Row(1, None, gradients.Agreement("loss", 1, 0.5))]]


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("raises", "rank 1 failed: RuntimeError: two lines"),
        ("killed", r"rank 1 was ended by SIGKILL \(out of memory\?\); its last line: so far"),
        ("exits", "rank . failed: SystemExit: 5"),
    ],
)
def test_a_rank_that_fails_is_heard(ending: str, words: str, ending_as: Callable[..., list], capsys) -> None:
    with pytest.raises(doctor.RanksFailed, match=words):
        ending_as(ending)
    assert "the output of rank" in capsys.readouterr().err


def test_a_mistake_that_a_rank_finds_is_the_users(ending_as: Callable[..., list]) -> None:
    with pytest.raises(InputError, match="x=1 is wrong; use 2"):
        ending_as("mistake")


def test_ranks_that_hang_are_ended(ending_as: Callable[..., list], tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(doctor.RanksFailed, match=r"not ended after 0\.025 minutes; raise --timeout-minutes"):
        ending_as("hangs", seconds=1.5)
    assert time.monotonic() - started < 20


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system to end the ranks")
def test_a_rank_ends_with_the_command(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time\n"
        "rank = subprocess.Popen([sys.executable, '-c', 'import signal, time; from trivium.datasets import processes; "
        "processes.end_with_the_parent(signal.SIGKILL); print(1, flush=True); time.sleep(60)'])\n"
        "time.sleep(60)"
    )
    command = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert command.stdout.readline() == "1\n"
    command.send_signal(signal.SIGKILL)
    started = time.monotonic()
    assert command.stdout.read() == ""  # which ends when all that could write are gone
    assert time.monotonic() - started < 30
    command.wait()
