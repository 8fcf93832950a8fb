"""Options: dataclass fields that know what they mean and which values are legal.

A part's options stand once, as the fields of a dataclass in the part's own file. The configuration's keys, their
defaults, the checks of their values and the page docs/config.md all come from there.

    @dataclass(frozen=True)
    class FocalLoss:
        alpha: float = option(0.25, "weight of the positives", between(0, 1))

A field may be a number, a text, a tuple, or another such dataclass (:func:`part`), whose fields then become keys of the
same node; or one of several dataclasses, chosen by name (:func:`choice`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """Which values are legal: the ``text`` that says so, and the test."""

    text: str
    fits: Callable[[Any], bool]


def at_least(low: float) -> Check:
    """Numbers from ``low`` on."""
    return Check(f"at least {low}", lambda value: value >= low)


def above(low: float) -> Check:
    """Numbers above ``low``."""
    return Check(f"above {low}", lambda value: value > low)


def between(low: float, high: float) -> Check:
    """Numbers from ``low`` to ``high``, both included."""
    return Check(f"{low} to {high}", lambda value: low <= value <= high)


def inside(low: float, high: float) -> Check:
    """Numbers between ``low`` and ``high``, both excluded."""
    return Check(f"between {low} and {high}", lambda value: low < value < high)


def one_of(*values: Any) -> Check:
    """Some values."""
    return Check(f"one of {', '.join(map(repr, values))}", lambda value: value in values)


def odd() -> Check:
    """Odd numbers."""
    return Check("an odd number, at least 1", lambda value: value >= 1 and value % 2 == 1)


def at_least_one(of: str) -> Check:
    """Sequences that are not empty."""
    return Check(f"at least one {of}", lambda value: len(value) >= 1)


def option(default: Any, doc: str, check: Check | None = None) -> Any:
    """A field of an options dataclass.

    Args:
        default: its value where none is given; its type is the option's, None is any type.
        doc: what it means, in what unit, for docs/config.md.
        check: which values are legal.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, "check": check})


def inherited(options: type, name: str, default: Any) -> Any:
    """The field ``name`` of the dataclass ``options``, for one that inherits from it with another default."""
    (field,) = (field for field in dataclasses.fields(options) if field.name == name)
    return dataclasses.field(default=default, metadata=field.metadata)


def part(default: Any, prefix: str = "") -> Any:
    """A field that holds another options dataclass; its options become keys of the same node, after ``prefix``."""
    return dataclasses.field(default=default, metadata={"prefix": prefix})


def choice(default: str, doc: str, registry: Mapping[str, type]) -> Any:
    """A field that holds one of the options dataclasses in ``registry``, chosen by its name there.

    The options of all of them become keys of the same node, each after its name and the field's last word:
    ``FOCAL_LOSS_ALPHA`` for the option ``alpha`` of "focal" in a field ``class_loss``.
    """
    return dataclasses.field(default_factory=lambda: registry[default](), metadata={"doc": doc, "registry": registry})


@dataclass(frozen=True)
class Leaf:
    """One key that an options dataclass adds to its node."""

    key: str
    default: Any
    doc: str
    check: Check | None


def leaves(options: type | Any, prefix: str = "") -> Iterator[Leaf]:
    """The keys of an options dataclass, or of an instance of one, whose values are then the defaults."""
    instance = options() if isinstance(options, type) else options
    for field in dataclasses.fields(instance):
        metadata, value = field.metadata, getattr(instance, field.name)
        if "registry" in metadata:
            registry = metadata["registry"]
            (chosen,) = (name for name, member in registry.items() if type(value) is member)
            yield Leaf(prefix + field.name.upper(), chosen, metadata["doc"], one_of(*registry))
            for name, member in registry.items():
                yield from leaves(value if name == chosen else member, prefix + _member_prefix(name, field.name))
        elif "prefix" in metadata:
            yield from leaves(value, prefix + metadata["prefix"])
        else:
            yield Leaf(prefix + field.name.upper(), value, metadata["doc"], metadata["check"])


def read(options: type | Any, value_of: Callable[[str], Any], prefix: str = "") -> Any:
    """An options dataclass from the values of its keys.

    Args:
        options: the class, or an instance of it.
        value_of: the value of a key (:attr:`Leaf.key`). Lists become tuples.
        prefix: of the keys.
    """
    instance = options() if isinstance(options, type) else options
    values = {}
    for field in dataclasses.fields(instance):
        metadata = field.metadata
        if "registry" in metadata:
            name = value_of(prefix + field.name.upper())
            values[field.name] = read(metadata["registry"][name], value_of, prefix + _member_prefix(name, field.name))
        elif "prefix" in metadata:
            values[field.name] = read(getattr(instance, field.name), value_of, prefix + metadata["prefix"])
        else:
            values[field.name] = _as_tuples(value_of(prefix + field.name.upper()))
    return type(instance)(**values)


def _member_prefix(name: str, field: str) -> str:
    return f"{name}_{field.split('_')[-1]}_".upper()


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value
