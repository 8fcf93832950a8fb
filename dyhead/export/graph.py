"""A trained detector as one graph from a batch of images to tensors of fixed shapes, which every runtime takes.

N batch, H, W height and width of the images, R places, K classes, D detections of an image, P candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from dyhead.config import ConfigError
from dyhead.detection import DenseDetector
from dyhead.detection.detector import are_peaks
from dyhead.detection.paired_box import PairedDetector

#: What a graph's outputs are: their names, and what they mean.
OUTPUTS = {
    "detections": "boxes (N, D, 4), scores (N, D) and labels (N, D) after NMS, best first; label -1: none",
    "boxes": "boxes (N, R, 4) and scores (N, R, K) of all places, for an NMS of one's own",
    "levels": "the levels of the pyramid (N, C, H_l, W_l), fine to coarse",
}


class DetectorGraph(nn.Module):
    """From images to what ``output`` says.

    Images are (N, 3, H, W), float32, values 0 to 255 in the channel order of ``INPUT.FORMAT``, in the size that the
    network is to see. Boxes are x0, y0, x1, y1 in their pixels. The graph normalizes images and pads them itself.

    Args:
        model: a detector of either engine.
        output: one of :data:`OUTPUTS`.
        onnx: whether it is for ONNX, which has an NMS of its own.

    Attributes:
        names: of the outputs.
        multiple: heights and widths are padded to multiples of it, in pixels.
        coarsest_stride: of the pyramid, in pixels of the images.

    Raises:
        ConfigError: the detector has no such output.
    """

    def __init__(self, model: nn.Module, output: str = "detections", *, onnx: bool = False) -> None:
        super().__init__()
        if output not in OUTPUTS:
            raise ConfigError(f"output: expected one of {', '.join(OUTPUTS)}, got {output!r}")
        mean, std, self.multiple = _normalization(model)
        self.register_buffer("mean", mean.detach().clone().reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", std.detach().clone().reshape(3, 1, 1), persistent=False)
        self.backbone = model.backbone
        self.detector = None if output == "levels" else _dense(model, output)
        self.output = output
        self.onnx = onnx
        strides = _strides(self.backbone)
        self.coarsest_stride = max(strides.values())
        self.names = {"detections": ("boxes", "scores", "labels"), "boxes": ("boxes", "scores")}.get(output)
        if output == "levels":
            self.names = tuple(strides)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in the order of :attr:`names`."""
        size = images.shape[-2:]
        pyramid = self.backbone(self.prepare(images))
        if self.output == "levels":
            return tuple(pyramid[name] for name in self.names)
        predictions = self.detector(pyramid)
        if self.output == "boxes":
            return _boxes(self.detector, predictions)
        return _detections(self.detector, predictions, size, _keep_by_onnx if self.onnx else _keep_by_torchvision)

    def prepare(self, images: Tensor) -> Tensor:
        """Images as the network sees them: normalized, then padded with zeros at the right and the bottom."""
        height, width = images.shape[-2:]
        padding = (0, -width % self.multiple, 0, -height % self.multiple)
        return F.pad((images - self.mean) / self.std, padding)


def _normalization(model: nn.Module) -> tuple[Tensor, Tensor, int]:
    """Mean and deviation of the channels, and what heights and widths are padded to multiples of."""
    if hasattr(model, "pixel_mean"):  # Detectron2's
        if model.backbone.padding_constraints.get("square_size"):
            raise ConfigError("MODEL.BACKBONE: a network that wants square images cannot be exported")
        return model.pixel_mean, model.pixel_std, max(model.backbone.size_divisibility, 1)
    transform = model.transform
    return torch.tensor(transform.image_mean), torch.tensor(transform.image_std), transform.size_divisible


def _strides(backbone: nn.Module) -> dict[str, int]:
    """Of the levels by name, fine to coarse, in pixels of the image."""
    if hasattr(backbone, "strides"):
        return dict(backbone.strides)
    return {name: shape.stride for name, shape in backbone.output_shape().items()}  # Detectron2's


def _dense(model: nn.Module, output: str) -> DenseDetector:
    detector = getattr(model, "detector", None)
    if not isinstance(detector, DenseDetector) or isinstance(detector, PairedDetector):
        raise ConfigError(
            f"{type(model).__name__}: only detectors of one stage have the output {output!r}; "
            "of this one 'levels' can be exported"
        )
    return detector


def _scores(detector: DenseDetector, predictions: Any) -> list[Tensor]:
    """Three times (N, R, K): compared with the threshold, ranked by, and reported."""
    parts = (predictions.logits, predictions.quality, predictions.refined_logits)
    batch, places = predictions.logits.shape[:2]
    flat = [None if part is None else part.flatten(0, 1) for part in parts]
    return [each.unflatten(0, (batch, places)) for each in detector.score(*flat)]


def _decode(detector: DenseDetector, numbers: Tensor, anchors: Tensor) -> Tensor:
    """Boxes (N, P, 4) from numbers (N, P, X) and anchors (N, P, 4)."""
    boxes = detector.box_form.decode(numbers.flatten(0, 1), anchors.flatten(0, 1))
    return boxes.unflatten(0, numbers.shape[:2])


