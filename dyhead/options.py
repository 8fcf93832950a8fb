"""Options: dataclass fields that know what they mean and which values are legal.

A part's options stand once, as the fields of a dataclass in the part's own file. The configuration's keys, their
defaults, the checks of their values and the page docs/config.md all come from there.

    @dataclass(frozen=True)
    class FocalLoss:
        alpha: float = option(0.25, "weight of the positives", between(0, 1))

A field's annotation is its type, and is checked, too: bool, int, float, str, tuples of one of these, or ``| None``. A
field may also be another such dataclass (:func:`part`), whose fields then become keys of the same node; or one of
several dataclasses, chosen by name (:func:`choice`).
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Check:
    """Which values are legal: the words that say so, the test, and whether they are strings or lists of strings."""

    words: str | Callable[[], str]
    fits: Callable[[Any], bool]
    strings: bool = False

    @property
    def text(self) -> str:
        """The words that say which values are legal, now: what is registered may become more."""
        return self.words if isinstance(self.words, str) else self.words()

    def __and__(self, other: Check) -> Check:
        """Values that both find legal; ``other`` is asked only about those that are legal here."""
        return Check(
            lambda: f"{self.text}, {other.text}", lambda value: self.fits(value) and other.fits(value), self.strings
        )


def of_type(annotation: Any) -> Check:
    """Values of a type: bool, int (of 64 bits), float (finite), str, None, tuples of it or a union of it.

    A whole number is a number, too; True and False are not. Lists are legal where the type is a tuple.

    Raises:
        TypeError: another type.
    """
    singular, _, fits = _type(annotation)
    return Check(singular, fits, _holds_strings(annotation))


def each(check: Check) -> Check:
    """Sequences of which every member is legal."""
    return Check(lambda: f"each {check.text}", lambda values: all(map(check.fits, values)))


def at_least(low: float) -> Check:
    """Numbers from ``low`` on."""
    return Check(f"at least {low}", lambda value: value >= low)


def above(low: float) -> Check:
    """Numbers above ``low``."""
    return Check(f"above {low}", lambda value: value > low)


def at_most(high: float) -> Check:
    """Numbers up to ``high``."""
    return Check(f"at most {high}", lambda value: value <= high)


def below(high: float) -> Check:
    """Numbers below ``high``."""
    return Check(f"below {high}", lambda value: value < high)


def between(low: float, high: float) -> Check:
    """Numbers from ``low`` to ``high``, both included."""
    return Check(f"{low} to {high}", lambda value: low <= value <= high)


def inside(low: float, high: float) -> Check:
    """Numbers between ``low`` and ``high``, both excluded."""
    return Check(f"above {low}, below {high}", lambda value: low < value < high)


def one_of(*values: Any) -> Check:
    """Some values."""
    return Check(f"one of {', '.join(map(repr, values))}", lambda value: value in values)


def name_in(registry: Mapping[str, Any]) -> Check:
    """The names in a registry, also those that are registered later."""
    return Check(lambda: one_of(*registry).text, lambda value: value in registry)


def or_null(check: Check) -> Check:
    """None, and what is legal otherwise."""
    return Check(lambda: f"{check.text}, or null", lambda value: value is None or check.fits(value))


def odd() -> Check:
    """Odd numbers."""
    return Check("odd, at least 1", lambda value: value >= 1 and value % 2 == 1)


def increasing() -> Check:
    """Sequences of which every number is larger than the one before."""
    return Check("increasing", lambda values: all(low < high for low, high in pairwise(values)))


def at_least_one(of: str) -> Check:
    """Sequences that are not empty."""
    return Check(f"at least one {of}", lambda value: len(value) >= 1)


def option(default: Any, doc: str, check: Check | None = None) -> Any:
    """A field of an options dataclass.

    Args:
        default: its value where none is given.
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
    """One key that an options dataclass adds to its node.

    Attributes:
        key: its name in the node.
        default: its value where none is given.
        doc: what it means.
        type: which values have the right type.
        check: which of these are legal; None: all.
    """

    key: str
    default: Any
    doc: str
    type: Check
    check: Check | None

    def expected(self, value: Any) -> str | None:
        """What was expected instead of ``value``; None if it is legal."""
        if value is None and self.type.fits(value):
            return None  # the check is for what is not null
        if not self.type.fits(value):
            return self.type.text if self.check is None else f"{self.type.text}, {self.check.text}"
        return None if self.check is None or self.check.fits(value) else self.check.text


