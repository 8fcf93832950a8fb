"""Checkpoints: Detectron2's, with an error instead of a log line where a model must be complete."""

from __future__ import annotations

import pickle
import re
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor

from dyhead.config import ConfigError
from dyhead.detectron2.backbone import DyHeadBackbone
from dyhead.layers import convert_checkpoint

_NAMED = 10  # so many keys of a kind are named in an error, the rest is counted


class Checkpointer(DetectionCheckpointer):
    """Detectron2's ``DetectionCheckpointer``, for models with a :class:`~dyhead.detectron2.DyHeadBackbone`.

    Besides Detectron2's own files it reads those of microsoft/DynamicHead, and those of detectors without a Dynamic
    Head, whose backbone is then the one inside the DyHeadBackbone.

    ``load(path)``, which is for resuming and evaluating, wants every key to fit. ``load(path, checkpointables=[])``,
    which is how training starts from other weights, takes those that fit and logs those that do not.

    Raises:
        ConfigError: on ``load``: the file is missing, cannot be fetched, is no checkpoint, or does not fit the model
            (the missing, unexpected and differently shaped keys are named).
    """

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load the weights and the states of ``checkpointables``, all by default; returns what else the file holds."""
        self._complete = checkpointables is None
        try:
            return super().load(path, checkpointables)
        except ConfigError as error:
            raise ConfigError(f"checkpoint {path}: {error}") from error
        except (AssertionError, EOFError, KeyError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise ConfigError(f"checkpoint {path}: cannot be loaded ({type(error).__name__}: {error})") from error
        finally:
            self._parsed_url_during_load = None  # Detectron2 leaves it set after an error, then refuses to load again

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        self._convert_ndarray_to_tensor(checkpoint["model"])
        if not checkpoint.get("matching_heuristics"):
            checkpoint["model"] = self._with_our_keys(checkpoint["model"])
        return super()._load_model(checkpoint)

    def _with_our_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if any("dyhead_tower." in key for key in state):
            state = convert_checkpoint(state)
        for name, module in self.model.named_modules():
            if isinstance(module, DyHeadBackbone):
                wrapped = re.compile(rf"^{re.escape(name)}\.(?!backbone\.|dyhead\.)")
                state = {wrapped.sub(f"{name}.backbone.", key, count=1): value for key, value in state.items()}
        return state

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        super()._log_incompatible_keys(incompatible)
        if not self._complete:
            return
        shapes = [f"{key} (expected {ours}, got {theirs})" for key, theirs, ours in incompatible.incorrect_shapes]
        reshaped = {key for key, *_ in incompatible.incorrect_shapes}
        faults = [
            f"{len(keys)} {what}: {', '.join(keys[:_NAMED])}{', ...' if len(keys) > _NAMED else ''}"
            for what, keys in (
                ("missing keys", [key for key in incompatible.missing_keys if key not in reshaped]),
                ("unexpected keys", incompatible.unexpected_keys),
                ("keys of another shape", shapes),
            )
            if keys
        ]
        if faults:
            raise ConfigError("does not fit the model:\n  " + "\n  ".join(faults))
