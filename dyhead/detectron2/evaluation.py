"""The evaluation of :mod:`dyhead.evaluation` for datasets in Detectron2's catalogs."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import COCOPanopticEvaluator, DatasetEvaluator, SemSegEvaluator
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from dyhead.config import ConfigError
from dyhead.data import CocoSplit, DatasetInfo
from dyhead.detectron2.datasets import known_classes, registered_split
from dyhead.evaluation import coco_results
from dyhead.evaluation.results import Evaluated, detections_file, evaluate_detections

_log = logging.getLogger(__name__)

# What Detectron2 calls what a task compares, in the order of its results.
_FIELDS = {"segm": "pred_masks", "keypoints": "pred_keypoints"}

_PANOPTIC = "coco_panoptic_seg"
_PANOPTICAPI = "pip install git+https://github.com/cocodataset/panopticapi.git"


class Results(dict):
    """The results on one dataset in Detectron2's form, ``{"bbox": {metric: percent}, ...}``, and all that came out."""

    def __init__(self, evaluated: Evaluated) -> None:
        super().__init__(bbox=dict(evaluated.metrics), **{task: dict(of) for task, of in evaluated.tasks.items()})
        self.evaluated = evaluated

    def add(self, tasks: dict[str, dict[str, float]]) -> None:
        """Note the results of further tasks, by name."""
        self.update(tasks)
        self.evaluated.tasks.update(tasks)


def defined(results: dict[str, Any]) -> dict[str, Any]:
    """Nested results without those that are NaN, which JSON, and so metrics.json, cannot hold."""
    parts = {key: defined(value) if isinstance(value, dict) else value for key, value in results.items()}
    return {key: value for key, value in parts.items() if isinstance(value, dict) or not math.isnan(value)}


class InstanceEvaluator(DatasetEvaluator):
    """COCO's AP by :func:`dyhead.evaluation.evaluate_coco`; of all processes' detections, in the main one.

    It is that of boxes, and of masks and keypoints where the detector gives them.

    Args:
        dataset_name: any in Detectron2's catalogs; without a ``json_file`` in its metadata, its records are the truth.
        output_dir: ``OUTPUT_DIR``, for the detections, see :func:`dyhead.evaluation.results.detections_file`.
        sigmas: of the keypoints, ``TEST.KEYPOINT_OKS_SIGMAS``.
        others: evaluators of other tasks, whose results are added.

    Raises:
        ConfigError: on use: the meta-architecture detects no objects.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str,
        *,
        sigmas: Sequence[float] = (),
        others: Sequence[DatasetEvaluator] = (),
    ) -> None:
        self.dataset_name = dataset_name
        self.output_dir = output_dir
        self._sigmas, self._others = list(sigmas), list(others)
        self._category_ids = known_classes(dataset_name).ids
        self.reset()

    def reset(self) -> None:
        """Forget what was detected before."""
        self._detections: list[dict[str, Any]] = []
        self._tasks: set[str] = set()
        for other in self._others:
            other.reset()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Note what a model detected in a batch."""
        for record, output in zip(inputs, outputs, strict=True):
            if "instances" not in output:
                raise ConfigError(
                    "MODEL.META_ARCHITECTURE: expected one that detects objects, whose results are 'instances', got "
                    f"results with {', '.join(map(repr, output))}"
                )
            found = output["instances"].to("cpu")
            fields = {task: found.get(name) for task, name in _FIELDS.items() if found.has(name)}
            self._tasks |= set(fields)
            self._detections += coco_results(
                record["image_id"],
                self._category_ids,
                found.pred_boxes.tensor,
                found.scores,
                found.pred_classes,
                masks=fields.get("segm"),
                keypoints=fields.get("keypoints"),
            )
        for other in self._others:
            other.process(inputs, outputs)

    def evaluate(self) -> dict[str, Any]:
        """:class:`Results` in the main process, nothing in the others."""
        comm.synchronize()
        shares = comm.gather((self._detections, self._tasks), dst=0)
        others = [other.evaluate() for other in self._others]
        if not comm.is_main_process():
            return {}
        detections = [detection for share, _ in shares for detection in share]
        tasks = set().union(*(seen for _, seen in shares))
        truth = (
            None if MetadataCatalog.get(self.dataset_name).get("json_file") else convert_to_coco_dict(self.dataset_name)
        )
        evaluated = evaluate_detections(
            _split(self.dataset_name),
            detections,
            self.output_dir,
            truth,
            tasks=[task for task in _FIELDS if task in tasks],
            sigmas=self._sigmas,
        )
        results = Results(evaluated)
        for other in others:
            results.add({task: dict(metrics) for task, metrics in (other or {}).items()})
        return results


