"""Detectron2's trainer with what the configuration adds to it: datasets, optimizer, checkpoints, devices."""

from __future__ import annotations

import logging
import os
import time
import weakref
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, SimpleTrainer, create_ddp_model, hooks
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, TensorboardXWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dyhead.config import ConfigError
from dyhead.data import DataError
from dyhead.detectron2.augmentation import with_augmentation
from dyhead.detectron2.checkpoint import Checkpointer
from dyhead.detectron2.datasets import evaluation_loader
from dyhead.detectron2.deform_conv import use_own_deform_conv
from dyhead.detectron2.evaluation import InstanceEvaluator, build_evaluator, defined
from dyhead.detectron2.schedule import build_lr_scheduler
from dyhead.detectron2.train_loader import TrainLoader
from dyhead.evaluation.expected import WITH_TTA
from dyhead.evaluation.results import check_weights
from dyhead.necks import Necked
from dyhead.runs.averaging import weight_average
from dyhead.runs.batches import parts
from dyhead.runs.divergence import DivergedError
from dyhead.runs.interruption import Interrupted, Interruption
from dyhead.runs.optimizer import build_optimizer, resumed_state
from dyhead.runs.precise_bn import wants_statistics
from dyhead.runs.precision import autocast_dtype
from dyhead.runs.processes import check_same_start
from dyhead.runs.seeds import seed_sampling

_log = logging.getLogger(__name__)


def _has_a_traceback_to_tell(record: logging.LogRecord) -> bool:
    """Detectron2 logs what ends a training as a traceback; errors that a user can mend say themselves what is wrong."""
    error = record.exc_info and record.exc_info[1]
    return not isinstance(error, (ConfigError, DataError, FloatingPointError))


logging.getLogger("detectron2.engine.train_loop").addFilter(_has_a_traceback_to_tell)


class Trainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` for the detectors of this package; it also runs on CPUs, in several processes.

    The differences: ``SOLVER.OPTIMIZER``; a resumed run goes on with the configuration's settings, and with the images
    and random numbers that the uninterrupted run would have had; Ctrl-C keeps what is
    learned; COCO's evaluation, by pycocotools, of every dataset of ``DATASETS.TEST``; ``TEST.EXPECTED_RESULTS`` is left
    to :func:`dyhead.detectron2.main`; an image that cannot be read is named; a checkpoint that does not fit is an error
    on ``--resume``; ``SOLVER.AMP`` works on a CPU, too; ``SOLVER.ACCUMULATE`` and ``SOLVER.EMA``.

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
        device_type = torch.device(cfg.MODEL.DEVICE).type
        self._trainer = Steps(model, loader, optimizer, device_type, autocast_dtype(cfg), cfg.SOLVER.ACCUMULATE)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.average = self.checkpointer.average = weight_average(cfg, self.checkpointer.model)
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self._interruption = Interruption(announce=comm.is_main_process())
        self.register_hooks(self.build_hooks())

    def train(self) -> dict[str, Any]:
        """Train and evaluate; returns the last evaluation's results, in the main process.

        Raises:
            DivergedError: a loss is infinite or NaN, or the model finds no finite boxes for that reason.
            DataError: an image is broken.
            Interrupted: a signal came; a checkpoint is written.
        """
        check_same_start(self.start_iter, self.cfg.OUTPUT_DIR)
        if isinstance(self.data_loader, TrainLoader):  # which a trainer that is derived from this may not have
            self.data_loader.seed, self.data_loader.start = self.seed, self.start_iter
        with self._interruption:
            try:
                # Not DefaultTrainer's: where TEST.EXPECTED_RESULTS differ it ends the process, with nothing reported.
                super(DefaultTrainer, self).train(self.start_iter, self.max_iter)
            except Interrupted as interrupted:
                done = min(self.iter, self.max_iter - 1)
                self.checkpointer.save(f"model_{done:07d}", iteration=done)
                raise interrupted.after(done, self.cfg.OUTPUT_DIR) from None
        if self.average is not None:
            self.average.apply()
        return self._last_eval_results

    def build_hooks(self) -> list[hooks.HookBase]:
        """Detectron2's hooks, with evaluations that a signal ends, and one that ends the training, before them."""
        wants_statistics(self.cfg, self.model)  # warns where there is nothing to do
        built = super().build_hooks()
        place = next(i for i, hook in enumerate(built) if isinstance(hook, hooks.EvalHook))
        evaluation = hooks.EvalHook(self.cfg.TEST.EVAL_PERIOD, self._evaluate)
        return [*built[:place], _StopHook(self._interruption), evaluation, *built[place + 1 :]]

    def _evaluate(self) -> dict[str, Any]:
        with self._interruption.at_once(), self.average.applied() if self.average else nullcontext():
            self._last_eval_results = self.test(self.cfg, self.model)
        return defined(self._last_eval_results)

    def run_step(self) -> None:
        """One iteration."""
        seed_sampling(self.seed, self.iter, comm.get_rank())
        try:
            super().run_step()
        except FloatingPointError as error:
            raise DivergedError(self.iter, " ".join(str(error).split())) from error
        if self.average is not None:
            self.average.update(self.iter)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the training beside the weights."""
        return super().state_dict() | {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, with this configuration's settings.

        Raises:
            ConfigError: see :func:`dyhead.runs.optimizer.resumed_state`.
        """
        trainer, saved = state_dict["_trainer"], state_dict.get("hooks", {})
        trainer = trainer | {"optimizer": resumed_state(self.optimizer, trainer["optimizer"])}
        scheduler = saved.get("LRScheduler", {}) | {"base_lrs": self.scheduler.base_lrs}
        super().load_state_dict(state_dict | {"_trainer": trainer, "hooks": saved | {"LRScheduler": scheduler}})
        if self.cfg.SEED < 0 and "seed" in state_dict:  # which the run drew; those of earlier versions kept none
            self.seed = state_dict["seed"]
        for group, lr in zip(self.optimizer.param_groups, self.scheduler.get_lr(), strict=True):
            group["lr"] = lr

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model that the config describes, on ``MODEL.DEVICE``, with random weights."""
        if cfg.MODEL.BACKBONE.NAME not in BACKBONE_REGISTRY:
            known = ", ".join(sorted(name for name, _ in BACKBONE_REGISTRY))
            raise ConfigError(f"MODEL.BACKBONE.NAME: expected one of {known}, got {cfg.MODEL.BACKBONE.NAME!r}")
        try:
            model = use_own_deform_conv(super().build_model(cfg))
        except ConfigError:
            raise
        except (AssertionError, KeyError, ValueError) as error:
            raise ConfigError(f"the model cannot be built from this config: {type(error).__name__}: {error}") from error
        if cfg.MODEL.NECKS and not any(isinstance(module, Necked) for module in model.modules()):
            raise ConfigError(
                f"MODEL.NECKS {list(cfg.MODEL.NECKS)}: {cfg.MODEL.META_ARCHITECTURE} does not know of necks: set "
                "MODEL.BACKBONE.NAME to a backbone with DyHead in its name, such as build_resnet_fpn_dyhead_backbone, "
                f"or build another with DyHeadBackbone, got {cfg.MODEL.BACKBONE.NAME!r}"
            )
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`dyhead.runs.optimizer.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """See :func:`dyhead.detectron2.schedule.build_lr_scheduler`."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """See :class:`dyhead.detectron2.train_loader.TrainLoader`."""
        return TrainLoader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Detectron2's loader of a test set."""
        return evaluation_loader(cfg, dataset_name)

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's writers of the terminal, metrics.json and TensorBoard's files; the last ones may fail."""
        return [Dispensable(w) if isinstance(w, TensorboardXWriter) else w for w in super().build_writers()]

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluate on ``DATASETS.TEST``; :class:`ConfigError` if the weights are NaN or infinite."""
        check_weights(model)
        return super().test(cfg, model, evaluators)

    @classmethod
    def test_augmented(cls, cfg: CfgNode, model: nn.Module, results: dict[str, Any]) -> None:
        """Evaluate once more with ``TEST.AUG``, if it is enabled, as tasks "bbox_TTA", ... of the same datasets.

        Args:
            cfg: the config.
            model: the detector, not wrapped in DistributedDataParallel.
            results: what :meth:`test` has returned, in the main process; it is completed.
        """
        names = cfg.DATASETS.TEST
        if not cfg.TEST.AUG.ENABLED or not names:
            return
        model.eval()
        _log.info("Evaluating with test-time augmentation")
        evaluators = [InstanceEvaluator(name, os.path.join(cfg.OUTPUT_DIR, "inference_TTA")) for name in names]
        augmented = super().test(cfg, with_augmentation(cfg, model).eval(), evaluators)
        if comm.is_main_process():
            for name in names:
                own, more = (each if len(names) == 1 else each[name] for each in (results, augmented))
                own.add({f"{task}{WITH_TTA}": metrics for task, metrics in more.items()})

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> InstanceEvaluator:
        """See :func:`dyhead.detectron2.evaluation.build_evaluator`; of boxes the same as the torchvision engine's."""
        return build_evaluator(cfg, dataset_name)