def _boxes(detector: DenseDetector, predictions: Any) -> tuple[Tensor, Tensor]:
    places = detector.places(predictions)
    numbers = predictions.boxes
    boxes = _decode(detector, numbers, places.anchors.expand(numbers.shape[0], -1, -1))
    _, ranked, scores = _scores(detector, predictions)
    if detector.inference.peak_kernel > 1:
        levels = zip(ranked.split(places.counts, dim=1), predictions.shapes, strict=True)
        peaks = [are_peaks(level, shape, detector.inference.peak_kernel) for level, shape in levels]
        scores = torch.where(torch.cat(peaks, dim=1), scores, 0)
    return boxes, scores


def _detections(
    detector: DenseDetector, predictions: Any, size: tuple[int, int], keep: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """What :meth:`dyhead.detection.DenseDetector.detections` finds, in fixed shapes: what is none has a score of -1."""
    options, places = detector.inference, detector.places(predictions)
    thresholded, ranked, score = _scores(detector, predictions)
    chosen = (thresholded > options.score_thresh) & ~score.isnan()
    classes = score.shape[2]
    found, first = [], 0
    for count, shape in zip(places.counts, predictions.shapes, strict=True):
        level = slice(first, first + count)
        first += count
        passes = chosen[:, level]
        if options.peak_kernel > 1:
            passes = passes & are_peaks(ranked[:, level], shape, options.peak_kernel)
        rank = torch.where(passes, ranked[:, level], -1).flatten(1)
        wanted = options.topk
        if isinstance(count, int):
            wanted = min(wanted, count * classes)
        else:
            rank = F.pad(rank, (0, wanted), value=-1.0)  # as many as are wanted, whatever the size
        rank, index = rank.topk(wanted)
        place, label = (index // classes).clamp(max=count - 1), index % classes
        numbers = predictions.boxes[:, level]
        numbers = numbers.gather(1, place[:, :, None].expand(-1, -1, numbers.shape[2]))
        boxes = _decode(detector, numbers, places.anchors[level][place])
        of_level = score[:, level].flatten(1).gather(1, index.clamp(max=count * classes - 1))
        there = (rank > -1) & ~boxes.isnan().any(dim=2)
        # No arithmetic on what is none: NaN would go on to all boxes.
        found.append((torch.where(there[:, :, None], boxes, 0), torch.where(there, of_level, -1), label))
    boxes, scores, labels = (torch.cat(column, dim=1) for column in zip(*found, strict=True))
    if options.clip_before_nms:
        boxes, scores = _inside(boxes, scores, size)
    if options.nms_thresh < 1:
        kept = keep(boxes, scores, labels, classes, options.nms_thresh, options.limit)
        flat = scores.flatten()
        scores = torch.full_like(flat, -1).index_put((kept,), flat[kept]).view(scores.shape)
    scores, best = scores.topk(min(options.limit, scores.shape[1]))
    boxes, labels = boxes.gather(1, best[:, :, None].expand(-1, -1, 4)), labels.gather(1, best)
    boxes, scores = _inside(boxes, scores, size)
    there = scores > -1
    return (
        torch.where(there[:, :, None], boxes, 0),
        scores.clamp(min=0),
        torch.where(there, labels, -1),
    )


def _inside(boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Boxes cut to an image of this (height, width); those of which nothing is left have a score of -1."""
    height, width = size
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    boxes = torch.stack([x, y], dim=-1).flatten(-2)
    left = (x[..., 1] > x[..., 0]) & (y[..., 1] > y[..., 0])
    return boxes, torch.where(left, scores, -1)


def _keep_by_torchvision(
    boxes: Tensor, scores: Tensor, labels: Tensor, classes: int, threshold: float, limit: int
) -> Tensor:
    """The numbers n * P + p of the boxes (N, P, 4) with scores above 0 that NMS keeps among those of their label."""
    there = torch.nonzero(scores.flatten() > 0).squeeze(1)
    image = torch.arange(scores.shape[0], device=labels.device)[:, None]
    group = (image * classes + labels).flatten()[there]
    # Groups lie apart; float64 moves boxes without rounding them.
    apart = 1 + 2 * boxes.abs().amax().double()
    moved = boxes.double().flatten(0, 1)[there] + group[:, None] * apart
    return there[nms(moved, scores.flatten()[there].double(), threshold)]


def _keep_by_onnx(boxes: Tensor, scores: Tensor, labels: Tensor, classes: int, threshold: float, limit: int) -> Tensor:
    """The same, at most ``limit`` of a label."""
    of_class = labels[:, None] == torch.arange(classes, device=labels.device)[:, None]
    kept = select_boxes(boxes, torch.where(of_class, scores[:, None], -1), limit, threshold)
    return kept[:, 0] * scores.shape[1] + kept[:, 2]


@torch.library.custom_op("dyhead::select_boxes", mutates_args=())
def select_boxes(boxes: Tensor, scores: Tensor, limit: int, threshold: float) -> Tensor:
    """ONNX's NonMaxSuppression of boxes (N, P, 4) with scores (N, K, P) above 0: (M, 3) of image, class and box."""
    found = []
    for image, of_image in enumerate(scores):
        for label, of_class in enumerate(of_image):
            (there,) = torch.nonzero(of_class > 0, as_tuple=True)
            kept = there[nms(boxes[image][there], of_class[there], threshold)][:limit]
            found.append(torch.stack([torch.full_like(kept, image), torch.full_like(kept, label), kept], dim=1))
    return torch.cat(found)


@select_boxes.register_fake
def _select_boxes_fake(boxes: Tensor, scores: Tensor, limit: int, threshold: float) -> Tensor:
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(), 3), dtype=torch.int64)
