"""Real multi-process tests in seconds: one helper process imports the heavy libraries once, then forks the ranks.

`python -P ranks.py` is that helper. It runs no torch operation of its own (threads do not survive a fork), reads
requests from its standard input and answers on its standard output, both pickled. `Ranks` is the side of the tests;
`conftest.py` offers it as the fixture `ranks`.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib.util
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

HEAVY = ("pytest", "torch._dynamo", "accelerate", "deepspeed", "transformers", "trivium.objectives")
# what DeepSpeed imports when an engine is built: most of the time of a short scenario
LATER = ("torch._inductor.compile_fx", "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.ops.op_builder.all_ops")
PR_SET_PDEATHSIG = 1
GRACE_SECONDS = 3.0  # after one rank has failed, for the others to fail too and say why


class RankError(RuntimeError):
    """A rank raised, died or hung; the message holds what each of them said."""


class Ranks:
    """Runs functions on several processes that talk through gloo on this machine's CPU."""

    def __init__(self) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",  # read when deepspeed is imported; accelerate without deepspeed ignores it
            "GLOO_SOCKET_IFNAME": "lo",
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        # -P: with tests/ on the path, tests/datasets would answer to `import datasets`
        command = [sys.executable, "-P", __file__]
        self._helper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def __call__(
        self, world: int, function: Callable, *args: Any, env: dict[str, str] | None = None, timeout: float = 120
    ) -> list[Any]:
        """`function(*args)` on `world` ranks; their results in rank order.

        RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as a launcher sets them;
        `init_process_group` is left to the function or to Accelerate.

        Args:
            function: at the top level of its module, which is loaded anew from its file in each rank.
            args: picklable.
            env: further environment variables.
            timeout: seconds after which all ranks are killed.

        Raises RankError with the traceback of each rank that failed.
        """
        path, name = function.__code__.co_filename, function.__qualname__
        try:
            send(self._helper.stdin, (world, path, name, args, env or {}, timeout))
            answers = receive(self._helper.stdout)
        except (BrokenPipeError, EOFError):
            code = self._helper.wait(timeout=30)
            raise RankError(f"the helper process ended with code {code}; its output says why") from None
        failures = [f"rank {rank} of {world}: {text}" for rank, (done, text) in enumerate(answers) if not done]
        if failures:
            raise RankError(f"{Path(path).name}::{name} failed\n" + "\n".join(failures))
        return [pickle.loads(result) for _, result in answers]

    def close(self) -> None:
        self._helper.stdin.close()
        try:
            self._helper.wait(timeout=10)
        except subprocess.TimeoutExpired:  # still importing, or interrupted in a scenario
            self._helper.kill()
            self._helper.wait()


def send(pipe: BinaryIO, message: Any) -> None:
    data = pickle.dumps(message)
    pipe.write(struct.pack("<Q", len(data)) + data)
    pipe.flush()


def receive(pipe: BinaryIO) -> Any:
    """The next message; EOFError when the other side is gone."""
    header = pipe.read(8)
    if len(header) < 8:
        raise EOFError("the other process is gone")
    return pickle.loads(pipe.read(struct.unpack("<Q", header)[0]))


def serve() -> None:
    """The helper: answer requests until the tests are over."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not enter the answers
    for name in HEAVY:
        importlib.import_module(name)
    for name in LATER:
        with contextlib.suppress(ImportError):  # private to their projects, which may move them
            importlib.import_module(name)
    assert threads() == 1, "an import started threads, which would not survive the fork"
    while True:
        try:
            request = receive(sys.stdin.buffer)
        except EOFError:
            os._exit(0)  # nothing to tidy up, and the libraries take seconds to
        send(answers, run_ranks(*request))


def run_ranks(
    world: int, path: str, name: str, args: tuple, env: dict[str, str], timeout: float
) -> list[tuple[bool, Any]]:
    """Fork the ranks and wait: per rank (True, pickled result) or (False, what went wrong)."""
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        port = free_port()
        processes = {}
        for rank in range(world):
            launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = os.fork()
            if process == 0:
                be_rank(
                    Path(folder, str(rank)), path, name, args, {k: str(v) for k, v in launch.items()} | env, timeout
                )
            processes[process] = rank
        endings = wait_for(processes, time.monotonic() + timeout)
        return [answer_of(Path(folder, str(rank)), endings[rank], timeout) for rank in range(world)]


def wait_for(processes: dict[int, int], deadline: float) -> dict[int, int | None]:
    """Exit status by rank; None for those that had to be killed."""
    endings: dict[int, int | None] = {}
    running, tests = dict(processes), os.getppid()
    while running and time.monotonic() < deadline and os.getppid() == tests:
        for process in list(running):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                endings[running.pop(process)] = status
                if status != 0:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.005)
    for process, rank in running.items():
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        endings[rank] = None
    return endings


def answer_of(place: Path, status: int | None, timeout: float) -> tuple[bool, Any]:
    result, output = place.with_suffix(".result"), place.with_suffix(".out")
    if status == 0 and result.exists():
        return True, result.read_bytes()
    said = output.read_text(errors="replace")[-20_000:] if output.exists() else ""
    what = f"killed: still running after a failure elsewhere or {timeout:g} s" if status is None else f"status {status}"
    return False, f"{what}\n{said}"


def be_rank(place: Path, path: str, name: str, args: tuple, env: dict[str, str], timeout: float) -> None:
    """The life of one rank; does not return."""
    status = 1
    try:
        os.setsid()  # its own group, so that its children die with it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # and it dies with the helper
        output = os.open(place.with_suffix(".out"), os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(env)
        faulthandler.dump_traceback_later(timeout * 0.9)  # a hang shows where
        result = load(path, name)(*args)
        place.with_suffix(".result").write_bytes(pickle.dumps(result))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def load(path: str, name: str) -> Callable:
    """Function `name` of the module at `path`."""
    spec = importlib.util.spec_from_file_location(f"ranks_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    serve()
