"""One HTML file with all pictures in it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { max-width: 100%; height: auto; border: 1px solid #ddd; }
figure { margin: 1rem 0 2.5rem; }
figcaption { color: #444; max-width: 60rem; }
"""


@dataclass(frozen=True)
class Section:
    """A picture with what it shows.

    Attributes:
        title: its heading.
        picture: a PNG file.
        caption: how to read it.
    """

    title: str
    picture: Path
    caption: str


def page(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """The text of the file."""
    parts = [
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>',
        f"<h1>{html.escape(title)}</h1><p>{html.escape(introduction)}</p>",
    ]
    for section in sections:
        data = base64.b64encode(section.picture.read_bytes()).decode()
        parts.append(
            f"<h2>{html.escape(section.title)}</h2><figure>"
            f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(section.caption)}</figcaption></figure>"
        )
    return "\n".join([*parts, "</html>"]) + "\n"
