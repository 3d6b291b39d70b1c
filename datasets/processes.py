"""Processes and threads that leave the cores to others: workers end when the run does, idle threads sleep."""

from __future__ import annotations

import multiprocessing
import os
import threading


def leave_with_the_run(*_: object) -> None:
    """Make this worker end as soon as the process that started it has ended, also if that was killed.

    A worker forked by multiprocessing's fork server would not notice: its parent is the server, and the server lives
    as long as its workers do.
    """

    def watch() -> None:
        multiprocessing.parent_process().join()  # the process that asked for this one, not the server
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def wait_without_spinning() -> None:
    """Let OpenMP's threads sleep while they wait for each other, unless the user's environment says otherwise.

    By default they spin, on cores that the decoding workers need. To be called before torch is imported, for OpenMP
    reads its environment when it is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
