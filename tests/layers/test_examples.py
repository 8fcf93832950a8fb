"""The examples in the docstrings run as written."""

import doctest
import importlib
import pkgutil

import pytest

import dyhead.layers


@pytest.mark.parametrize("module", [name for _, name, _ in pkgutil.iter_modules(dyhead.layers.__path__)])
def test_examples(module):
    result = doctest.testmod(importlib.import_module(f"dyhead.layers.{module}"))
    assert result.failed == 0