def build_evaluator(cfg: CfgNode, dataset_name: str) -> InstanceEvaluator:
    """What evaluates a detector on a dataset; on one with the truth of it, also semantic and panoptic segmentation.

    These are Detectron2's evaluators; that of panoptic quality needs panopticapi, see :func:`check_panoptic`.
    """
    folder = cfg.OUTPUT_DIR
    others: list[DatasetEvaluator] = []
    if dataset_name in _panoptic_sets(cfg):
        inference = os.path.dirname(detections_file(folder, dataset_name))
        others.append(SemSegEvaluator(dataset_name, distributed=True, output_dir=inference))
        if importlib.util.find_spec("panopticapi"):
            others.append(COCOPanopticEvaluator(dataset_name, inference))
    return InstanceEvaluator(dataset_name, folder, sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS, others=others)


def check_panoptic(cfg: CfgNode) -> None:
    """Check before a run that the panoptic quality that it is to end with can be computed.

    Raises:
        ConfigError: ``TEST.EXPECTED_RESULTS`` has it, and panopticapi is not installed; or it is, and a test set's
            panoptic segmentation is not there.
    """
    installed = importlib.util.find_spec("panopticapi") is not None
    for name in _panoptic_sets(cfg):
        tasks = [task for task, *_ in cfg.TEST.EXPECTED_RESULTS]
        if not installed and {"panoptic_seg", f"{name}/panoptic_seg"} & set(tasks):
            raise ConfigError(f"TEST.EXPECTED_RESULTS: expected no panoptic_seg without panopticapi; {_PANOPTICAPI}")
        for key in ("panoptic_json", "panoptic_root") if installed else ():
            path = MetadataCatalog.get(name).get(key) or ""
            if "://" not in path and not os.path.exists(path):  # what is elsewhere is fetched
                raise ConfigError(
                    f"DATASETS.TEST: dataset {name!r} has no panoptic segmentation to evaluate: its {key}, {path!r}, "
                    "is not there"
                )


def warn_of_panoptic(cfg: CfgNode) -> None:
    """Say before a run that it will end without panoptic quality, if it will."""
    names = _panoptic_sets(cfg)
    if names and not importlib.util.find_spec("panopticapi"):
        _log.warning("Without panopticapi there is no panoptic quality on %s; %s", ", ".join(names), _PANOPTICAPI)


def _panoptic_sets(cfg: CfgNode) -> list[str]:
    """The test sets with the truth of panoptic segmentation, of a detector that does it."""
    if cfg.MODEL.META_ARCHITECTURE != "PanopticFPN":
        return []
    return [name for name in cfg.DATASETS.TEST if MetadataCatalog.get(name).get("evaluator_type") == _PANOPTIC]


def _split(name: str) -> CocoSplit:
    """A dataset of the catalogs in the form of :mod:`dyhead.data`."""
    registered = registered_split(name)
    if registered:
        return registered
    metadata, records = MetadataCatalog.get(name), DatasetCatalog.get(name)
    for record in records:
        record["annotations"] = [_as_in_file(a) for a in record.get("annotations", ())]
    json_file = PathManager.get_local_path(metadata.json_file) if metadata.get("json_file") else ""
    info = DatasetInfo(name, json_file, metadata.get("image_root", ""))
    known = known_classes(name)
    return CocoSplit(info, known.names, known.ids, records)


def _as_in_file(annotation: dict[str, Any]) -> dict[str, Any]:
    """An annotation of Detectron2's in the form of :class:`dyhead.data.CocoSplit`."""
    own = annotation | {
        "bbox": BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS),
        "iscrowd": annotation.get("iscrowd", 0),
    }
    if "keypoints" in annotation:  # Detectron2 has added half a pixel
        own["keypoints"] = [v if i % 3 == 2 else v - 0.5 for i, v in enumerate(annotation["keypoints"])]
    return own
