"""A small dataset in COCO's format, which each test breaks in its own way."""

import json

import numpy as np
import pytest
from PIL import Image

from dyhead.data import DatasetInfo


class SmallSet:
    """Two images of 40 x 30 (width x height), three objects, ids that are neither contiguous nor sorted."""

    def __init__(self, folder):
        self.folder = folder
        self.info = DatasetInfo("small", str(folder / "small.json"), str(folder / "images"))
        self.data = {
            "images": [
                {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
                {"id": 3, "file_name": "b.png", "width": 40, "height": 30},
            ],
            "annotations": [
                {"id": 11, "image_id": 7, "category_id": 9, "bbox": [1, 2, 10, 20], "area": 150, "iscrowd": 0},
                {"id": 12, "image_id": 7, "category_id": 4, "bbox": [0, 0, 40, 30], "area": 1200, "iscrowd": 1},
                {"id": 13, "image_id": 3, "category_id": 4, "bbox": [5.5, 6.5, 2, 3]},
            ],
            "categories": [{"id": 9, "name": "cat"}, {"id": 4, "name": "dog"}],
        }
        (folder / "images").mkdir()
        for name in ("a.png", "b.png"):
            Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(folder / "images" / name)

    def write(self, text=None):
        (self.folder / "small.json").write_text(json.dumps(self.data) if text is None else text)
        return self.info


@pytest.fixture
def small_set(tmp_path):
    return SmallSet(tmp_path)
