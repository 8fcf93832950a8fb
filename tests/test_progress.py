"""Bars are for people who look on, and for nobody who wants quiet."""

import sys

import pytest

from dyhead.data.shapes import cache
from dyhead.progress import bar, is_quiet, quiet


@pytest.mark.parametrize(
    ("terminal", "wanted", "shown"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_a_bar_is_shown_on_a_terminal_unless_quiet(monkeypatch, capsys, terminal, wanted, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with quiet(wanted), bar("steps", 3) as progress:
        for _ in range(3):
            progress.update()
    assert ("steps" in capsys.readouterr().err) == shown


def test_quiet_ends_with_its_block(monkeypatch):
    monkeypatch.delenv("DYHEAD_QUIET", raising=False)
    with quiet():
        assert is_quiet()
    assert not is_quiet()
    with quiet(), quiet(False):
        assert is_quiet()


@pytest.mark.parametrize(("terminal", "wanted", "lines"), [(False, False, 2), (False, True, 0), (True, True, 0)])
def test_drawing_says_what_it_does_unless_quiet(monkeypatch, capsys, terminal, wanted, lines):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with quiet(wanted):
        assert list(cache._progress("set", 4)) == [0, 1, 2, 3]
    assert capsys.readouterr().err.count("drawing set") == lines
