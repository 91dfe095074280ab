"""Reading ahead: the order, errors at their place, and a thread that ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from timm_castream.datasets.read_ahead import read_ahead


@pytest.fixture
def threads() -> Callable[[], list[str]]:
    """The threads of this test that are still there; a test that failed may have left others."""
    before = set(threading.enumerate())
    return lambda: [thread.name for thread in set(threading.enumerate()) - before if thread.name == 'read_ahead']


def test_items_keep_their_order_and_the_next_one_is_read_before_it_is_asked_for(
    threads: Callable[[], list[str]],
) -> None:
    second = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        second.set()
        yield from (1, 2, 3)

    found = []
    for item in read_ahead(items(), count=1):
        assert second.wait(100), 'the reader waits for the consumer of the first item'
        found.append(item)
    assert found == [0, 1, 2, 3] and not threads()


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_an_error_comes_after_the_items_before_it(error: type[BaseException], threads: Callable[[], list[str]]) -> None:
    def items() -> Iterator[int]:
        yield 0
        yield 1
        raise error('here')

    found = []
    with pytest.raises(error, match='here'):
        for item in read_ahead(items()):
            found.append(item)
    assert found == [0, 1] and not threads()


def test_a_consumer_that_stops_ends_the_thread(threads: Callable[[], list[str]]) -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    iterator = read_ahead(items(), count=2)
    assert next(iterator) == 0
    iterator.close()
    assert not threads() and len(taken) < 10


def test_nothing_is_read_of_an_empty_iterable(threads: Callable[[], list[str]]) -> None:
    assert list(read_ahead([])) == [] and not threads()