def leaves(options: type | Any, prefix: str = "") -> Iterator[Leaf]:
    """The keys of an options dataclass, or of an instance of one, whose values are then the defaults."""
    instance = options() if isinstance(options, type) else options
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        metadata, value = field.metadata, getattr(instance, field.name)
        if "registry" in metadata:
            registry = metadata["registry"]
            (chosen,) = (name for name, member in registry.items() if type(value) is member)
            yield Leaf(prefix + field.name.upper(), chosen, metadata["doc"], of_type(str), one_of(*registry))
            for name, member in registry.items():
                yield from leaves(value if name == chosen else member, prefix + _member_prefix(name, field.name))
        elif "prefix" in metadata:
            yield from leaves(value, prefix + metadata["prefix"])
        else:
            type_ = of_type(hints[field.name])
            yield Leaf(prefix + field.name.upper(), value, metadata["doc"], type_, metadata["check"])


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


def parts(options: type | Any, name: str = "", prefix: str = "") -> Iterator[tuple[Any, str, str]]:
    """An options dataclass and those that its fields hold, all that may be chosen included.

    Each comes as an instance, with the name that it is chosen by, "" where it is not, and the prefix of its keys.
    """
    instance = options() if isinstance(options, type) else options
    yield instance, name, prefix
    for field in dataclasses.fields(instance):
        if "registry" in field.metadata:
            for member_name, member in field.metadata["registry"].items():
                yield from parts(member, member_name, prefix + _member_prefix(member_name, field.name))
        elif "prefix" in field.metadata:
            yield from parts(getattr(instance, field.name), "", prefix + field.metadata["prefix"])


def _member_prefix(name: str, field: str) -> str:
    return f"{name}_{field.split('_')[-1]}_".upper()


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _holds_strings(annotation: Any) -> bool:
    members = [member for member in typing.get_args(annotation) if member is not ...]
    return annotation is str or (bool(members) and all(map(_holds_strings, members)))


# What a type is called, what many of it are called, and which values have it.
_TYPES: dict[Any, tuple[str, str, Callable[[Any], bool]]] = {
    bool: ("True or False", "True or False", lambda value: isinstance(value, bool)),
    int: ("a whole number", "whole numbers", _is_whole),
    float: (
        "a number",
        "numbers",
        lambda value: _is_whole(value) or (isinstance(value, float) and math.isfinite(value)),
    ),
    str: ("a string", "strings", lambda value: isinstance(value, str)),
    type(None): ("null", "nulls", lambda value: value is None),
}


def _type(annotation: Any) -> tuple[str, str, Callable[[Any], bool]]:
    if annotation in _TYPES:
        return _TYPES[annotation]
    members = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple and members:
        _, plural, member_fits = _type(members[0])
        count = None if members[1:] == (...,) else len(members)
        of = plural if count is None else f"{count} {plural}"
        return (
            f"a list of {of}",
            f"lists of {of}",
            lambda value: (
                isinstance(value, (list, tuple)) and count in (None, len(value)) and all(map(member_fits, value))
            ),
        )
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        singulars, plurals, fits = zip(*map(_type, members), strict=True)
        return " or ".join(singulars), " or ".join(plurals), lambda value: any(fit(value) for fit in fits)
    raise TypeError(f"expected bool, int, float, str, tuples of them or a union with None, got {annotation}")
