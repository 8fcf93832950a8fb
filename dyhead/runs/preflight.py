"""Checks that both engines make before a run starts, so that it does not fail late."""

from __future__ import annotations

import argparse
import logging
import os
import stat
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlparse

import torch
from fvcore.common.config import CfgNode

from dyhead.config import ConfigError, expect, get, network_of, reads_visible_boxes
from dyhead.config_checks import MAX_SEED
from dyhead.data import DataError
from dyhead.detection import DETECTORS
from dyhead.detection.roi import BOX_HEADS
from dyhead.evaluation.expected import check_expectations
from dyhead.necks import NECKS

_log = logging.getLogger(__name__)

# What starts programs several times: variables of the number of processes and of this one's rank. Slurm's are those of
# srun: a script that sbatch runs once has SLURM_NTASKS, too.
_LAUNCHERS = (
    ("torchrun", "WORLD_SIZE", "RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MPI", "PMI_SIZE", "PMI_RANK"),
    ("MVAPICH", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)


def check_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Check that a configuration and a command line suit this machine.

    Nothing is written. Where there is no CUDA device, ``MODEL.DEVICE`` becomes "cpu" in ``cfg``, with a warning.

    Args:
        cfg: the configuration, not frozen.
        args: ``eval_only``, ``resume``, ``num_gpus``, ``num_machines``, ``machine_rank`` and ``dist_url`` of
            ``train_net.py``. Without CUDA, ``num_gpus`` is the number of processes.

    Raises:
        ConfigError: an invalid device; more devices than there are; a batch that they cannot share equally; a
            launcher that starts more processes than ``args`` says; an ``OUTPUT_DIR`` that cannot be written to; weights
            that are needed and missing; expected results of what is not evaluated.
    """
    check_device(cfg)
    _check_processes(cfg, args)
    _check_launcher(args)
    _check_folder(cfg, args)
    _check_weights(cfg, args)
    check_expectations(cfg)


def check_parts(
    cfg: CfgNode,
    dataset: str,
    records: Iterable[Mapping[str, Any]],
    keypoint_names: Sequence[str] | None,
    *,
    trained: bool,
) -> None:
    """Check that a dataset has the masks and keypoints that the detector is to learn, or is compared with.

    Args:
        cfg: the configuration.
        dataset: its name.
        records: its images in Detectron2's standard form.
        keypoint_names: of its objects' keypoints, if they have any.
        trained: whether it is trained on.

    Raises:
        ConfigError: it has none, or not in the form that the configuration says.
        DataError: a mask has another size than its image.
    """
    if cfg.MODEL.KEYPOINT_ON:
        if not keypoint_names:
            raise ConfigError(
                f"MODEL.KEYPOINT_ON: expected False, since dataset {dataset!r} has no keypoints, got True"
            )
        key, count = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", len(keypoint_names)
        expect(cfg, key, get(cfg, key) == count, f"{count}, the number of keypoints of dataset {dataset!r}")
    if trained and reads_visible_boxes(cfg):
        records = list(records)
        if not any("visible_bbox" in annotation for record in records for annotation in record.get("annotations", ())):
            _log.warning(
                "dataset '%s' has no boxes of the visible parts of objects (visible_bbox): %s takes all of them as "
                "wholly visible", dataset, cfg.MODEL.META_ARCHITECTURE,
            )  # fmt: skip
    for record in records if cfg.MODEL.MASK_ON else ():
        for annotation in record.get("annotations", ()):
            _check_mask(cfg, dataset, record, annotation, trained)


def _check_mask(
    cfg: CfgNode, dataset: str, record: Mapping[str, Any], annotation: Mapping[str, Any], trained: bool
) -> None:
    mask = annotation.get("segmentation")
    if not mask:
        raise ConfigError(
            f"MODEL.MASK_ON: expected False, since dataset {dataset!r} has objects without a segmentation "
            f"({record['file_name']}), got True"
        )
    if not isinstance(mask, dict):
        return
    size = [record["height"], record["width"]]
    if "size" in mask and list(mask["size"]) != size:
        raise DataError(
            f"dataset {dataset!r}: {record['file_name']}: expected masks (segmentation) of {size[0]} x {size[1]} "
            f"pixels, the image's height and width, got {mask['size'][0]} x {mask['size'][1]}"
        )
    if trained and not annotation.get("iscrowd", 0):
        bitmask = cfg.INPUT.MASK_FORMAT == "bitmask"
        which = f"'bitmask', since dataset {dataset!r} has masks as RLE, not as polygons ({record['file_name']})"
        expect(cfg, "INPUT.MASK_FORMAT", bitmask, which)


def check_device(cfg: CfgNode) -> None:
    """Make ``MODEL.DEVICE`` "cpu" where it is CUDA and there is none, with a warning.

    Raises:
        ConfigError: it is no device that is supported.
    """
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"MODEL.DEVICE: expected cpu, cuda or cuda:NUMBER, got {cfg.MODEL.DEVICE!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        _log.warning("MODEL.DEVICE is %s, but there is no CUDA device; running on the CPU", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"


def _check_processes(cfg: CfgNode, args: argparse.Namespace) -> None:
    for flag in ("num_gpus", "num_machines"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')}: expected at least 1, got {getattr(args, flag)}")
    if not 0 <= args.machine_rank < args.num_machines:
        raise ConfigError(f"--machine-rank: expected 0 to {args.num_machines - 1}, got {args.machine_rank}")
    device = torch.device(cfg.MODEL.DEVICE)
    if device.type == "cuda":
        there = torch.cuda.device_count() if device.index is None else 1
        if args.num_gpus > there:
            raise ConfigError(f"--num-gpus: expected at most {there} with MODEL.DEVICE {device}, got {args.num_gpus}")
    processes = args.num_gpus * args.num_machines
    if processes > 1:
        try:
            url = urlparse(args.dist_url)
            is_address = url.scheme == "tcp" and url.hostname and url.port
        except ValueError:  # a port that is none
            is_address = False
        if not is_address:
            raise ConfigError(f"--dist-url: expected tcp://HOST:PORT, got {args.dist_url}")
        if device.type == "cpu" and not args.eval_only:
            _check_norms(cfg)
    if cfg.SEED > MAX_SEED - (processes - 1):
        raise ConfigError(
            f"SEED: expected at most {MAX_SEED - (processes - 1)} with {processes} processes, which count on from it, "
            f"got {cfg.SEED}"
        )
    if not args.eval_only and cfg.SOLVER.IMS_PER_BATCH % processes:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH: expected a multiple of the {processes} devices, got {cfg.SOLVER.IMS_PER_BATCH}"
        )
    share = cfg.SOLVER.IMS_PER_BATCH // processes
    if not args.eval_only:
        expected = f"a divisor of the {share} images that a device has of SOLVER.IMS_PER_BATCH"
        expect(cfg, "SOLVER.ACCUMULATE", share % cfg.SOLVER.ACCUMULATE == 0, expected)


def _check_norms(cfg: CfgNode) -> None:
    name = cfg.MODEL.META_ARCHITECTURE
    if name in DETECTORS:
        nodes = [DETECTORS[name].node]
    else:
        head = cfg.MODEL.ROI_BOX_HEAD.NAME
        nodes = [BOX_HEADS[head].node if head in BOX_HEADS else "MODEL.ROI_BOX_HEAD"]
        nodes += ["MODEL.ROI_MASK_HEAD"] if cfg.MODEL.MASK_ON else []
    nodes += [NECKS[neck].node for neck in cfg.MODEL.NECKS]
    network = network_of(cfg)
    nodes.append("MODEL.RESNETS" if network is None else network.node)
    nodes += [] if network is not None and network.has_pyramid else ["MODEL.FPN"]
    for key in (f"{node}.{key}" for node in nodes for key in get(cfg, node) if key.endswith("NORM")):
        if get(cfg, key) in ("SyncBN", "nnSyncBN"):
            raise ConfigError(f"{key}: expected one that several processes can share on a CPU, got {get(cfg, key)!r}")


def _check_folder(cfg: CfgNode, args: argparse.Namespace) -> None:
    folder = cfg.OUTPUT_DIR
    if not folder or any(unicodedata.category(character) in ("Cc", "Cs") for character in folder):
        raise ConfigError(f"OUTPUT_DIR: expected the name of a folder, got {folder!r}")
    obstacle = _obstacle(folder) if args.machine_rank == 0 else None
    if obstacle:
        raise ConfigError(f"OUTPUT_DIR {folder}: cannot be written to ({obstacle})")


def _obstacle(folder: str) -> str | None:
    """Why nothing can be written to a folder, which need not exist yet; None if it can."""
    path = os.path.abspath(folder)
    while True:
        try:
            mode = os.stat(path).st_mode
            break
        except (FileNotFoundError, NotADirectoryError):
            if os.path.islink(path):
                return f"{path} is a link to what does not exist"
            path = os.path.dirname(path)
        except OSError as error:
            return error.strerror
    if not stat.S_ISDIR(mode):
        return f"{path} is not a folder"
    return None if os.access(path, os.W_OK | os.X_OK) else f"no permission to write to {path}"


def _check_launcher(args: argparse.Namespace) -> None:
    """Each process that a launcher starts would be a whole run of its own, all into one ``OUTPUT_DIR``."""
    for name, size_key, rank_key in _LAUNCHERS:
        try:
            size, rank = int(os.environ[size_key]), int(os.environ[rank_key])
        except (KeyError, ValueError):
            continue
        if size > 1 and (size, rank) != (args.num_machines, args.machine_rank):
            raise ConfigError(
                f"this is process {rank} of the {size} that {name} started ({size_key}={size}), and train_net.py "
                "starts the processes of a machine itself; run it once, with --num-gpus for the number of devices, or "
                "once on each of several machines, with --num-machines and --machine-rank, too"
            )


def _check_weights(cfg: CfgNode, args: argparse.Namespace) -> None:
    weights = cfg.MODEL.WEIGHTS
    if args.resume and os.path.exists(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        return
    if args.eval_only and args.resume:
        raise ConfigError(f"--eval-only --resume: OUTPUT_DIR {cfg.OUTPUT_DIR} holds no checkpoint")
    if args.eval_only and not weights:
        raise ConfigError("--eval-only: set MODEL.WEIGHTS to a checkpoint, or take OUTPUT_DIR's last one with --resume")
    # Detectron2 takes file names that end in "?matching_heuristics=True".
    if weights and "://" not in weights and not os.path.isfile(weights.partition("?")[0]):
        raise ConfigError(f"MODEL.WEIGHTS {weights}: no such file")
