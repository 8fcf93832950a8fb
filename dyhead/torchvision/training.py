"""The detector as lightning trains and evaluates it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from dyhead.config import ConfigError
from dyhead.data import CocoSplit
from dyhead.evaluation import evaluate_coco
from dyhead.torchvision.data import DetectionLoader, Target, train_loader
from dyhead.torchvision.solver import build_optimizer, clip_gradients, learning_rate_factor

_SAMPLING = 2  # random numbers of the model, apart from those of the data


class DivergedError(ConfigError, FloatingPointError):
    """A loss became infinite or NaN. The message names the iteration and the losses."""


class Training(L.LightningModule):
    """A detector with its optimizer, its data and its evaluation.

    Its state dict is the detector's. All random numbers in an iteration depend on the seed, the iteration and the
    device only, so that a run that is resumed goes on as the uninterrupted run would.

    Args:
        cfg: the configuration.
        model: the detector, see :func:`dyhead.torchvision.detectors.build_model`.
        records: pictures to train on, none for evaluation.
        splits: data sets to evaluate on.
        seed: not negative.
        start: iterations that are done.

    Attributes:
        losses: of the last iteration by name, the mean over devices, with their sum as total_loss.
        results: the last evaluation's metrics by data set, on the first device; empty elsewhere.
        detections: its COCO result dicts by data set, likewise.
        evaluated_at: iterations that were done then, None before the first evaluation.
    """

    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        records: Sequence[dict[str, Any]],
        splits: Sequence[CocoSplit],
        seed: int,
        start: int = 0,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = model
        self.records = records
        self.splits = splits
        self.seed = seed
        self.start = start
        self.losses: dict[str, float] = {}
        self.results: dict[str, dict[str, float]] = {}
        self.detections: dict[str, list[dict[str, Any]]] = {}
        self.evaluated_at: int | None = None
        self._found: dict[str, list[dict[str, Any]]] = {}
        self._base_lrs: list[float] = []
        self._lr_factor: Callable[[int], float] | None = None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The detector's."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Into the detector."""
        return self.model.load_state_dict(state_dict, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a resumed run must agree in."""
        checkpoint["dyhead"] = {"seed": self.seed, "optimizer": self.cfg.SOLVER.OPTIMIZER}

    def train_dataloader(self) -> DetectionLoader:
        """Batches from the iteration that comes next."""
        self.seed = self.trainer.strategy.broadcast(self.seed)  # machines may have drawn different ones
        return train_loader(
            self.cfg, self.records, self.seed, self.start, rank=self.global_rank, world_size=self.trainer.world_size
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer; its learning rates are set in every iteration."""
        optimizer = build_optimizer(self.cfg, self.model)
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._lr_factor = learning_rate_factor(self.cfg)
        return optimizer

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        """As ``SOLVER.CLIP_GRADIENTS`` says."""
        clip_gradients(self.cfg, [p for group in optimizer.param_groups for p in group["params"]])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set what depends on the iteration: learning rates and random numbers."""
        iteration = self.trainer.global_step
        for group, lr in zip(self.optimizers().param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * self._lr_factor(iteration)
        entropy = np.random.SeedSequence([_SAMPLING, self.seed, iteration, self.global_rank])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))

    def training_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> Tensor:
        """The sum of the losses.

        Raises:
            DivergedError: one of them is infinite or NaN, on any device.
        """
        losses = self.model(*batch)
        total = sum(losses.values())
        values = torch.stack([*losses.values(), total]).detach().float()
        values = self.trainer.strategy.reduce(values, reduce_op="mean").tolist()
        self.losses = dict(zip([*losses, "total_loss"], values, strict=True))
        if not all(map(math.isfinite, values)):
            listed = ", ".join(f"{name} {value:g}" for name, value in self.losses.items())
            raise DivergedError(
                f"iteration {self.trainer.global_step}: the loss is infinite or NaN ({listed}). "
                "Lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS or set SOLVER.CLIP_GRADIENTS.ENABLED True; "
                "--resume goes on from the last checkpoint"
            )
        return total

    def on_validation_epoch_start(self) -> None:
        """Forget the last evaluation."""
        self._found = {split.info.name: [] for split in self.splits}

    def validation_step(self, batch: tuple[list[Tensor], list[int]], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect the detections in some pictures, in float32 as Detectron2 does."""
        images, indices = batch
        split = self.splits[dataloader_idx]
        with torch.autocast(self.device.type, enabled=False):
            found = self.model(images)
        for image, index, detections in zip(images, indices, found, strict=True):
            self._found[split.info.name] += coco_results(split, index, image.shape[-2:], detections)

    def on_validation_epoch_end(self) -> None:
        """Gather the detections of all devices and compute the metrics."""
        parts = [self._found]
        if self.trainer.world_size > 1:
            parts = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, self._found)
        self._found = {}
        self.evaluated_at = self.trainer.global_step
        if self.trainer.is_global_zero:
            names = [split.info.name for split in self.splits]
            self.detections = {name: [d for part in parts for d in part[name]] for name in names}
            self.results = {
                split.info.name: evaluate_coco(split.info, self.detections[split.info.name]) for split in self.splits
            }


def coco_results(
    split: CocoSplit, index: int, size: Sequence[int], detections: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """COCO's result dicts of one picture.

    Args:
        split: its data set.
        index: its place there.
        size: height and width of the picture that the model saw, in pixels.
        detections: boxes (M, 4) as x0, y0, x1, y1 in those pixels, scores and labels (M,).
    """
    record = split.records[index]
    scale = torch.tensor([record["width"] / size[1], record["height"] / size[0]] * 2)
    boxes = detections["boxes"].cpu() * scale
    boxes[:, 2:] -= boxes[:, :2]
    columns = zip(boxes.tolist(), detections["labels"].tolist(), detections["scores"].tolist(), strict=True)
    return [
        {"image_id": record["image_id"], "category_id": split.category_ids[label], "bbox": box, "score": score}
        for box, label, score in columns
        if box[2] > 0 and box[3] > 0
    ]
