"""The evaluation of :mod:`dyhead.evaluation` for datasets in Detectron2's catalogs."""

from __future__ import annotations

import math
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from dyhead.data import CocoSplit, DatasetInfo
from dyhead.detectron2.datasets import registered_split
from dyhead.evaluation import coco_results
from dyhead.evaluation.results import Evaluated, evaluate_detections


class Results(dict):
    """The results on one dataset in Detectron2's form, ``{"bbox": {metric: percent}}``, and all that came out."""

    def __init__(self, evaluated: Evaluated) -> None:
        super().__init__(bbox=dict(evaluated.metrics))
        self.evaluated = evaluated


def defined(results: dict[str, Any]) -> dict[str, Any]:
    """Nested results without those that are NaN, which JSON, and so metrics.json, cannot hold."""
    parts = {key: defined(value) if isinstance(value, dict) else value for key, value in results.items()}
    return {key: value for key, value in parts.items() if isinstance(value, dict) or not math.isnan(value)}


class BoxEvaluator(DatasetEvaluator):
    """COCO's AP of boxes by :func:`dyhead.evaluation.evaluate_coco`; of all processes' detections, in the main one.

    Args:
        dataset_name: any in Detectron2's catalogs; without a ``json_file`` in its metadata, its records are the truth.
        output_dir: ``OUTPUT_DIR``, for the detections, see :func:`dyhead.evaluation.results.detections_file`.
    """

    def __init__(self, dataset_name: str, output_dir: str) -> None:
        self.dataset_name = dataset_name
        self.output_dir = output_dir
        self._category_ids = _category_ids(dataset_name)
        self._detections: list[dict[str, Any]] = []

    def reset(self) -> None:
        """Forget what was detected before."""
        self._detections = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Note what a model detected in a batch."""
        for record, output in zip(inputs, outputs, strict=True):
            found = output["instances"].to("cpu")
            self._detections += coco_results(
                record["image_id"], self._category_ids, found.pred_boxes.tensor, found.scores, found.pred_classes
            )

    def evaluate(self) -> dict[str, Any]:
        """:class:`Results` in the main process, nothing in the others."""
        comm.synchronize()
        shares = comm.gather(self._detections, dst=0)
        if not comm.is_main_process():
            return {}
        detections = [detection for share in shares for detection in share]
        truth = (
            None if MetadataCatalog.get(self.dataset_name).get("json_file") else convert_to_coco_dict(self.dataset_name)
        )
        return Results(evaluate_detections(_split(self.dataset_name), detections, self.output_dir, truth))


def _category_ids(name: str) -> list[Any]:
    """The ids in the annotation file, by class."""
    metadata = MetadataCatalog.get(name)
    classes = metadata.get("thing_dataset_id_to_contiguous_id")
    return sorted(classes, key=classes.get) if classes else list(range(len(metadata.thing_classes)))


def _split(name: str) -> CocoSplit:
    """A dataset of the catalogs in the form of :mod:`dyhead.data`."""
    registered = registered_split(name)
    if registered:
        return registered
    metadata, records = MetadataCatalog.get(name), DatasetCatalog.get(name)
    for record in records:
        record["annotations"] = [
            {
                **a,
                "bbox": BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS),
                "iscrowd": a.get("iscrowd", 0),
            }
            for a in record.get("annotations", ())
        ]
    json_file = PathManager.get_local_path(metadata.json_file) if metadata.get("json_file") else ""
    info = DatasetInfo(name, json_file, metadata.get("image_root", ""))
    return CocoSplit(info, metadata.thing_classes, _category_ids(name), records)
