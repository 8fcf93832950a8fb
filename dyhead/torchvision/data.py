"""Images for training and evaluation: a shuffled, endless and resumable stream, and a plain pass over a dataset.

Which image comes at a position of the training stream, and how it is augmented, depends only on the seed and the
position. A run that is resumed, or that has another number of worker processes, sees the same images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from dyhead import data
from dyhead.config import ConfigError, reads_visible_boxes
from dyhead.data import CocoSplit, DataError, resized
from dyhead.data.coco import flip_pairs
from dyhead.evaluation.coco import as_rle
from dyhead.runs.batches import grouped
from dyhead.runs.interruption import leave_to_main_process
from dyhead.runs.preflight import check_parts
from dyhead.runs.seeds import augmentation_rng, order_rng

Target = dict[str, Tensor]


def prepared(image: Tensor, shortest: int, longest: int) -> Tensor:
    """An image uint8 (3, H, W) in the size of :func:`dyhead.data.resized`, as the detector sees it in an evaluation."""
    return functional.resize(image, list(resized(*image.shape[-2:], shortest, longest)), antialias=True)


def load_train(cfg: CfgNode) -> list[CocoSplit]:
    """The datasets of ``DATASETS.TRAIN``, loaded and checked.

    Raises:
        ConfigError: none is configured, or their classes or keypoints differ; see also :func:`load_splits`.
        DataError: one of them is not sound, or no image is left to train on.
    """
    splits = load_splits(cfg, cfg.DATASETS.TRAIN)
    if not splits:
        raise ConfigError("DATASETS.TRAIN: expected at least one dataset to train on, got none")
    for split in splits[1:]:
        if split.class_names != splits[0].class_names:
            raise ConfigError(
                f"DATASETS.TRAIN: expected the same classes everywhere, got {splits[0].class_names} in "
                f"{splits[0].info.name!r} and {split.class_names} in {split.info.name!r}"
            )
        if cfg.MODEL.KEYPOINT_ON and split.keypoint_names != splits[0].keypoint_names:
            raise ConfigError(
                f"DATASETS.TRAIN: expected the same keypoints everywhere, got {splits[0].keypoint_names} in "
                f"{splits[0].info.name!r} and {split.keypoint_names} in {split.info.name!r}"
            )
    return splits


def load_splits(cfg: CfgNode, names: Sequence[str]) -> list[CocoSplit]:
    """The datasets of these names, loaded and checked.

    Raises:
        ConfigError: annotated objects lack the masks or keypoints that the detector is for.
        DataError: a dataset is not sound.
    """
    splits = [data.load(data.get(name), clip_boxes=cfg.DATASETS.CLIP_BOXES) for name in names]
    for split in splits:
        if split.annotated:
            trained = split.info.name in cfg.DATASETS.TRAIN
            check_parts(cfg, split.info.name, split.records, split.keypoint_names, trained=trained)
    return splits


@dataclass(frozen=True)
class Change:
    """A change of an image and of what is annotated on it: resized, then maybe flipped.

    Attributes:
        before: height and width of the image, in pixels.
        after: what they become.
        flip: "horizontal", "vertical" or "none".
    """

    before: tuple[int, int]
    after: tuple[int, int]
    flip: str

    @property
    def inverse(self) -> Change:
        """The change that leads back."""
        return Change(self.after, self.before, self.flip)

    def image(self, image: Tensor) -> Tensor:
        """An image uint8 (3, H, W)."""
        return self._apply(tv_tensors.Image(image), antialias=True)

    def boxes(self, boxes: Tensor) -> Tensor:
        """Boxes (M, 4) in pixels."""
        return self._apply(tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=self.before))

    def mask(self, segmentation: Any) -> Tensor:
        """Polygons or RLE, as annotation files have them, to the pixels of the object (H, W), bool."""
        from pycocotools import mask as coco_masks  # where there are masks

        height, width = self.after
        if isinstance(segmentation, list):
            polygons = [self.points(torch.tensor(p, dtype=torch.float64).view(-1, 2)) for p in segmentation]
            rle = as_rle([p.flatten().tolist() for p in polygons], height, width)
            return torch.from_numpy(coco_masks.decode(rle)).bool()
        pixels = torch.from_numpy(coco_masks.decode(as_rle(segmentation, *self.before)))
        # The pixel whose center is nearest; as an image, because torchvision before 0.29 does not take this for masks.
        return self._apply(tv_tensors.Image(pixels[None]), interpolation=InterpolationMode.NEAREST_EXACT)[0].bool()

    def points(self, points: Tensor) -> Tensor:
        """Points (..., 2) as x and y in pixels."""
        (height, width), (old_height, old_width) = self.after, self.before
        points = points * points.new_tensor([width / old_width, height / old_height])
        if self.flip == "horizontal":
            points = points.new_tensor([width, 0]) + points * points.new_tensor([-1, 1])
        elif self.flip == "vertical":
            points = points.new_tensor([0, height]) + points * points.new_tensor([1, -1])
        return points

    def _apply(self, part: Any, **resizing: Any) -> Tensor:
        part = functional.resize(part, list(self.after), **resizing)
        if self.flip == "horizontal":
            part = functional.horizontal_flip(part)
        elif self.flip == "vertical":
            part = functional.vertical_flip(part)
        return part.as_subclass(Tensor)


@dataclass(frozen=True)
class Augmentation:
    """How an image is changed for training: resized to a random size and flipped at random.

    Attributes:
        sizes: lengths of the shorter edge in pixels to choose from, or the lowest and the highest.
        sampling: "choice" or "range", which of the two ``sizes`` means.
        longest: what the longer edge may have at most, in pixels.
        flip: "horizontal", "vertical" or "none".
    """

    sizes: tuple[int, ...]
    sampling: str
    longest: int
    flip: str

    def __call__(self, height: int, width: int, rng: np.random.Generator) -> Change:
        """The change of an image of this size, by random numbers of ``rng``."""
        if self.sampling == "range":
            shortest = int(rng.integers(self.sizes[0], self.sizes[1] + 1))
        else:
            shortest = self.sizes[rng.integers(len(self.sizes))]
        flipped = rng.random() < 0.5
        after = resized(height, width, shortest, self.longest)
        return Change((height, width), after, self.flip if flipped else "none")


@dataclass(frozen=True)
class Parts:
    """What is learned of an object beside its box and class.

    Attributes:
        masks: whether its mask is.
        keypoints: names of its keypoints.
        visible: whether the box of its visible part is, which is its own box where the file has none.
    """

    masks: bool = False
    keypoints: tuple[str, ...] = ()
    visible: bool = False

    def visible_of(self, objects: Sequence[dict[str, Any]], change: Change) -> Tensor:
        """Boxes (M, 4) of the visible parts of changed annotations."""
        boxes = [a.get("visible_bbox", a["bbox"]) for a in objects]
        return change.boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))

    def masks_of(self, objects: Sequence[dict[str, Any]], change: Change) -> Tensor:
        """Masks (M, H, W), bool, of changed annotations."""
        masks = [change.mask(a["segmentation"]) for a in objects]
        return torch.stack(masks) if masks else torch.zeros(0, *change.after, dtype=torch.bool)

    def keypoints_of(self, objects: Sequence[dict[str, Any]], change: Change) -> Tensor:
        """Keypoints (M, J, 3) of changed annotations: x, y and visibility, all 0 for one that is not in the image."""
        count = len(self.keypoints)
        listed = [a.get("keypoints") or [0] * (3 * count) for a in objects]
        keypoints = torch.tensor(listed, dtype=torch.float32).view(-1, count, 3)
        points = change.points(keypoints[..., :2] + 0.5)  # files count pixels; a pixel's center is half of one further
        height, width = change.after
        seen = ((points >= 0) & (points <= points.new_tensor([width, height]))).all(dim=2) & (keypoints[..., 2] > 0)
        keypoints = torch.cat([points, keypoints[..., 2:]], dim=2) * seen[..., None]
        if change.flip == "horizontal":
            mirrored = list(range(count))
            for left, right in flip_pairs(self.keypoints):
                i, j = self.keypoints.index(left), self.keypoints.index(right)
                mirrored[i], mirrored[j] = j, i
            keypoints = keypoints[:, mirrored]
        return keypoints


class TrainStream(Dataset):
    """The training images by their position in an endless stream: epoch after epoch, each shuffled anew.

    Args:
        records: of the datasets.
        augmentation: changes images and what is annotated on them.
        image_format: "RGB" or "BGR".
        seed: of the order and of the augmentation, not negative.
        parts: what targets have beside boxes (M, 4) and labels (M,).
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        augmentation: Augmentation,
        image_format: str,
        seed: int,
        parts: Parts = Parts(),
    ) -> None:
        self.records = records
        self.augmentation = augmentation
        self.image_format = image_format
        self.seed = seed
        self.parts = parts

    def record(self, position: int) -> dict[str, Any]:
        """The record at a position, from 0."""
        epoch, place = divmod(position, len(self.records))
        return self.records[_order(self.seed, epoch, len(self.records))[place]]

    def __getitem__(self, position: int) -> tuple[Tensor, Target]:
        record = self.record(position)
        image = _read(record, self.image_format)
        objects = [a for a in record["annotations"] if not a["iscrowd"]]
        change = self.augmentation(*image.shape[-2:], augmentation_rng(self.seed, position))
        boxes = change.boxes(torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4))
        target = {"boxes": boxes, "labels": torch.tensor([a["category_id"] for a in objects], dtype=torch.int64)}
        seen = (boxes[:, 2:] - boxes[:, :2] > 1e-5).all(dim=1)
        if self.parts.masks:
            try:
                target["masks"] = self.parts.masks_of(objects, change)
            except (OverflowError, ValueError) as error:
                raise DataError(f"{record['file_name']}: a segmentation cannot be read ({error})") from error
            seen &= target["masks"].flatten(1).any(dim=1)
        if self.parts.keypoints:
            target["keypoints"] = self.parts.keypoints_of(objects, change)
        if self.parts.visible:
            target["visible_boxes"] = self.parts.visible_of(objects, change)
        return change.image(image), {key: value[seen] for key, value in target.items()}


