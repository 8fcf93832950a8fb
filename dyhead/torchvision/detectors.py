"""The detectors by the name of their meta-architecture."""

from __future__ import annotations

from fvcore.common.config import CfgNode
from torch import nn

from dyhead.config import TWO_STAGE, ConfigError
from dyhead.torchvision.config import check_values
from dyhead.torchvision.dense import build_dense
from dyhead.torchvision.rcnn import build_faster_rcnn


def build_model(cfg: CfgNode) -> nn.Module:
    """The detector of ``MODEL.META_ARCHITECTURE`` with random weights, on the CPU, in training mode.

    It follows torchvision's interface: in training ``model(images, targets)`` gives losses by name, in evaluation
    ``model(images)`` gives for each image boxes (M, 4) as x0, y0, x1, y1 in its pixels, scores and labels (M,).
    With ``MODEL.MASK_ON`` targets have masks (M, H, W) bool, and detections masks (M, S, S), the probabilities of the
    cells of their boxes, which :func:`dyhead.detection.roi.masks.paste_masks` brings onto an image of any size. With
    ``MODEL.KEYPOINT_ON`` both have keypoints (M, J, 3): x and y in pixels, and the visibility (0: not annotated) or
    the score.
    Images are (3, H, W), values 0 to 255 in the channel order of ``INPUT.FORMAT``; labels are 0 to K - 1.

    Raises:
        ConfigError: a value that is not supported, or values that do not fit each other.
    """
    check_values(cfg)
    try:
        return (build_faster_rcnn if cfg.MODEL.META_ARCHITECTURE == TWO_STAGE else build_dense)(cfg)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{cfg.MODEL.META_ARCHITECTURE} cannot be built as configured: {error}") from error
