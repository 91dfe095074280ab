"""Ctrl-C and SIGTERM as KeyboardInterrupt."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


@contextmanager
def interruptible(*signals: signal.Signals) -> Iterator[list[int]]:
    """Signals inside raise KeyboardInterrupt, so that a command removes its temporary files and a server closes.

    Args:
        signals: `signal.SIGTERM`, `signal.SIGINT` (Ctrl-C), or both.

    Returns:
        A context manager that gives a list of the signals that came: code that catches KeyboardInterrupt may hide them.
    """
    came: list[int] = []

    def interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
        # `timeout` and process managers may send SIGTERM twice. The second one would stop the removal of the files.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        came.append(signal_number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread alone
        yield came
        return
    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
