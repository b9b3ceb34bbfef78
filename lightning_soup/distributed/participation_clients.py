"""The names of clients, and numbers that stand for how many there are: checked in one place."""

import operator
from collections.abc import Iterable
from typing import Any

from lightning_soup.errors import UnsupportedSetup

Client = int | str


def client_name(value: Any) -> Client:
    """The name of a client as a plain value: a string or an integer, of numpy too.

    Raises:
        UnsupportedSetup: It is neither.
    """
    if isinstance(value, str):
        return value
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise UnsupportedSetup(f"client {value!r}: expected a name, which is a string or an integer.")


def client_names(values: Iterable[Any], what: str) -> list[Client]:
    """Several names, each once.

    Raises:
        UnsupportedSetup: One is no name, or there twice.
    """
    if isinstance(values, (str, int)):
        raise UnsupportedSetup(f"{what}: expected a collection of clients, got {values!r}. Give a list.")
    names = [client_name(value) for value in values]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UnsupportedSetup(f"{what}: client {twice!r} is there more than once. Name each client once.")
    return names


def whole_number(value: Any, what: str, least: int) -> int:
    """An integer that is not too small.

    Raises:
        UnsupportedSetup: It is none, or too small.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise UnsupportedSetup(f"{what}={value!r}: expected an integer, {least} or more.")
    return number
