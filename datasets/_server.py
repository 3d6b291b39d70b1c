"""Imported by the fork server of `serve_workers` alone: its children that are no data workers hear signals again.

The server blocks SIGINT and SIGTERM, and what it forks begins like that. Other libraries fork from it too, and expect
of their processes that SIGTERM ends them.
"""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.util import register_after_fork

from .processes import GROUP_SIGNALS, DataWorker


def _hear_signals(_: object) -> None:
    if not isinstance(multiprocessing.current_process(), DataWorker):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)


register_after_fork(_hear_signals, _hear_signals)
