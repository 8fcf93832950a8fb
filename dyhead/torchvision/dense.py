"""The one-stage detectors, FCOS and RetinaNet: torchvision's, with the predictors directly on DyHead's unified branch.

N batch, A anchors a place, K classes, H, W height and width of a level, R anchors of all levels (sum of H*W*A),
P positive anchors of all pictures.
"""

from __future__ import annotations

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder, Matcher
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from dyhead.layers import DensePredictor
from dyhead.torchvision.anchors import PyramidAnchors
from dyhead.torchvision.backbone import build_pyramid
from dyhead.torchvision.config import iou_thresholds
from dyhead.torchvision.losses import average_over_devices, box_loss
from dyhead.torchvision.normalization import Normalization


class DenseHead(nn.Module):
    """Class logits and box deltas of all anchors, and what their classes cost.

    Everything behind the predictor is computed in float32: positions of hundreds of pixels do not fit half types.

    Args:
        predictor: its convolutions.
        alpha: weight of the positives in the focal loss (Lin et al., ICCV 2017), or -1 for none.
        gamma: exponent of the focal loss.
    """

    def __init__(self, predictor: DensePredictor, alpha: float, gamma: float) -> None:
        super().__init__()
        self.predictor = predictor
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, levels: list[Tensor]) -> dict[str, Tensor]:
        """Levels (N, C, H, W) to cls_logits (N, R, K), bbox_regression (N, R, 4) and maybe bbox_ctrness (N, R, 1)."""
        predictions = self.predictor(levels)
        anchors = predictions[0][1].shape[1] // 4
        names = ("cls_logits", "bbox_regression", "bbox_ctrness")
        return {
            name: torch.cat([_by_anchor(level, anchors) for level in kind], dim=1)
            for name, kind in zip(names, zip(*predictions, strict=True), strict=True)
            if kind[0] is not None
        }

    def focal_loss(self, logits: Tensor, positive: Tensor, classes: Tensor) -> Tensor:
        """Sum of the focal losses.

        Args:
            logits: (..., K).
            positive: bool (...), where an anchor has a class; elsewhere it is background.
            classes: (P,) of the positives.
        """
        truth = torch.zeros_like(logits)
        truth[positive, classes] = 1
        return sigmoid_focal_loss(logits, truth, self.alpha, self.gamma, reduction="sum")


class FCOSHead(DenseHead):
    """What :class:`torchvision.models.detection.FCOS` asks of its head (Tian et al., "FCOS", ICCV 2019).

    Boxes are predicted as distances to the four sides, in strides.
    """

    box_coder = BoxLinearCoder(normalize_by_size=True)

    def forward(self, levels: list[Tensor]) -> dict[str, Tensor]:
        """As in :class:`DenseHead`; the distances are not negative."""
        outputs = super().forward(levels)
        return outputs | {"bbox_regression": F.relu(outputs["bbox_regression"])}

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Focal loss, generalised IoU loss and binary cross-entropy of the centre-ness, all per positive anchor.

        Args:
            targets: for each picture boxes (M, 4) in pixels and labels (M,).
            head_outputs: of :meth:`forward`.
            anchors: for each picture (R, 4) in pixels.
            matched_idxs: for each picture (R,) the index of the anchor's box, negative for background.
        """
        positive, boxes, classes = _positives(targets, matched_idxs)
        logits, deltas, centreness = (head_outputs[k] for k in ("cls_logits", "bbox_regression", "bbox_ctrness"))
        places = torch.stack(anchors)[positive]
        sides = self.box_coder.encode(places, boxes)
        ratios = [sides[:, pair].amin(dim=1) / sides[:, pair].amax(dim=1) for pair in ([0, 2], [1, 3])]
        truth = torch.sqrt(ratios[0] * ratios[1])
        count = average_over_devices(len(boxes), logits.device)
        loss_loc = generalized_box_iou_loss(self.box_coder.decode(deltas[positive], places), boxes, reduction="sum")
        loss_ctr = F.binary_cross_entropy_with_logits(centreness[positive].squeeze(1), truth, reduction="sum")
        return {
            "loss_fcos_cls": self.focal_loss(logits, positive, classes) / count,
            "loss_fcos_loc": loss_loc / count,
            "loss_fcos_ctr": loss_ctr / count,
        }


class RetinaNetHead(DenseHead):
    """What :class:`torchvision.models.detection.RetinaNet` asks of its head (Lin et al., "Focal Loss", ICCV 2017).

    Args:
        predictor, alpha, gamma: as in :class:`DenseHead`.
        box_coder: encodes and decodes boxes.
        loss_type: what :func:`box_loss` calls kind.
        beta: of smooth L1.
    """

    def __init__(
        self, predictor: DensePredictor, alpha: float, gamma: float, box_coder: BoxCoder, loss_type: str, beta: float
    ) -> None:
        super().__init__(predictor, alpha, gamma)
        self.box_coder = box_coder
        self.loss_type = loss_type
        self.beta = beta

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Focal loss and box loss per positive anchor; arguments as in :meth:`FCOSHead.compute_loss`.

        Anchors between the thresholds (-2 in ``matched_idxs``) cost nothing.
        """
        positive, boxes, classes = _positives(targets, matched_idxs)
        valid = torch.stack(matched_idxs) != Matcher.BETWEEN_THRESHOLDS
        logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]
        count = average_over_devices(len(boxes), logits.device)
        loss_box = box_loss(
            self.loss_type, self.box_coder, deltas[positive], torch.stack(anchors)[positive], boxes, self.beta
        )
        return {
            "loss_cls": self.focal_loss(logits[valid], positive[valid], classes) / count,
            "loss_box_reg": loss_box / count,
        }