class TrainBatches(Sampler[list[int]]):
    """Positions of the training stream in batches, from an iteration on, without end.

    Args:
        stream: the stream.
        batch_size: images of a batch on one device.
        start: iterations that are done.
        rank, world_size: which device of how many this is; each takes its own batches of the one stream.
        group: put images that are wider than high, and others, into batches of their own, so that less is padded.
    """

    def __init__(
        self,
        stream: TrainStream,
        batch_size: int,
        start: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        group: bool = False,
    ) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.start = start
        self.rank = rank
        self.world_size = world_size
        self.group = group

    def __iter__(self) -> Iterator[list[int]]:
        return islice(self._batches(), self.start * self.world_size + self.rank, None, self.world_size)

    def _batches(self) -> Iterator[list[int]]:
        return grouped(count(), self.batch_size, lambda position: self.group and self._is_wide(position))

    def _is_wide(self, position: int) -> bool:
        record = self.stream.record(position)
        return record["width"] > record["height"]


class EvaluationImages(Dataset):
    """The images of a dataset in their order, resized for evaluation.

    Args:
        split: the dataset.
        shortest, longest: of an image's edges, see :func:`dyhead.data.resized`.
        image_format: "RGB" or "BGR".
    """

    def __init__(self, split: CocoSplit, shortest: int, longest: int, image_format: str) -> None:
        self.split = split
        self.shortest = shortest
        self.longest = longest
        self.image_format = image_format

    def __len__(self) -> int:
        return len(self.split.records)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = _read(self.split.records[index], self.image_format)
        return prepared(image, self.shortest, self.longest), index


