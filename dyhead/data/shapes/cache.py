"""Keeps drawn sets on disk."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict

from PIL import Image

from dyhead.data.errors import DataError
from dyhead.data.shapes.drawing import DRAWING_VERSION, KEYPOINTS, draw
from dyhead.data.shapes.specification import SPECS, Spec
from dyhead.progress import bar, is_quiet


def prepare(name: str, root: str | os.PathLike) -> tuple[str, str]:
    """Returns the files of a set, which is drawn into the folder `shapes` below `root` unless it is there already.

    The folder's name carries a digest of the specification and of the drawing version, so that a changed set is
    drawn again. The folder appears only once it is complete: an interrupted drawing leaves no partial set behind.

    Returns:
        Paths of the annotation file and of the image folder.

    Raises:
        DataError: the name is not one of `SPECS`, or the folder cannot be written.
    """
    if name not in SPECS:
        raise DataError(f"shapes: expected one of {', '.join(SPECS)}, got '{name}'")
    spec = SPECS[name]
    described = json.dumps({"drawing_version": DRAWING_VERSION, **asdict(spec)}, indent=1)
    digest = hashlib.sha256(described.encode()).hexdigest()[:10]
    parent = os.path.join(root, "shapes")
    folder = os.path.join(parent, f"{name}-{digest}")
    if not os.path.isdir(folder):
        try:
            os.makedirs(parent, exist_ok=True)
            with _lock(os.path.join(parent, f".{name}.lock")):
                if not os.path.isdir(folder):
                    _draw_set(name, spec, described, folder)
        except OSError as error:
            raise DataError(
                f"dataset '{name}' could not be drawn into {os.path.abspath(parent)} ({error}); "
                "set DETECTRON2_DATASETS to a writable folder with at least 300 MB of free space"
            ) from error
    return os.path.join(folder, "annotations.json"), os.path.join(folder, "images")


def _draw_set(name: str, spec: Spec, described: str, folder: str) -> None:
    temporary = f"{folder}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    os.makedirs(os.path.join(temporary, "images"))
    try:
        images, annotations = [], []
        for index in _progress(name, spec.images):
            pixels, found = draw(spec, index)
            image = {
                "id": index + 1,
                "file_name": f"{index + 1:06d}{spec.suffix}",
                "height": pixels.shape[0],
                "width": pixels.shape[1],
            }
            # quality and subsampling concern JPEG only
            path = os.path.join(temporary, "images", image["file_name"])
            Image.fromarray(pixels).save(path, quality=90, subsampling=0)
            images.append(image)
            annotations += [{"id": len(annotations) + i, "image_id": image["id"], **a} for i, a in enumerate(found, 1)]
        of_all = {"supercategory": "shape", "keypoints": list(KEYPOINTS), "skeleton": []}
        categories = [{"id": i, "name": c, **of_all} for i, c in enumerate(spec.classes, 1)]
        data = {
            "info": {"description": f"{name}, drawn by dyhead"},
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        with open(os.path.join(temporary, "annotations.json"), "w", encoding="utf-8") as file:
            json.dump(data, file)
        with open(os.path.join(temporary, "spec.json"), "w", encoding="utf-8") as file:
            file.write(described)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not os.path.isdir(folder):  # otherwise another process was faster, which the lock did not stop
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: str) -> Iterator[None]:
    """Lets one process draw while others wait. Where locks do not work, all draw and the first to finish wins."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _progress(name: str, total: int) -> Iterator[int]:
    """Counts to `total` and reports it on stderr: by a bar on a terminal, else by a first and a last line."""
    terminal = sys.stderr.isatty()
    with bar(f"drawing {name}", total, leave=True) as progress:
        for i in range(total):
            if i == 0 and not (terminal or is_quiet()):
                print(f"drawing {name}: {total} images", file=sys.stderr, flush=True)
            yield i
            progress.update()
    if not (terminal or is_quiet()):
        print(f"drawing {name}: done", file=sys.stderr, flush=True)
