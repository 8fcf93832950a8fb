"""Skips the tests whose requirement is absent, with the reason."""

import importlib.util

import pytest
import torch


def pytest_collection_modifyitems(items):
    absent = {}
    if importlib.util.find_spec("detectron2") is None:
        absent["detectron2"] = "Detectron2 is not installed"
    if not torch.cuda.is_available():
        absent["cuda"] = "no CUDA device"
    for item in items:
        for marker, reason in absent.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
