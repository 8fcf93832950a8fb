"""Detectron2's trainer with what the configuration adds to it: datasets, optimizer, checkpoints, devices."""

from __future__ import annotations

import contextlib
import io
import os
import time
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, create_ddp_model
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.utils import comm
from torch import nn

from dyhead.config import ConfigError
from dyhead.data.coco import area, is_crowd
from dyhead.detectron2.checkpoint import Checkpointer
from dyhead.detectron2.datasets import NamingMapper
from dyhead.detectron2.solver import build_lr_scheduler, build_optimizer


class Trainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` for the detectors of this package; it also runs on CPUs, in several processes.

    The differences: ``SOLVER.OPTIMIZER``; COCO's evaluation, by pycocotools, of every dataset of ``DATASETS.TEST``;
    an image that cannot be read is named; a checkpoint that does not fit is an error on ``--resume``; on a CPU
    ``SOLVER.AMP`` is bfloat16.

    Args:
        cfg: Detectron2's config with :func:`dyhead.config.add_dyhead_config`; the datasets are registered.

    Raises:
        ConfigError: the model or the optimizer cannot be built from the config.

    Example:
        >>> trainer = Trainer(cfg)                                              # doctest: +SKIP
        >>> trainer.resume_or_load(resume=False)                                # doctest: +SKIP
        >>> trainer.train()                                                     # doctest: +SKIP
    """

    def __init__(self, cfg: CfgNode) -> None:
        # What DefaultTrainer.__init__ does, with another DistributedDataParallel, another AMP and another checkpointer.
        super(DefaultTrainer, self).__init__()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=None if cpu else [comm.get_local_rank()])
        mixed = BFloat16Trainer if cpu else AMPTrainer
        self._trainer = (mixed if cfg.SOLVER.AMP.ENABLED else SimpleTrainer)(model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def train(self) -> dict[str, Any]:
        """Train and evaluate; returns the last evaluation's results, in the main process."""
        super().train()
        return self._last_eval_results

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state; :class:`ConfigError` if it is another optimizer's."""
        saved, ours = (o["param_groups"][0] for o in (state_dict["_trainer"]["optimizer"], self.optimizer.state_dict()))
        if ("betas" in saved) != ("betas" in ours):
            theirs = "ADAMW" if "betas" in saved else "SGD"
            raise ConfigError(
                f"SOLVER.OPTIMIZER: expected {theirs!r}, with which it was trained, got {self.cfg.SOLVER.OPTIMIZER!r}"
            )
        super().load_state_dict(state_dict)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model that the config describes, on ``MODEL.DEVICE``, with random weights."""
        if cfg.MODEL.BACKBONE.NAME not in BACKBONE_REGISTRY:
            known = ", ".join(sorted(name for name, _ in BACKBONE_REGISTRY))
            raise ConfigError(f"MODEL.BACKBONE.NAME: expected one of {known}, got {cfg.MODEL.BACKBONE.NAME!r}")
        try:
            return super().build_model(cfg)
        except ConfigError:
            raise
        except (AssertionError, KeyError, ValueError) as error:
            raise ConfigError(f"the model cannot be built from this config: {type(error).__name__}: {error}") from error

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`dyhead.detectron2.solver.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """See :func:`dyhead.detectron2.solver.build_lr_scheduler`."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Detectron2's loader of ``DATASETS.TRAIN``."""
        return build_detection_train_loader(cfg, mapper=NamingMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Detectron2's loader of a test set."""
        return build_detection_test_loader(cfg, dataset_name, mapper=NamingMapper(cfg, is_train=False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """COCO's evaluation; the detections go to ``OUTPUT_DIR/inference/<dataset>/coco_instances_results.json``."""
        return CompletingCocoEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name))


class CompletingCocoEvaluator(COCOEvaluator):
    """Detectron2's ``COCOEvaluator`` on pycocotools itself, for any annotation file that :mod:`dyhead.data` takes.

    pycocotools wants ``area`` and ``iscrowd``, which files other than COCO's own often lack, and takes an object of
    id 0 for "no match"; they are completed and numbered anew in memory.
    """

    def __init__(self, dataset_name: str, **kwargs: Any) -> None:
        super().__init__(dataset_name, use_fast_impl=False, **kwargs)
        for number, annotation in enumerate(self._coco_api.dataset.get("annotations", ()), 1):
            annotation["id"] = number
            annotation["iscrowd"] = is_crowd(annotation)
            annotation["area"] = area(annotation)
        with contextlib.redirect_stdout(io.StringIO()):
            self._coco_api.createIndex()


class BFloat16Trainer(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` with the forward pass under bfloat16 autocast of the CPU.

    Detectron2's ``AMPTrainer`` needs CUDA. Bfloat16 has float32's range, so that no gradient scaling is needed.
    """

    def run_step(self) -> None:
        """One iteration."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with torch.autocast("cpu", torch.bfloat16):
            losses = self.model(data)
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.optimizer.step()
