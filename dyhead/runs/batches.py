"""How a stream of images becomes batches, and those the parts that a device holds at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

_Item = TypeVar("_Item")


def grouped(items: Iterable[_Item], size: int, kind: Callable[[_Item], Any]) -> Iterator[list[_Item]]:
    """Batches of ``size`` items of one kind each, in the order in which they are complete."""
    waiting: dict[Any, list[_Item]] = {}
    for item in items:
        batch = waiting.setdefault(kind(item), [])
        batch.append(item)
        if len(batch) == size:
            yield list(batch)
            batch.clear()
