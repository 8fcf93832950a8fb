"""What pickles make numpy's arrays and scalars of, without numpy's own functions for it.

Those trust what they are given: an array of objects whose list is too short, or whose memory is a text, ends the
process. Numbers and texts are enough for weights and what stands beside them.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any, ClassVar

import numpy as np

_KINDS = "?bhilqpBHILQPefdgFDGSU"  # all but objects, records, dates


class ElementType:
    """In place of ``numpy.dtype``: a type of numbers or texts, and the order of its bytes."""

    def __init__(self, code: Any, *flags: Any) -> None:
        if not isinstance(code, str) or np.dtype(code).char not in _KINDS:
            raise pickle.UnpicklingError(f"it holds an array of elements of type {code!r}")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] in (">", "<"):
            self.value = self.value.newbyteorder(state[1])


class Array(np.ndarray):
    """In place of ``numpy.ndarray``."""

    def __new__(cls, *arguments: Any) -> Array:
        """An empty one, which is what pickles ask for before they fill it."""
        return super().__new__(cls, (0,), np.int8)

    def __setstate__(self, state: tuple) -> None:
        shape, element, columns_first, data = state[-4:]
        if not isinstance(element, ElementType) or not isinstance(data, bytes | str):
            raise pickle.UnpicklingError("it holds an array that is not made of numbers or texts")
        super().__setstate__((1, shape, element.value, bool(columns_first), data))


def _from_buffer(data: Any, element: ElementType, shape: tuple, order: str) -> np.ndarray:
    return np.frombuffer(data, element.value).reshape(shape, order=order)


def _scalar(element: ElementType, data: bytes | str) -> Any:
    return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, element.value)[0]


def _encode(text: str, encoding: str) -> bytes:
    """Bytes, in pickles of protocols before 3."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it holds bytes as {encoding!r}")
    return text.encode("latin1")


#: By the name in a pickle, of numpy 1 and 2: what is called instead.
SUBSTITUTES = {
    "_codecs.encode": _encode,
    "numpy.ndarray": Array,
    "numpy.dtype": ElementType,
    **{
        f"numpy.{core}.{name}": function
        for core in ("core", "_core")
        for name, function in (
            ("multiarray._reconstruct", Array),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _from_buffer),
        )
    },
}


class Unpickler(pickle._Unpickler):
    """Makes arrays and plain values; everything else is an error, so that nothing in the file is run.

    It is Python's, not C's, which takes any number in a damaged file for a size in memory.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """What ``module.name`` stands for."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if f"{module}.{name}" not in SUBSTITUTES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return SUBSTITUTES[f"{module}.{name}"]

    def load_build(self) -> None:
        """Fill an object that was made, never a function or class that is called by its name."""
        if not isinstance(self.stack[-2], Array | ElementType | OrderedDict):
            raise pickle.UnpicklingError(f"it fills an object of type {type(self.stack[-2]).__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build
