"""`python -m benchmarks.bccd FOLDER`: COCO files for the BCCD photographs, 364 of blood cells under a microscope.

FOLDER is a clone of github.com/Shenggan/BCCD_Dataset (MIT licence), whose annotations are in Pascal VOC's form. Its own
trainval split becomes FOLDER/train.json, its test split FOLDER/val.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from dyhead.files import write_text

CLASSES = ("RBC", "WBC", "Platelets")
SPLITS = {"train": "trainval", "val": "test"}
LEAST_SIDE = 2  # pixels; two boxes are thinner


def coco(folder: Path, split: str) -> dict[str, Any]:
    """A split of BCCD in COCO's form, with boxes clipped to their pictures and those of less than 2 pixels left out."""
    images, annotations = [], []
    names = (folder / "BCCD" / "ImageSets" / "Main" / f"{split}.txt").read_text(encoding="utf-8").split()
    for image_id, name in enumerate(names, 1):
        root = ElementTree.parse(folder / "BCCD" / "Annotations" / f"{name}.xml").getroot()
        width, height = (int(root.findtext(f"size/{side}")) for side in ("width", "height"))
        images.append({"id": image_id, "file_name": f"{name}.jpg", "width": width, "height": height})
        for element in root.iter("object"):
            x1, y1, x2, y2 = (int(element.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
            x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
            if min(x2 - x1, y2 - y1) < LEAST_SIDE:
                continue
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": CLASSES.index(element.findtext("name")) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def main(folder: Path) -> None:
    """Writes both files."""
    for name, split in SPLITS.items():
        content = coco(folder, split)
        write_text(folder / f"{name}.json", json.dumps(content))
        print(f"{folder / name}.json: {len(content['images'])} images, {len(content['annotations'])} boxes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m benchmarks.bccd FOLDER\n{__doc__}")
    main(Path(sys.argv[1]))
