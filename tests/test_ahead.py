"""The next value is made while one is used, and nothing else differs from calling the function."""

import threading

import pytest

from vpae.ahead import Ahead


def test_values_are_those_of_the_function_in_any_order() -> None:
    values = Ahead(lambda number: number**2)
    assert [values(number) for number in (0, 1, 2, 2, 7, 8, 3)] == [0, 1, 4, 4, 49, 64, 9]


def test_the_next_value_is_made_while_the_last_one_is_used() -> None:
    begun = [threading.Event() for _ in range(3)]

    def make(number: int) -> int:
        begun[number].set()
        return number

    values = Ahead(make, end=3)
    for number in range(2):
        assert values(number) == number and begun[number + 1].wait(10)
    assert values(2) == 2, "beyond the end nothing is made"


def test_an_error_is_raised_where_its_value_is_asked_for() -> None:
    values = Ahead(lambda number: 1 // (3 - number))
    assert [values(1), values(2)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        values(3)
    assert values(4) == -1
