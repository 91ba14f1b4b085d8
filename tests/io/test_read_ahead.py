import threading

import pytest

from sparc3_pl.io.read_ahead import read_ahead


def test_the_next_item_is_made_while_the_last_is_in_use():
    made = [threading.Event() for _ in range(3)]

    def items():
        for number, event in enumerate(made):
            event.set()
            yield number

    for number in read_ahead(items()):
        if number < 2:  # without a thread of its own the next item would never be made here
            assert made[number + 1].wait(timeout=10)


def test_an_error_reaches_whoever_reads():
    def items():
        yield 1
        raise ValueError("damaged")

    numbers = read_ahead(items())
    assert next(numbers) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(numbers)


def test_stopping_early_leaves_no_thread():
    before = threading.active_count()
    numbers = read_ahead(iter(range(10**9)))
    assert next(numbers) == 0
    numbers.close()
    assert threading.active_count() == before
