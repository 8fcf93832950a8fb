"""A trained detector in three lines: from the folder of a run, or a config file and weights, to what is in a picture.

D detections of an image, H and W its height and width in pixels, J keypoints of an object.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode
from PIL import Image
from torch import Tensor, nn

from dyhead.checkpoints import last_checkpoint
from dyhead.checkpoints.errors import as_config_errors
from dyhead.config import ConfigError, check_num_classes, num_classes
from dyhead.data import Classes, classes_by_name, read_image
from dyhead.evaluation.coco import coco_results
from dyhead.evaluation.results import check_weights
from dyhead.evaluation.visualization import draw_detections
from dyhead.runs.engines import ENGINES, check_installed, choose_engine, is_installed
from dyhead.runs.record import Record, read_record

_log = logging.getLogger(__name__)

#: What a detector takes for an image: a file, an image of Pillow's, or pixels (H, W, 3) uint8, RGB.
ImageLike = str | os.PathLike | Image.Image | np.ndarray


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first. Tensors are on the CPU.

    Attributes:
        image: the image, (H, W, 3) uint8, RGB.
        boxes: (D, 4) as x0, y0, x1, y1 in pixels of the image.
        scores: (D,), 0 to 1.
        labels: (D,), the class, 0 to K - 1.
        names: the D names of the classes.
        masks: (D, H, W) bool, or None where the detector has none.
        keypoints: (D, J, 3) as x, y and score, or None.
        visible_boxes: (D, 4), the boxes of the visible parts of objects, or None.
        classes: of the detector.
    """

    image: np.ndarray
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: list[str]
    classes: Classes
    masks: Tensor | None = None
    keypoints: Tensor | None = None
    visible_boxes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def coco(self, image_id: Any) -> list[dict[str, Any]]:
        """COCO's result dicts, as :func:`dyhead.evaluation.coco_results` makes them; with ``visible_bbox``, if any."""
        return coco_results(
            image_id,
            self.classes.ids,
            self.boxes,
            self.scores,
            self.labels,
            self.masks,
            self.keypoints,
            self.visible_boxes,
        )

    def draw(self) -> Image.Image:
        """The image in its own size with boxes, classes, scores, masks and keypoints."""
        return draw_detections(self.image, self.coco(0), self.classes)