def build_fcos(cfg: CfgNode) -> FCOS:
    """torchvision's FCOS with DyHead, of ``MODEL.FCOS``; labels 0 to K - 1."""
    options = cfg.MODEL.FCOS
    pyramid = build_pyramid(cfg, options.IN_FEATURES)
    strides = list(pyramid.strides.values())
    predictor = DensePredictor(pyramid.out_channels, options.NUM_CLASSES, quality=True, prior_prob=options.PRIOR_PROB)
    model = FCOS(
        pyramid,
        options.NUM_CLASSES,
        # One anchor a place, as large as the stride: torchvision measures distances in it.
        anchor_generator=PyramidAnchors([[stride] for stride in strides], [[1.0]], strides, offset=0.5),
        head=FCOSHead(predictor, options.FOCAL_LOSS_ALPHA, options.FOCAL_LOSS_GAMMA),
        center_sampling_radius=options.CENTER_SAMPLING_RADIUS,
        score_thresh=options.SCORE_THRESH_TEST,
        nms_thresh=options.NMS_THRESH_TEST,
        topk_candidates=options.TOPK_CANDIDATES_TEST,
        detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
    model.transform = Normalization(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    return model


def build_retinanet(cfg: CfgNode) -> RetinaNet:
    """torchvision's RetinaNet with DyHead, of ``MODEL.RETINANET`` and ``ANCHOR_GENERATOR``; labels 0 to K - 1."""
    options, anchors = cfg.MODEL.RETINANET, cfg.MODEL.ANCHOR_GENERATOR
    pyramid = build_pyramid(cfg, options.IN_FEATURES)
    generator = PyramidAnchors(anchors.SIZES, anchors.ASPECT_RATIOS, list(pyramid.strides.values()), anchors.OFFSET)
    predictor = DensePredictor(
        pyramid.out_channels,
        options.NUM_CLASSES,
        generator.num_anchors_per_location()[0],
        prior_prob=options.PRIOR_PROB,
    )
    low, high = iou_thresholds(cfg, "MODEL.RETINANET")
    coder = BoxCoder(tuple(options.BBOX_REG_WEIGHTS))
    model = RetinaNet(
        pyramid,
        options.NUM_CLASSES,
        anchor_generator=generator,
        head=RetinaNetHead(
            predictor,
            options.FOCAL_LOSS_ALPHA,
            options.FOCAL_LOSS_GAMMA,
            coder,
            options.BBOX_REG_LOSS_TYPE,
            options.SMOOTH_L1_LOSS_BETA,
        ),
        proposal_matcher=Matcher(high, low, allow_low_quality_matches=True),
        score_thresh=options.SCORE_THRESH_TEST,
        nms_thresh=options.NMS_THRESH_TEST,
        topk_candidates=options.TOPK_CANDIDATES_TEST,
        detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
    model.box_coder = coder
    model.transform = Normalization(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    return model


def _by_anchor(level: Tensor, anchors: int) -> Tensor:
    """(N, A*X, H, W) to (N, H*W*A, X) in float32."""
    n, channels, h, w = level.shape
    split = level.float().view(n, anchors, channels // anchors, h, w)
    return split.permute(0, 3, 4, 1, 2).reshape(n, h * w * anchors, -1)


def _positives(targets: list[dict[str, Tensor]], matched_idxs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The positive anchors of all pictures: where they are (N, R), their boxes (P, 4) and classes (P,)."""
    boxes = torch.cat([t["boxes"][matched[matched >= 0]] for t, matched in zip(targets, matched_idxs, strict=True)])
    classes = torch.cat([t["labels"][matched[matched >= 0]] for t, matched in zip(targets, matched_idxs, strict=True)])
    return torch.stack(matched_idxs) >= 0, boxes, classes
