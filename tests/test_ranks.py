"""The helper that runs tests on several processes, tested on itself."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.two_process


def sum_of_ranks(argument: dict) -> tuple:
    dist.init_process_group("gloo")
    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total)
    return dist.get_rank(), total, argument, os.environ.get("GREETING")


def one_fails() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("rank one has had enough")
    dist.barrier()


def one_is_killed() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        os.kill(os.getpid(), 9)
    dist.barrier()


def hangs() -> None:
    print("about to sleep", flush=True)
    time.sleep(600)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def own_process_and_a_hanging_child(folder: str) -> None:
    import subprocess

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(folder, os.environ["RANK"]).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)


def imported() -> set[str]:
    return {"torch", "accelerate", "deepspeed"} & set(sys.modules)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_results_come_in_the_order_of_ranks(ranks, world):
    answers = ranks(world, sum_of_ranks, {"a": [1, 2]}, env={"GREETING": "hello"})
    total = world * (world + 1) / 2
    assert answers == [(rank, torch.tensor([total]), {"a": [1, 2]}, "hello") for rank in range(world)]


def test_one_call_leaves_nothing_to_the_next(ranks):
    ranks(1, sum_of_ranks, {}, env={"GREETING": "hello"})
    assert ranks(1, sum_of_ranks, {})[0][3] == os.environ.get("GREETING")


def test_the_libraries_are_there_already(ranks):
    assert ranks(1, imported) == [{"torch", "accelerate", "deepspeed"}]


def test_the_error_of_a_rank_is_shown(ranks):
    with pytest.raises(RuntimeError, match="ValueError: rank one has had enough") as error:
        ranks(2, one_fails)
    assert "rank 1 of 2" in str(error.value) and "one_fails" in str(error.value)


def test_a_rank_that_dies_is_an_error(ranks):
    with pytest.raises(RuntimeError, match="rank 0 of 2: status 9"):
        ranks(2, one_is_killed)


def test_a_hang_ends_and_shows_where(ranks):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="in hangs") as error:
        ranks(2, hangs, timeout=1)
    assert "about to sleep" in str(error.value)
    assert time.monotonic() - start < 20


def test_killed_ranks_take_their_children_with_them(ranks, tmp_path):
    with pytest.raises(RuntimeError):
        ranks(2, own_process_and_a_hanging_child, str(tmp_path), timeout=2)
    processes = [int(number) for file in tmp_path.iterdir() for number in file.read_text().split()]
    deadline = time.monotonic() + 10
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(processes) == 4 and not any(map(is_alive, processes))
