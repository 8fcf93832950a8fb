"""Text of any script in pictures, as far as there are fonts for it.

Fonts are looked for in this order: DejaVu, which matplotlib ships (Latin, Greek, Cyrillic, Arabic, Hebrew and others);
the packages of the extra `fonts` (Noto, nearly everything else); the system's fonts.
"""

import importlib.util
import os
import unicodedata
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

import matplotlib
from fontTools.ttLib import TTFont
from matplotlib.font_manager import findSystemFonts
from PIL import ImageDraw, ImageFont, features

_PACKAGES = ("manimgx_fonts", "manimgx_fonts_cjk")
# What is no letter, but tells how those beside it are drawn: joiners in Persian and Indian scripts, and variations.
_JOINERS = "\u200c\u200d" + "".join(map(chr, range(0xFE00, 0xFE10)))
_UNREADABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # controls, line ends and what has no meaning
_HAS_LAYOUT = features.check("raqm")  # the order of right-to-left text, and joined letters


def readable(text: str) -> tuple[str, bool]:
    """The text with escapes, such as `\\n` and `\\u732b`, for what cannot be drawn; and whether a font was missing."""
    shown, missing = [], False
    for letter in text:
        if letter in _JOINERS:
            shown.append(letter)
        elif unicodedata.category(letter) in _UNREADABLE:
            shown.append(_escaped(letter))
        elif _file_for(letter) is None:
            shown.append(_escaped(letter))
            missing = True
        else:
            shown.append(letter)
    return "".join(shown), missing


def elided(text: str, width: float, size: int) -> str:
    """As much of the beginning of a readable text as fits a width in pixels, with "…" where something is left out."""
    if measured(text, size)[0] <= width:
        return text
    low, high = 0, len(text) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if measured(text[:middle] + "…", size)[0] <= width else (low, middle - 1)
    return text[:low] + "…"


def measured(text: str, size: int) -> tuple[int, int]:
    """Width and height in pixels of a readable text whose letters have this size."""
    runs = [(_font(file, size), run) for file, run in _runs(text)]
    line = _font(_dejavu(), size)
    return round(sum(font.getlength(run) for font, run in runs)), sum(line.getmetrics())


def write(pen: ImageDraw.ImageDraw, x: float, y: float, text: str, colour: str | tuple[int, ...], size: int) -> None:
    """Draws a readable text with its upper left corner at (x, y)."""
    baseline = y + _font(_dejavu(), size).getmetrics()[0]
    for file, run in _runs(text):
        font = _font(file, size)
        pen.text((x, baseline), run, colour, font, anchor="ls")
        x += font.getlength(run)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def _runs(text: str) -> Iterator[tuple[str, str]]:
    """The text in parts of one font each, with the font's file."""
    current, run = _dejavu(), ""
    for letter in text:
        file = current if letter in _JOINERS or ord(letter) in _letters(current) else _file_for(letter) or current
        if file != current and run:
            yield current, run
            run = ""
        current = file
        run += letter
    if run:
        yield current, run


def _dejavu() -> str:
    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


@lru_cache(maxsize=4096)
def _file_for(letter: str) -> str | None:
    """The first font that has the letter, if it can be drawn at all."""
    if not _HAS_LAYOUT and unicodedata.bidirectional(letter) in ("R", "AL"):
        return None
    return next((file for file in _files() if ord(letter) in _letters(file)), None)


@lru_cache(maxsize=1)
def _files() -> tuple[str, ...]:
    files = [_dejavu()]
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            files += sorted(str(path) for path in Path(folder).iterdir() if path.suffix in (".ttf", ".otf", ".ttc"))
    # One of these has a box for everything.
    return (*files, *sorted(file for file in findSystemFonts() if "lastresort" not in file.lower()))


@cache
def _letters(file: str) -> frozenset[int]:
    """What a font has; nothing, if it cannot be used."""
    try:
        _font(file, 12)
        with TTFont(file, fontNumber=0, lazy=True) as font:
            return frozenset(font.getBestCmap() or ())
    except Exception:  # of the system, in whatever state
        return frozenset()


@lru_cache(maxsize=256)
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(file, size)
    try:
        axes = font.get_variation_axes()
    except OSError:  # not a variable font
        return font
    font.set_variation_by_axes([400 if axis["name"] in (b"Weight", "Weight") else axis["default"] for axis in axes])
    return font