class Detector:
    """A trained detector.

    Args:
        engine: the module of an engine that does the work, ``dyhead.torchvision.prediction`` or that of Detectron2.
        cfg: the configuration.
        model: the detector on ``MODEL.DEVICE``, in evaluation mode.
        classes: what the classes are called and numbered.

    Attributes:
        cfg: the configuration, frozen.
        model: the detector, in the engine's form.
        classes: what the classes are called and numbered.
        engine: "detectron2" or "torchvision".
    """

    def __init__(self, engine: ModuleType, cfg: CfgNode, model: nn.Module, classes: Classes) -> None:
        self._engine = engine
        self.cfg = cfg
        self.model = model
        self.classes = classes
        self.engine = engine.__name__.split(".")[1]

    def __call__(
        self, images: ImageLike | Sequence[ImageLike], *, score_threshold: float = 0.0, batch_size: int = 1
    ) -> Detections | list[Detections]:
        """What is in an image, or in each of several.

        Args:
            images: a file, an image of Pillow's, or pixels (H, W, 3) uint8, RGB; or a list of such.
            score_threshold: detections with lower scores are left out, beside those that the configuration leaves out
                (``SCORE_THRESH_TEST``).
            batch_size: images that go through the detector at a time, padded to one size.

        Returns:
            The detections, or a list of those of each image.

        Raises:
            DataError: a file is missing or no image; names it.
            TypeError, ValueError: something else than an image, or no sensible number.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold: expected 0 to 1, got {score_threshold}")
        if isinstance(images, (list, tuple)):
            return list(self._batches(images, score_threshold, batch_size))
        (found,) = self._batches([images], score_threshold, 1)
        return found

    def _batches(self, images: Sequence[ImageLike], threshold: float, size: int) -> Iterator[Detections]:
        for first in range(0, len(images), size):
            batch = [_pixels(image) for image in images[first : first + size]]
            found = self._engine.detect(self.cfg, self.model, batch, threshold)
            for pixels, parts in zip(batch, found, strict=True):
                there = (parts["boxes"][:, 2:] > parts["boxes"][:, :2]).all(dim=1)  # boxes without an area are none
                parts = {key: value[there] for key, value in parts.items()}
                names = [self.classes.names[label] for label in parts["labels"].tolist()]
                yield Detections(image=pixels, names=names, classes=self.classes, **parts)


def load_detector(
    source: str | os.PathLike,
    weights: str | os.PathLike | None = None,
    *,
    opts: Sequence[str] = (),
    device: str | None = None,
    engine: str = "auto",
) -> Detector:
    """A trained detector: ``load_detector("output/run")("photo.jpg")``.

    Args:
        source: ``OUTPUT_DIR`` of a training, a checkpoint in it, or a config file.
        weights: a checkpoint that MODEL.WEIGHTS may name, of either engine or another project. By default, the folder's
            last checkpoint, or the file's MODEL.WEIGHTS.
        opts: overrides of the configuration, ``["TEST.DETECTIONS_PER_IMAGE", "20", ...]``.
        device: "cpu", "cuda" or "cuda:1"; by default ``MODEL.DEVICE``.
        engine: "detectron2", "torchvision", or "auto": the one that the run was trained on, if it is installed.
            Otherwise as in training.

    Raises:
        ConfigError: there is no run, or the configuration or the weights cannot be used.
    """
    file, weights = _files(os.path.expanduser(os.fspath(source)), weights)
    opts = [str(word) for word in opts]
    if device is not None:
        opts += ["MODEL.DEVICE", str(device)]
    folders = dict.fromkeys(os.path.dirname(path) for path in (weights, file) if path)
    record = next(filter(None, map(read_record, folders)), None)
    name = _engine_for(engine, record)
    check_installed(name)
    module = importlib.import_module(f"dyhead.{name}.prediction")
    cfg = module.configuration(file, opts)
    weights = weights or cfg.MODEL.WEIGHTS
    if not weights:
        raise ConfigError(f"{file}: MODEL.WEIGHTS is empty; say which weights the detector has")
    model = module.trained_model(cfg, weights)
    check_weights(model)
    return Detector(module, cfg, model, _classes(cfg, record))


def _files(source: str, weights: str | os.PathLike | None) -> tuple[str, str | None]:
    """The config file, and the weights if they are not the file's."""
    weights = None if weights is None else os.path.expanduser(os.fspath(weights))
    folder = source
    if os.path.isfile(source) and os.path.splitext(source)[1].lower() not in (".yaml", ".yml", ""):
        if weights is not None:
            raise ConfigError(f"{source}: expected a config file, or a checkpoint without other weights")
        folder, weights = os.path.dirname(source), source
    elif not os.path.isdir(source):
        return source, weights
    file = os.path.join(folder, "config.yaml")
    if not os.path.isfile(file):
        raise ConfigError(f"{source}: expected a training's, got a folder without config.yaml")
    if weights is None:
        with as_config_errors():
            weights = last_checkpoint(folder)
    if weights is None:
        raise ConfigError(f"{source}: expected a training's, got a folder without a checkpoint")
    return file, weights


def _engine_for(engine: str, record: Record | None) -> str:
    if engine not in ("auto", *ENGINES):
        raise ConfigError(f"engine: expected one of auto, {', '.join(ENGINES)}, got {engine!r}")
    if engine == "auto" and record is not None and is_installed(record.engine):
        return record.engine
    return choose_engine(engine)


def _classes(cfg: CfgNode, record: Record | None) -> Classes:
    """What the run says, else what is known of the datasets of the configuration, else numbers."""
    if record is not None:
        check_num_classes(cfg, "of the run", record.classes.names)
        return record.classes
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        known = classes_by_name(name, cfg.DATASETS.REGISTER)
        if known is not None:
            check_num_classes(cfg, name, known.names)
            return known
    count = num_classes(cfg)
    _log.warning("The names of the %d classes are not known; they are called by their numbers, from 0", count)
    return Classes([str(k) for k in range(count)], list(range(1, count + 1)))


def _pixels(image: ImageLike) -> np.ndarray:
    if isinstance(image, (str, os.PathLike)):
        return read_image(os.path.expanduser(image))
    if isinstance(image, Image.Image) and image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return np.array(image.convert("RGB"))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        if 0 in image.shape:
            raise ValueError(f"image: expected pixels, got an array of shape {image.shape}")
        return image
    got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else getattr(image, "mode", type(image))
    raise TypeError(f"image: expected a file, an 8-bit image of Pillow's or a uint8 array (H, W, 3), got {got}")
