"""Pictures of results: predictions beside the ground truth, and loss curves."""

import os
from collections.abc import Iterable
from typing import Any

from dyhead.data.coco import CocoSplit


def draw_predictions(
    split: CocoSplit,
    detections: Iterable[dict[str, Any]],
    png_path: str | os.PathLike,
    *,
    count: int = 8,
    score_threshold: float = 0.3,
) -> None:
    """Draws some pictures of a data set in pairs, ground truth left, predictions right.

    Args:
        split: the data set; `count` pictures are taken, evenly spread over it.
        detections: COCO's result dicts, as for `evaluate_coco`; those of other pictures are ignored.
        png_path: file to write.
        score_threshold: detections below are not drawn.
    """
    raise NotImplementedError


def plot_losses(metrics_json: str | os.PathLike, png_path: str | os.PathLike) -> None:
    """Plots the losses in a metrics.json (one JSON dict a line, with iteration, total_loss, loss_*) over iterations.

    Raises:
        ValueError: the file holds no losses.
    """
    raise NotImplementedError