class DetectionLoader(DataLoader):
    """A loader of images of different sizes: a batch is a pair of lists.

    A broken image is raised as the :class:`DataError` that names it, also where a worker process found it: there
    it travels as a value, because an exception would come out with the worker's whole traceback for a message.
    """

    def __init__(self, dataset: Dataset, **kwargs) -> None:
        super().__init__(_ErrorsAsValues(dataset), collate_fn=_collate, **kwargs)

    def __iter__(self) -> Iterator[tuple[list[Tensor], list]]:
        for batch in super().__iter__():
            if isinstance(batch, DataError):
                raise batch
            yield batch


class _ErrorsAsValues(Dataset):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except DataError as error:
            return error


def train_loader(
    cfg: CfgNode,
    records: Sequence[dict[str, Any]],
    seed: int,
    start: int = 0,
    *,
    keypoints: Sequence[str] = (),
    rank: int = 0,
    world_size: int = 1,
) -> DetectionLoader:
    """Batches for one device: lists of images uint8 (3, H, W) and of targets, see :class:`TrainStream`.

    Args:
        cfg: the configuration; ``SOLVER.IMS_PER_BATCH`` counts the images on all devices together.
        records: of the datasets.
        seed: of order and augmentation.
        start: iterations that are done.
        keypoints: names of the datasets' keypoints, which ``MODEL.KEYPOINT_ON`` reads.
        rank, world_size: which device of how many this is.

    Raises:
        ConfigError: the batch cannot be divided among the devices.
    """
    if cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH: expected a multiple of the {world_size} devices, got {cfg.SOLVER.IMS_PER_BATCH}"
        )
    augmentation = Augmentation(
        tuple(cfg.INPUT.MIN_SIZE_TRAIN),
        cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
        cfg.INPUT.MAX_SIZE_TRAIN,
        cfg.INPUT.RANDOM_FLIP,
    )
    parts = Parts(
        cfg.MODEL.MASK_ON, tuple(keypoints) if cfg.MODEL.KEYPOINT_ON else (), visible=reads_visible_boxes(cfg)
    )
    stream = TrainStream(records, augmentation, cfg.INPUT.FORMAT, seed, parts)
    batches = TrainBatches(
        stream,
        cfg.SOLVER.IMS_PER_BATCH // world_size,
        start,
        rank=rank,
        world_size=world_size,
        group=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
    )
    return DetectionLoader(stream, batch_sampler=batches, **_loader_options(cfg))


def evaluation_loader(cfg: CfgNode, split: CocoSplit, *, rank: int = 0, world_size: int = 1) -> DetectionLoader:
    """Every ``world_size``-th image of a dataset by itself: lists of one image uint8 (3, H, W) and its index."""
    dataset = EvaluationImages(split, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT)
    return DetectionLoader(dataset, sampler=range(rank, len(dataset), world_size), **_loader_options(cfg))


def _loader_options(cfg: CfgNode) -> dict[str, Any]:
    return {
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "pin_memory": cfg.MODEL.DEVICE.startswith("cuda"),
        "worker_init_fn": leave_to_main_process,
    }


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return order_rng(seed, epoch).permutation(n)


def _read(record: dict[str, Any], image_format: str) -> Tensor:
    image = data.read_image(record["file_name"], image_format, size=(record["height"], record["width"]))
    return torch.from_numpy(image).permute(2, 0, 1)


def _collate(samples: list) -> tuple[list[Tensor], list] | DataError:
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    images, others = zip(*samples, strict=True)
    return list(images), list(others)
