"""Checkpoints: Detectron2's, read safely and converted, with an error where a model must be complete."""

from __future__ import annotations

import pickle
from typing import Any
from urllib.parse import parse_qs

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts

from dyhead.checkpoints import (
    CheckpointError,
    Conversion,
    canonical_names,
    convert,
    find_state,
    load_into,
    read_file,
)
from dyhead.config import ConfigError


class Checkpointer(DetectionCheckpointer):
    """Detectron2's ``DetectionCheckpointer`` for the models of this project.

    It reads the files of all projects that :mod:`dyhead.checkpoints` knows, running nothing in them. A file of
    Detectron2's that asks for it (Caffe2's networks, and others that were trained to classify) is matched with the
    model by the ends of the keys, as Detectron2 does.

    ``load(path)``, which is for resuming and evaluating, wants every key to fit. ``load(path, checkpointables=[])``,
    which is how training starts from other weights, takes those that fit and logs those that do not.

    Raises:
        ConfigError: on ``load``: the file is missing, cannot be fetched, is no checkpoint, or does not fit the model
            (the missing, unexpected and differently shaped keys are named).
    """

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load the weights and the states of ``checkpointables``, all by default; returns what else the file holds."""
        self._complete, self._origin = checkpointables is None, f"checkpoint {path}"
        try:
            return super().load(path, checkpointables)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        except ConfigError as error:
            raise ConfigError(f"{self._origin}: {error}") from error
        except (AssertionError, EOFError, KeyError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise ConfigError(f"{self._origin}: cannot be loaded ({type(error).__name__}: {error})") from error
        finally:
            self._parsed_url_during_load = None  # Detectron2 leaves it set after an error, then refuses to load again

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pyth"):  # pycls
            return super()._load_file(filename)
        content = read_file(filename)
        if filename.endswith(".pkl") and "__author__" not in content:
            # Caffe2's; its detectors hold the weights under "blobs", its networks alone.
            weights = {key: x for key, x in content.get("blobs", content).items() if not key.endswith("_momentum")}
            return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
        queries = parse_qs(self._parsed_url_during_load.query)
        if queries.pop("matching_heuristics", None) == ["True"]:
            content["matching_heuristics"] = True
        if queries:
            raise CheckpointError(f"{self._origin}: expected no query but matching_heuristics=True, got {queries}")
        return content

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        heuristics = checkpoint.pop("matching_heuristics", False)
        state = find_state(checkpoint, self._origin)
        own = self.model.state_dict()
        if heuristics:
            state = align_and_update_state_dicts(own, state, c2_conversion=checkpoint.get("__author__") == "Caffe2")
            conversion, names = Conversion(state, "matched by the ends of the keys"), None
        else:
            conversion, names = convert(state, self._origin), canonical_names(own)
        checkpoint.pop("model", None)
        load_into(self.model, conversion, names, strict=self._complete, origin=self._origin)
