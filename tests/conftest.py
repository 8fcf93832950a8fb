"""Skips the tests whose requirement is absent, with the reason; gives torch.compile a cache of the run's own."""

import importlib.util

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def compile_cache_fixture(tmp_path_factory):
    """What torch.compile keeps for later runs may call the operators as another checkout has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


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
