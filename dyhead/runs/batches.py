"""How a stream of images becomes batches, and those the parts that a device holds at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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


def parts(batch: Sequence[_Item], count: int) -> list[Sequence[_Item]]:
    """A batch in ``count`` parts of the same size, into which it can be divided: ``SOLVER.ACCUMULATE``."""
    size = len(batch) // count
    return [batch[i * size : (i + 1) * size] for i in range(count)]
