import dataclasses
import math
from dataclasses import dataclass

import pytest

from dyhead.options import (
    above,
    at_least,
    at_least_one,
    between,
    choice,
    inherited,
    inside,
    leaves,
    odd,
    one_of,
    option,
    part,
    parts,
    read,
)


@dataclass(frozen=True)
class Square:
    side: float = option(2.0, "its side", above(0))


@dataclass(frozen=True)
class Circle:
    radius: float = option(1.0, "its radius", at_least(0))
    parts: tuple[int, ...] = option((1, 2), "its parts")


SHAPES = {"square": Square, "circle": Circle}


@dataclass(frozen=True)
class Frame:
    width: int = option(3, "its width", at_least(1))
    color: str | None = option(None, "its color")


@dataclass(frozen=True)
class Image:
    title: str = option("", "what it is called")
    frame: Frame = part(Frame(width=5))
    back: Frame = part(Frame(), prefix="BACK_")
    main_shape: object = choice("circle", "what is drawn", SHAPES)


@dataclass(frozen=True)
class Poster(Image):
    title: str = inherited(Image, "title", "Poster")


DEFAULTS = {
    "TITLE": "",
    "WIDTH": 5,
    "COLOR": None,
    "BACK_WIDTH": 3,
    "BACK_COLOR": None,
    "MAIN_SHAPE": "circle",
    "SQUARE_SHAPE_SIDE": 2.0,
    "CIRCLE_SHAPE_RADIUS": 1.0,
    "CIRCLE_SHAPE_PARTS": (1, 2),
}


def defaults(options, **more):
    return {leaf.key: leaf.default for leaf in leaves(options, **more)}


def test_keys_and_defaults_of_parts_and_choices_stand_in_one_node():
    assert defaults(Image) == DEFAULTS
    assert list(defaults(Image)) == list(DEFAULTS)


def test_keys_after_a_prefix():
    assert defaults(Image, prefix="MY_") == {f"MY_{key}": value for key, value in DEFAULTS.items()}


def test_the_values_of_an_instance_are_its_defaults():
    mine = Image("Mine", Frame(7, "red"), Frame(8), Circle(4.0))
    changed = {"TITLE": "Mine", "WIDTH": 7, "COLOR": "red", "BACK_WIDTH": 8, "CIRCLE_SHAPE_RADIUS": 4.0}
    assert defaults(mine) == DEFAULTS | changed
    assert defaults(Image(main_shape=Square(9.0))) == DEFAULTS | {"MAIN_SHAPE": "square", "SQUARE_SHAPE_SIDE": 9.0}


def test_documentation_and_checks_are_those_of_the_fields():
    found = {leaf.key: leaf for leaf in leaves(Image)}
    assert found["BACK_WIDTH"].doc == "its width"
    assert found["BACK_WIDTH"].check.text == "at least 1"
    assert found["COLOR"].check is None
    assert found["MAIN_SHAPE"].doc == "what is drawn"
    assert found["MAIN_SHAPE"].check.text == "one of 'square', 'circle'"


def test_an_inherited_field_has_another_default_alone():
    assert defaults(Poster) == DEFAULTS | {"TITLE": "Poster"}
    assert [leaf.doc for leaf in leaves(Poster)] == [leaf.doc for leaf in leaves(Image)]

    @dataclass(frozen=True)
    class Small(Square):
        side: float = inherited(Square, "side", 0.1)

    assert list(leaves(Small)) == [dataclasses.replace(leaf, default=0.1) for leaf in leaves(Square)]


def test_parts_come_with_their_names_and_prefixes():
    assert list(parts(Image, prefix="X_")) == [
        (Image(), "", "X_"),
        (Frame(width=5), "", "X_"),
        (Frame(), "", "X_BACK_"),
        (Square(), "square", "X_SQUARE_SHAPE_"),
        (Circle(), "circle", "X_CIRCLE_SHAPE_"),
    ]


def test_a_class_is_read_from_its_keys():
    values = DEFAULTS | {"TITLE": "Read", "BACK_COLOR": "blue", "CIRCLE_SHAPE_PARTS": [[1, 2], [3]]}
    assert read(Image, values.__getitem__) == Image("Read", Frame(5), Frame(3, "blue"), Circle(1.0, ((1, 2), (3,))))
    assert read(Image, (values | {"MAIN_SHAPE": "square"}).__getitem__).main_shape == Square()
    assert type(read(Poster, values.__getitem__)) is Poster


def test_reading_the_defaults_makes_what_has_them():
    for options in (Image(), Image("Mine", Frame(7), main_shape=Square(3.0)), Poster()):
        assert read(options, defaults(options).__getitem__) == options


def test_reading_asks_for_the_chosen_ones_keys_alone():
    asked = []

    def value_of(key):
        asked.append(key)
        return DEFAULTS[key.removeprefix("MY_")]

    read(Image, value_of, "MY_")
    assert asked == [f"MY_{key}" for key in DEFAULTS if not key.startswith("SQUARE")]


def test_values_that_do_not_fit_each_other_are_the_classs_to_refuse():
    @dataclass(frozen=True)
    class Range:
        low: int = option(0, "its low end")
        high: int = option(1, "its high end")

        def __post_init__(self):
            if self.low > self.high:
                raise ValueError(f"LOW: expected at most {self.high}, got {self.low}")

    with pytest.raises(ValueError, match="LOW: expected at most 1, got 2"):
        read(Range, {"LOW": 2, "HIGH": 1}.get)


@pytest.mark.parametrize(
    ("check", "text", "legal", "illegal"),
    [
        (at_least(2), "at least 2", [2, 2.5, 100], [1.99, -3, math.nan]),
        (above(0), "above 0", [1e-9, 3], [0, -1, math.nan]),
        (between(0, 1), "0 to 1", [0, 0.5, 1], [-0.1, 1.1, math.nan]),
        (inside(0, 1), "above 0, below 1", [0.001, 0.999], [0, 1, math.nan]),
        (one_of("a", 2), "one of 'a', 2", ["a", 2], ["b", "2", None]),
        (odd(), "odd, at least 1", [1, 3, 5], [0, 2, -1]),
        (at_least_one("level"), "at least one level", [("p3",), ["p3", "p4"]], [(), []]),
    ],
    ids=lambda value: value.text if hasattr(value, "text") else "",
)
def test_checks(check, text, legal, illegal):
    assert check.text == text
    assert [value for value in (*legal, *illegal) if check.fits(value)] == legal


def test_options_stay_dataclasses():
    assert dataclasses.replace(Image(), title="New") == Image("New")
    assert hash(Image()) == hash(Image())
