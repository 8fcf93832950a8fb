"""The examples in the docstrings run as written."""

import doctest
import importlib
import pkgutil

import pytest

import dyhead.detection

MODULES = [name for _, name, _ in pkgutil.walk_packages(dyhead.detection.__path__, "dyhead.detection.")]


@pytest.mark.parametrize("name", ["dyhead.options", "dyhead.detection", *MODULES])
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_detector_and_its_head_have_examples():
    for name in ("dyhead.detection.detector", "dyhead.detection.heads.dense"):
        assert doctest.testmod(importlib.import_module(name)).attempted > 0
