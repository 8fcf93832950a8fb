import importlib.util
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont, features

from dyhead.evaluation import lettering

SHIPPED = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
DEJAVU, STIX = (str(SHIPPED / name) for name in ("DejaVuSans.ttf", "STIXGeneral.ttf"))
HOUSE = "家"  # in neither of them


@pytest.fixture
def fonts(monkeypatch):
    """A function that says which fonts there are."""

    def only(*files):
        monkeypatch.setattr(lettering, "_files", lambda: files)
        lettering._file_for.cache_clear()

    yield only
    lettering._file_for.cache_clear()


def drawn(text, size=20):
    picture = Image.new("L", (400, 40), 0)
    lettering.write(ImageDraw.Draw(picture), 3, 4, text, "white", size)
    return np.asarray(picture)


@pytest.mark.parametrize(
    "text", ["cat", "кошка", "γάτα", "chat à l'œil", "Ångström 5%", "", "می‌خواهم" if features.check("raqm") else ""]
)
def test_what_dejavu_has_is_drawn_as_it_is(fonts, text):
    fonts(DEJAVU)
    assert lettering.readable(text) == (text, False)


def test_controls_are_escaped_and_letters_without_a_font_are_told(fonts):
    fonts(DEJAVU)
    assert lettering.readable("a\nb\tc\0\u202ed\u2028\ud800") == (r"a\nb\tc\x00\u202ed\u2028\ud800", False)
    assert lettering.readable(f"my {HOUSE}\n") == (r"my \u5bb6\n", True)
    assert lettering.readable("\U0001f404") == (r"\U0001f404", True)


def test_a_letter_comes_from_the_first_font_that_has_it(fonts):
    only_stix = next(
        chr(c)
        for c in sorted(TTFont(STIX).getBestCmap().keys() - TTFont(DEJAVU).getBestCmap().keys())
        if c > 0x2000 and chr(c).isprintable()
    )
    fonts(DEJAVU)
    assert lettering.readable(only_stix)[1]
    fonts(DEJAVU, STIX)
    assert lettering.readable(f"a{only_stix}b") == (f"a{only_stix}b", False)
    expected, x = Image.new("L", (400, 40), 0), 3
    for file, part in ((DEJAVU, "a"), (STIX, only_stix + "b")):  # which has the b as well
        font = ImageFont.truetype(file, 20)
        baseline = 4 + ImageFont.truetype(DEJAVU, 20).getmetrics()[0]
        ImageDraw.Draw(expected).text((x, baseline), part, "white", font, anchor="ls")
        x += font.getlength(part)
    np.testing.assert_array_equal(drawn(f"a{only_stix}b"), np.asarray(expected))


def test_text_is_as_large_as_it_is_said_to_be(fonts):
    fonts(DEJAVU)
    width, height = lettering.measured("Gypsum", 20)
    rows, columns = np.nonzero(drawn("Gypsum"))
    assert 4 <= rows.min() < rows.max() < 4 + height
    assert 3 <= columns.min() < columns.max() <= 3 + width
    assert columns.max() > width - 3


def test_a_text_is_shortened_to_what_fits(fonts):
    fonts(DEJAVU)
    text = "abcdefghijklmnopqrstuvwxyz" * 10
    short = lettering.elided(text, 100, 11)
    assert short[-1] == "…"
    assert text.startswith(short[:-1])
    assert lettering.measured(short, 11)[0] <= 100 < lettering.measured(text[: len(short)] + "…", 11)[0]
    assert lettering.elided("cat", lettering.measured("cat", 11)[0], 11) == "cat"
    assert lettering.elided("cat", 1, 11) == "…"


def test_a_font_that_cannot_be_used_has_no_letters(fonts, tmp_path):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    fonts(str(tmp_path / "broken.ttf"), DEJAVU)
    assert lettering.readable("cat") == ("cat", False)


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("manimgx_fonts", "manimgx_fonts_cjk"))), reason="without the extra 'fonts'"
)
@pytest.mark.parametrize("text", ["猫犬", "고양이", "バス", "बिल्ली", "แมว", "தமிழ்", "ኣማርኛ", "বিড়াল", "👍🐕", "❤️"])
def test_the_extra_has_fonts_for_other_scripts(text):
    assert lettering.readable(text) == (text, False)
    glyphs = [drawn(letter) for letter in dict.fromkeys(text) if letter.isalpha()]
    assert all(glyph.max() > 200 for glyph in glyphs)  # not those of the thinnest weight
    assert all((a != b).any() for a, b in pairwise(glyphs))  # nor all the same box
