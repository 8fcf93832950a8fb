"""Skips the tests whose requirement is absent, with the reason; gives torch.compile a cache of the run's own; data."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def compile_cache_fixture(tmp_path_factory):
    """What torch.compile keeps for later runs may call the operators as another checkout has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture
def one_thread():
    """PyTorch computes on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def five_pictures(tmp_path):
    """The entry of DATASETS.REGISTER of five pictures with a box each."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(1, 6):
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 48, "width": 64})
        box = {"bbox": [4 * i, 3 * i, 20, 25], "area": 500, "iscrowd": 0}
        annotations.append({"id": i, "image_id": i, "category_id": 1 + i % 2} | box)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    (tmp_path / "data.json").write_text(json.dumps(content))
    return [f"five {tmp_path.name}", str(tmp_path / "data.json"), str(tmp_path)]


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
