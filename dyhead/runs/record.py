"""run.json: what config.yaml does not say of a run, so that its folder is all that a prediction needs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from dyhead.config import ConfigError
from dyhead.data import Classes
from dyhead.files import write_text
from dyhead.runs.engines import ENGINES

_NAME = "run.json"


@dataclass(frozen=True)
class Record:
    """Of a run.

    Attributes:
        engine: "detectron2" or "torchvision".
        classes: what it was trained on.
    """

    engine: str
    classes: Classes


def write_record(output_dir: str | os.PathLike, record: Record) -> None:
    """Write run.json into ``OUTPUT_DIR``."""
    classes = record.classes
    content = {
        "engine": record.engine,
        "categories": [{"id": i, "name": name} for i, name in zip(classes.ids, classes.names, strict=True)],
        "keypoints": list(classes.keypoints),
    }
    write_text(os.path.join(output_dir, _NAME), json.dumps(content, indent=1) + "\n")


def read_record(folder: str | os.PathLike) -> Record | None:
    """The run.json in a folder, or None.

    Raises:
        ConfigError: it is there, but no run wrote it.
    """
    path = os.path.join(folder, _NAME)
    if not os.path.lexists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        engine, categories, keypoints = (content[key] for key in ("engine", "categories", "keypoints"))
        names, ids = ([category[key] for category in categories] for key in ("name", "id"))
        fits = engine in ENGINES and all(isinstance(name, str) for name in (*names, *keypoints))
        if not fits or not all(isinstance(i, (int, str)) for i in ids):
            raise ValueError("other values than a run writes")
    except (OSError, RecursionError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path}: expected the engine and the classes of a run ({reason})") from error
    return Record(engine, Classes(names, ids, keypoints))
