"""The loops that are timed. Each gives back the last thing that it got, to be checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def get_each(container: Any, keys: Iterable[str]) -> Any:
    """``container[key]``."""
    value = None
    for key in keys:
        value = container[key]
    return value


def contains_each(container: Any, keys: Iterable[str]) -> bool:
    """``key in container``."""
    found = False
    for key in keys:
        found = key in container
    return found


def set_each(container: Any, keys: Iterable[str], values: Iterable[Any]) -> Any:
    """``container[key] = value``."""
    for key, value in zip(keys, values, strict=True):
        container[key] = value
    return container


def pop_each(container: Any, keys: Iterable[str]) -> Any:
    """``container.pop(key)``."""
    for key in keys:
        container.pop(key)
    return container


def popitem_last(container: Any, count: int) -> Any:
    """``container.popitem()``."""
    for _ in range(count):
        container.popitem()
    return container


def popitem_first(container: Any, count: int) -> Any:
    """``container.popitem(last=False)``."""
    for _ in range(count):
        container.popitem(last=False)
    return container


def drain_by_popitem(container: Any) -> Any:
    """Pop from the front, as ``collections.OrderedDict`` and pdrs can, until nothing is left."""
    while container:
        container.popitem(last=False)
    return container


def drain_by_pop(container: Any) -> Any:
    """Pop from the front, as any mapping can, until nothing is left."""
    while container:
        container.pop(next(iter(container)))
    return container


def move_each(container: Any, keys: Iterable[str], last: bool) -> Any:
    """``container.move_to_end(key, last=last)``."""
    for key in keys:
        container.move_to_end(key, last=last)
    return container


def sweep(iterate: Callable[[], Iterable[Any]]) -> Any:
    """``for each in iterate()``."""
    last = None
    for each in iterate():
        last = each
    return last


def call_each(function: Callable[[int], Any], argument: int, count: int) -> Any:
    """``function(argument)``, and nothing with what it gives."""
    given = None
    for _ in range(count):
        given = function(argument)
    return given
