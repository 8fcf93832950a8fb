"""Which pictures and videos the words of a command line stand for."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image

from dyhead.config import ConfigError

_VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}


@dataclass(frozen=True)
class Input:
    """A picture or a video.

    Attributes:
        path: where it is.
        name: a name that no other one has, below the folder that was given; with "/" between folders.
        video: whether it is a video.
    """

    path: str
    name: str
    video: bool


def find_inputs(words: Sequence[str]) -> list[Input]:
    """Files, and what lies in folders and below, and fits patterns such as ``photos/**/*.jpg``, each once.

    Of folders and patterns, files are taken whose names end as those of pictures and videos do, and do not begin with a
    dot. A file that is named itself is taken whatever its name.

    Raises:
        ConfigError: a word stands for nothing.
    """
    found, names, seen = [], set(), set()
    for word in words:
        there = list(_files(os.path.expanduser(word)))
        if not there:
            what = "a folder without pictures" if os.path.isdir(os.path.expanduser(word)) else "nothing"
            raise ConfigError(f"{word}: expected a picture, a video, a folder or a pattern of files, got {what}")
        for path, name in there:
            if os.path.abspath(path) in seen:
                continue
            seen.add(os.path.abspath(path))
            unique, count = name, 1
            while unique.casefold() in names:  # from another folder
                count += 1
                stem, suffix = os.path.splitext(name)
                unique = f"{stem}-{count}{suffix}"
            names.add(unique.casefold())
            found.append(Input(path, unique, _suffix(path) in _VIDEOS))
    return found


def _files(word: str) -> Iterator[tuple[str, str]]:
    """Paths and names."""
    if os.path.isdir(word):
        for folder, below, files in os.walk(word, followlinks=False):
            below[:] = sorted(name for name in below if not name.startswith("."))
            for file in sorted(files):
                path = os.path.join(folder, file)
                if _is_taken(path):
                    yield path, os.path.relpath(path, word).replace(os.sep, "/")
    elif os.path.lexists(word):
        yield word, os.path.basename(word)
    else:
        for path in sorted(glob.glob(word, recursive=True)):
            if os.path.isfile(path) and _is_taken(path):
                yield path, os.path.basename(path)


def _is_taken(path: str) -> bool:
    return not os.path.basename(path).startswith(".") and _suffix(path) in (_pictures() | _VIDEOS)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


@cache
def _pictures() -> frozenset[str]:
    """The ends of names of what Pillow reads."""
    suffixes = Image.registered_extensions()  # which loads its plugins
    return frozenset(suffix for suffix, kind in suffixes.items() if kind in Image.OPEN)
