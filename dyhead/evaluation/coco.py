"""COCO average precision, by pycocotools."""

import os
from collections.abc import Iterable
from typing import Any

from dyhead.data.catalog import DatasetInfo


def evaluate_coco(truth: DatasetInfo | str | os.PathLike, detections: Iterable[dict[str, Any]]) -> dict[str, float]:
    """COCO's average precision of boxes, in percent.

    Args:
        truth: a data set, or its annotation file in COCO's format.
        detections: COCO's result dicts: image_id and category_id (both as in the file), bbox [x, y, width, height] in
            pixels, score.

    Returns:
        AP, AP50, AP75, APs, APm, APl, then `AP-<class>` for every class, all in percent; NaN where the data set has no
        object of that class or size. Without detections all are 0.

    Raises:
        DataError: the file is not COCO's format, or a detection names an image or a category that is not in it.
    """
    raise NotImplementedError
