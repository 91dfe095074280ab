"""Reads the next batch while the network works on this one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar('T')
_END = object()


def read_ahead(items: Iterable[T], count: int = 2) -> Iterator[T]:
    """The items of an iterable, in order. A thread takes up to `count` of them before they are asked for.

    An error of the iterable, Ctrl-C too, is raised here at its place. The thread ends with the iterator.
    """
    ready: queue.Queue = queue.Queue(count)
    closed = threading.Event()

    def give(item: object) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def read() -> None:
        try:
            for item in items:
                if not give((item, None)):
                    return
            give(_END)
        except BaseException as error:  # the consumer raises it
            give((None, error))

    thread = threading.Thread(target=read, name='read_ahead', daemon=True)
    thread.start()
    try:
        while (entry := ready.get()) is not _END:
            item, error = entry
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        thread.join()
