"""OUTPUT_DIR: one run at a time, and no run overwrites another."""

from __future__ import annotations

import argparse
import errno
import fcntl
import logging
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from dyhead.config import ConfigError, values
from dyhead.files import write_text

_log = logging.getLogger(__name__)

_LOCK = ".lock"
_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


@contextmanager
def claimed(cfg: CfgNode, args: argparse.Namespace) -> Iterator[None]:
    """Make ``OUTPUT_DIR`` and keep other runs out of it while this one lasts. On the machine of rank 0, which writes.

    Args:
        cfg: the configuration.
        args: ``eval_only``, ``resume`` and ``machine_rank`` of ``train_net.py``.

    Raises:
        ConfigError: the folder cannot be made or written to; another run is in it; it holds a run, and this one is
            a training that does not go on from there, or cannot tell from what.
    """
    if args.machine_rank > 0:
        yield
        return
    output_dir = cfg.OUTPUT_DIR
    path = os.path.join(output_dir, _LOCK)
    try:
        os.makedirs(output_dir, exist_ok=True)
        file = _locked(path)
    except OSError as error:
        raise ConfigError(f"OUTPUT_DIR {output_dir}: cannot be written to ({error})") from error
    with file, disk_faults_named(output_dir):
        try:
            if not args.eval_only:
                _check_content(output_dir, resumed=args.resume)
            yield
        finally:
            # While the lock is held: whoever opens the file from now on makes a new one.
            with suppress(OSError):
                os.unlink(path)


@contextmanager
def disk_faults_named(output_dir: str) -> Iterator[None]:
    """Raise as :class:`ConfigError` what a full or failing disk does to a write; the error itself names no file."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FAULTS:
            raise
        raise ConfigError(
            f"OUTPUT_DIR {output_dir}: cannot be written to any more ({error}); with room again, --resume goes on from "
            "the last checkpoint"
        ) from error


def write_config(cfg: CfgNode) -> None:
    """Write ``config.yaml``, and log the keys whose values differ from those of the one that it replaces."""
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    text = cfg.dump()
    before, now = _read(path), dict(values(yaml.safe_load(text)))
    changed = [key for key in sorted(before.keys() & now) if before[key] != now[key]]
    if changed:
        listed = ", ".join(f"{key} {before[key]!r} -> {now[key]!r}" for key in changed)
        _log.info("Changed since the run was last started: %s", listed)
    write_text(path, text)


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            return dict(values(yaml.safe_load(file)))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):  # none, or none of ours: nothing is known
        return {}


def _locked(path: str) -> Any:
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  (the caller closes it)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ConfigError(
                f"OUTPUT_DIR {os.path.dirname(path)}: a run is writing to it now ({holder}); wait for its end or set "
                "another OUTPUT_DIR"
            ) from None
        except OSError as error:
            _log.warning("%s cannot be locked (%s): nothing keeps a second run out", path, error)
        if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            return file
        file.close()  # its run removed it between our opening and our locking it


def _check_content(output_dir: str, *, resumed: bool) -> None:
    """That a new training finds no other one's files, and a resumed one the name of the checkpoint to go on from."""
    note = "last_checkpoint"
    found = [name for name in (note, "metrics.json") if os.path.lexists(os.path.join(output_dir, name))]
    checkpoints = sorted(name for name in os.listdir(output_dir) if re.fullmatch(r"model_(\d+|final)\.pth", name))
    if not resumed and (found or checkpoints):
        raise ConfigError(
            f"OUTPUT_DIR {output_dir} holds a run already ({[*found, *checkpoints][0]}): continue it with --resume, or "
            "set another OUTPUT_DIR"
        )
    if resumed and checkpoints and note not in found:
        raise ConfigError(
            f"--resume: OUTPUT_DIR {output_dir} holds checkpoints ({checkpoints[-1]}), but no {note} that names the "
            f"one to go on from: write its name into {note}"
        )
