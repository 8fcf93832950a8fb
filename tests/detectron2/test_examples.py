import doctest
import importlib
import pkgutil

import pytest

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import dyhead.detectron2  # noqa: E402


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(dyhead.detectron2.__path__)])
def test_the_examples_in_docstrings_run(name):
    module = importlib.import_module(f"dyhead.detectron2.{name}")
    failed, _ = doctest.testmod(module)
    assert failed == 0
