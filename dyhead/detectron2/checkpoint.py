"""Checkpoints: Detectron2's, read safely and converted, with an error where a model must be complete."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import parse_qs

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import Tensor

from dyhead.backbones import timm
from dyhead.checkpoints import (
    CheckpointError,
    Conversion,
    canonical_names,
    convert_for,
    find_state,
    last_checkpoint,
    load_into,
    note_last_checkpoint,
    read_file,
    save_checkpoint,
)
from dyhead.checkpoints.errors import as_config_errors
from dyhead.checkpoints.resuming import check_written_by, entry, iteration
from dyhead.config import ConfigError
from dyhead.runs.averaging import TRAINED, WeightAverage

# Ends of keys that say nothing of where they belong.
_GENERIC = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


class Checkpointer(DetectionCheckpointer):
    """Detectron2's ``DetectionCheckpointer`` for the models of this project.

    It reads the files of all projects that :mod:`dyhead.checkpoints` knows, running nothing in them. A file of
    Detectron2's that asks for it (Caffe2's networks, and others that were trained to classify) is matched with the
    model by the ends of the keys, as Detectron2 does.

    ``load(path)``, which is for resuming and evaluating, wants every key to fit. ``load(path, checkpointables=[])``,
    which is how training starts from other weights, takes those that fit and logs those that do not.

    Files appear when they are complete and on the disk.

    Attributes:
        average: of the weights over the training, or None; see :mod:`dyhead.runs.averaging`.

    Raises:
        ConfigError: on ``load``: the file is missing, cannot be fetched, is no checkpoint, or does not fit the model
            (the missing, unexpected and differently shaped keys are named); to resume, the torchvision engine wrote it,
            or its state does not fit the optimizer. On ``save``: a file cannot be written; ``last_checkpoint`` then
            names the one before.
    """

    average: WeightAverage | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Write the weights, the states of all checkpointables and ``kwargs`` to ``NAME.pth`` in the folder."""
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: of.state_dict() for key, of in self.checkpointables.items()}
        weights = {"model": self.model.state_dict()}
        if self.average is not None:
            weights = {"model": self.average.state, TRAINED: weights["model"]}
        content = {**weights, **states, **kwargs}
        self.logger.info("Saving checkpoint to %s", os.path.join(self.save_dir, f"{name}.pth"))
        with as_config_errors():
            save_checkpoint(self.save_dir, f"{name}.pth", content)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the name of the last checkpoint into ``last_checkpoint``."""
        with as_config_errors():
            note_last_checkpoint(self.save_dir, last_filename_basename)

    def has_checkpoint(self) -> bool:
        """Whether the folder holds a checkpoint; :class:`ConfigError` if its note of it is damaged."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The last checkpoint in the folder, or ""; :class:`ConfigError` if its note of it is damaged."""
        with as_config_errors():
            return last_checkpoint(self.save_dir) or ""

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load the weights and the states of ``checkpointables``, all by default; returns what else the file holds."""
        self._complete, self._read = checkpointables is None, False
        self._path, self._origin = path, f"checkpoint {path}"
        try:
            with as_config_errors():
                if path.startswith(timm.SCHEME):
                    self._load_model({"model": timm.pretrained_state(path)})
                    return {}
                return super().load(path, checkpointables)
        except ConfigError as error:
            if path in str(error):
                raise
            raise ConfigError(f"{self._origin}: {error}") from error
        except Exception as error:  # Detectron2 and what it fetches files with have no error of their own
            if "://" in path and not self._read:
                raise ConfigError(
                    f"MODEL.WEIGHTS {path}: the file could not be fetched ({error}). "
                    'Name another file, or train from scratch with MODEL.WEIGHTS ""'
                ) from error
            raise ConfigError(f"{self._origin}: cannot be loaded ({type(error).__name__}: {error})") from error
        finally:
            self._parsed_url_during_load = None  # Detectron2 leaves it set after an error, then refuses to load again

    def _load_file(self, filename: str) -> dict[str, Any]:
        self._read = True
        content = read_file(filename)
        if filename.endswith(".pyth"):
            return {"model": content, "__author__": "pycls", "matching_heuristics": True}
        if filename.endswith(".pkl") and "__author__" not in content:
            # Caffe2's; its detectors hold the weights under "blobs", its networks alone.
            weights = content.get("blobs", content)
            if isinstance(weights, dict):
                weights = {key: x for key, x in weights.items() if not str(key).endswith("_momentum")}
            return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
        queries = parse_qs(self._parsed_url_during_load.query)
        if queries.pop("matching_heuristics", None) == ["True"]:
            content["matching_heuristics"] = True
        if queries:
            raise CheckpointError(f"{self._origin}: expected no query but matching_heuristics=True, got {queries}")
        return content

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        resumes = self._complete and "trainer" in self.checkpointables
        if resumes:
            check_written_by(checkpoint, "detectron2", self._path)
        heuristics = checkpoint.pop("matching_heuristics", False)
        state = find_state(checkpoint, self._origin)
        own = self.model.state_dict()
        if heuristics:
            conversion, names = self._matched(state, own, caffe2=checkpoint.get("__author__") == "Caffe2"), None
        else:
            conversion, names = convert_for(self.model, state, self._origin), canonical_names(own)
        checkpoint.pop("model", None)
        load_into(self.model, conversion, names, strict=self._complete, origin=self._origin)
        if self.average is not None:
            self.average.restart()
        trained = checkpoint.pop(TRAINED, None)
        if resumes and trained is not None:
            conversion = convert_for(self.model, find_state({"model": trained}, self._origin), self._origin)
            load_into(self.model, conversion, names, strict=True, origin=self._origin)
        if resumes:
            self._check_trainer(checkpoint)

    def _matched(self, state: dict[str, Tensor], own: dict[str, Tensor], *, caffe2: bool) -> Conversion:
        specific = {key: x for key, x in state.items() if key not in _GENERIC}
        try:
            matched = align_and_update_state_dicts(own, specific, c2_conversion=caffe2) if specific else {}
        except (AssertionError, IndexError, KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{self._origin}: its keys cannot be matched with the model by their ends ({error or 'odd names'})"
            ) from error
        fitting = sum(key in own and x.shape == own[key].shape for key, x in matched.items())
        if 2 * fitting <= len(matched):
            raise CheckpointError(
                f"{self._origin} does not fit the model: by the ends of their keys, {fitting} of {len(state)} tensors "
                "have a place in it"
            )
        return Conversion(matched, "matched by the ends of the keys")

    def _check_trainer(self, content: dict[str, Any]) -> None:
        trainer = self.checkpointables["trainer"]
        iteration(content, "trainer.iteration", trainer.max_iter, self._path)
        entry(content, "trainer._trainer.optimizer", dict, self._path)
