"""The region proposal network. N batch, A anchors of a cell, R anchors of an image, X = 4 numbers of an anchor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork

from dyhead.detection.boxes import Deltas
from dyhead.torchvision.rcnn.boxes import BoxCoder


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's region proposal network on some levels of the pyramid, with the losses of the configuration.

    Args:
        levels: names of the levels it works on.
        box_form: what the deltas mean, and what they cost.
        loss_weights: of the objectness and of the boxes.
        args, kwargs: torchvision's.
    """

    def __init__(
        self,
        *args,
        levels: Sequence[str],
        box_form: Deltas,
        loss_weights: tuple[float, float],
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.levels = tuple(levels)
        self.box_form = box_form
        self.box_coder = BoxCoder(box_form)
        self.loss_weights = loss_weights

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals of each image (x0, y0, x1, y1 in pixels), and in training the losses by Detectron2's names."""
        levels = [features[name] for name in self.levels]
        logits, deltas = self.head(levels)
        anchors = self.anchor_generator(images, levels)
        counts = [level[0].numel() for level in logits]
        # (N, A*X, H, W) to (N, H*W*A, X), in float32: positions in pixels do not fit half types.
        logits = torch.cat([x.float().permute(0, 2, 3, 1).flatten(1) for x in logits], dim=1)
        deltas = torch.cat([x.float().permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in deltas], dim=1)
        boxes = self.box_coder.decode(deltas.detach().reshape(-1, 4), anchors).view(len(deltas), -1, 4)
        proposals, _ = self.filter_proposals(boxes, logits.detach(), images.image_sizes, counts)
        if not self.training:
            return proposals, {}
        labels, matched = self.assign_targets_to_anchors(anchors, targets)
        return proposals, self.compute_losses(logits, deltas, anchors, labels, matched)

    def compute_losses(
        self, logits: Tensor, deltas: Tensor, anchors: list[Tensor], labels: list[Tensor], matched: list[Tensor]
    ) -> dict[str, Tensor]:
        """Losses of a random sample of the anchors, by the size that the sample should have.

        Args:
            logits: objectness (N, R).
            deltas: (N, R, 4).
            anchors: for each image (R, 4) in pixels.
            labels: for each image (R,): 1 object, 0 background, -1 ignored.
            matched: for each image the box (R, 4) that each anchor is compared with.
        """
        positive, negative = (torch.stack(chosen).bool() for chosen in self.fg_bg_sampler(labels))
        sample = positive | negative
        count = len(labels) * self.fg_bg_sampler.batch_size_per_image
        loss_cls = F.binary_cross_entropy_with_logits(logits[sample], torch.stack(labels)[sample], reduction="sum")
        loss_loc = self.box_form.loss(
            deltas[positive], torch.stack(anchors)[positive], torch.stack(matched)[positive]
        ).sum()
        weight_cls, weight_loc = self.loss_weights
        return {"loss_rpn_cls": weight_cls * loss_cls / count, "loss_rpn_loc": weight_loc * loss_loc / count}
