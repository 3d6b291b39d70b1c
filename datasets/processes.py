"""Processes and threads that leave the cores to others: workers serve the run and end with it, idle threads sleep."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess

GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, a launcher's or a scheduler's: often sent to all processes

PR_SET_PDEATHSIG = 1


def leave_with_the_run(*_: object) -> None:
    """Make this worker end as soon as the process that started it has ended, also if that was killed.

    A worker forked by multiprocessing's fork server would not notice: its parent is the server, and the server lives
    as long as its workers do.
    """

    def watch() -> None:
        multiprocessing.parent_process().join()  # the process that asked for this one, not the server
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class DataWorker(ForkServerProcess):
    """A process that ends with the run, or when the run terminates it, and for no other SIGINT or SIGTERM.

    What those mean that are sent to the whole process group is for the run to say: it may need more batches to come to
    a step's end and its checkpoint.
    """

    def run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)  # as the server does already, unless others started it
        leave_with_the_run()
        threading.Thread(target=_wait_for_termination, daemon=True).start()
        super().run()


class DataWorkers(ForkServerContext):
    """The multiprocessing context of DataWorker."""

    Process = DataWorker


def _wait_for_termination() -> None:
    # When the run exits it terminates the workers that are left and then waits for them, without a time limit.
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(1)


def serve_workers(preload: Sequence[str]) -> None:
    """Start multiprocessing's fork server, if it is not running, such that signals to the group do not end it.

    Its end looks like that of all its workers. Python itself shields it from SIGINT only, and not while it starts.

    Args:
        preload: the modules that it imports, once for all workers.
    """
    forkserver.set_forkserver_preload([f"{__package__}._server", *preload])
    resource_tracker.ensure_running()  # started later, by the server's start, it would undo the blocking
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)  # inherited by a new process
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_the_parent(number: signal.Signals) -> None:
    """Have the system send this process the signal when the one that started it ends, however that comes about."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def wait_without_spinning() -> None:
    """Let OpenMP's threads sleep while they wait for each other, unless the user's environment says otherwise.

    By default they spin, on cores that the decoding workers need. To be called before torch is imported, for OpenMP
    reads its environment when it is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