class _StopHook(hooks.HookBase):
    """Ends the training after an iteration in which a signal came to any process."""

    def __init__(self, interruption: Interruption) -> None:
        self._interruption = interruption

    def after_step(self) -> None:
        stop = self._interruption.requested is not None
        if comm.get_world_size() > 1:
            flag = torch.tensor(float(stop), device=self.trainer.cfg.MODEL.DEVICE)
            torch.distributed.all_reduce(flag)
            stop = flag.item() > 0
        self._interruption.raise_if(stop)


class Dispensable(EventWriter):
    """A writer without which a run goes on when it fails, with a warning: its results are not to be lost to it.

    Args:
        writer: what writes.
    """

    def __init__(self, writer: EventWriter) -> None:
        self._writer: EventWriter | None = writer

    def write(self) -> None:
        """Write, if that still works."""
        self._do("write")

    def close(self) -> None:
        """Close what has not failed."""
        self._do("close")

    def _do(self, method: str) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)()
        except Exception as error:
            name = type(self._writer).__name__
            _log.warning("%s writes nothing any more (%s: %s)", name, type(error).__name__, error)
            self._writer = None


class Steps(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` with gradients in parts and mixed precision, also on a CPU.

    Detectron2's ``AMPTrainer`` needs CUDA.

    Args:
        model, data_loader, optimizer: as Detectron2's.
        device_type: "cpu" or "cuda".
        dtype: of autocast in the forward pass, or None; with float16 the loss is scaled.
        count: parts of a batch, see :func:`dyhead.runs.batches.parts`.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        device_type: str,
        dtype: torch.dtype | None,
        count: int = 1,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.device_type, self.dtype, self.count = device_type, dtype, count
        self.grad_scaler = torch.amp.GradScaler(device_type, enabled=dtype is torch.float16)

    def run_step(self) -> None:
        """One iteration."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()
        means: dict[str, torch.Tensor] = {}
        for i, part in enumerate(parts(data, self.count)):
            # The devices' gradients are put together once, when they have all parts.
            waits = i + 1 < self.count and isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if waits else nullcontext():
                with torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None):
                    losses = self.model(part)
                if isinstance(losses, torch.Tensor):  # of a meta-architecture of others
                    losses = {"total_loss": losses}
                losses = {name: loss / self.count for name, loss in losses.items()}
                self.grad_scaler.scale(sum(losses.values())).backward()
            means = {name: loss.detach() + means.get(name, 0) for name, loss in losses.items()}
        self.after_backward()
        self._write_metrics(means, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Those of the optimizer and, with float16, of the loss scaling."""
        return super().state_dict() | {"grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue; a run that had no loss scaling begins it anew."""
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
