"""A library that is missing or does not load: the reference runs, and one warning says why and what to do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dyhead import _C, info
from dyhead.ops import library
from dyhead.ops.torch_version import TORCH_MINIMUM

# The child processes import a copy of the package, where the library can be missing or broken. The finder of an
# editable installation would find the real one.
COPY = """
import sys
sys.path.insert(0, sys.argv[1])
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import dyhead
assert dyhead.__file__.startswith(sys.argv[1]), dyhead.__file__
"""
USE = """
import warnings
import torch
from dyhead.ops import backend, pyramid_deform_conv2d
features = [torch.randn(1, 4, 8, 6, requires_grad=True), torch.randn(1, 4, 4, 3)]
arguments = features, torch.randn(1, 18, 4, 3), torch.randn(2, 2, 4, 3, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    results = [pyramid_deform_conv2d(*arguments) for _ in range(3)]
    results[0].sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert pyramid_deform_conv2d(*arguments).dtype == torch.bfloat16
    torch.compile(pyramid_deform_conv2d, backend="eager", fullgraph=True)(*arguments)
    with backend("reference"):
        assert torch.equal(pyramid_deform_conv2d(*arguments), results[0])
    try:
        backend("compiled")
    except RuntimeError as error:
        assert str(error).startswith("backend: expected a library for 'compiled', got none: dyhead's"), error
        assert "was not built" in str(error), error
    else:
        raise AssertionError("expected an error")
    assert torch.equal(pyramid_deform_conv2d(*arguments), results[0])
assert not hasattr(torch.ops.dyhead, "pyramid_deform_conv2d")
own = [str(w.message) for w in caught if "dyhead" in str(w.message)]
assert len(own) == 1, own
assert caught[0].filename == "<string>", caught[0].filename
print(own[0])
"""


def copy_package(folder, libraries):
    """The Python files of the package in a folder, with other files in place of the library."""
    source = os.path.dirname(os.path.dirname(library.__file__))
    for name in ("__init__.py", "info.py", *(f"ops/{file}" for file in os.listdir(f"{source}/ops"))):
        if name.endswith(".py"):
            target = folder / "dyhead" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{source}/{name}") as file:
                target.write_text(file.read())
    for name, content in libraries.items():
        (folder / "dyhead" / name).write_bytes(content)
    return str(folder)


def run(*command, **options):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reference_runs_and_one_warning_says_why(tmp_path):
    text = run("-c", COPY + USE, copy_package(tmp_path, {}))
    assert "was not built" in text
    assert "pip install -e . --no-build-isolation" in text
    assert "plain PyTorch operator runs" in text


def test_library_of_older_sources_is_not_used(tmp_path):
    """One that lacks an operator, here all of them."""
    use = """
import types, warnings
sys.modules["dyhead._C"] = types.ModuleType("dyhead._C")
import torch
from dyhead.ops import border_align
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert border_align(torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 1, 1)).flatten().tolist() == [1.0] * 4
assert [warning.filename for warning in caught] == ["<string>"]
print(caught[0].message)
"""
    text = run("-c", COPY + use, copy_package(tmp_path, {os.path.basename(_C.__file__): b""}))
    assert "was built from older sources, without deform_roi_pool. Build it again: pip install -e ." in text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("_C.cpython-38-any.so", "was built for another Python (_C.cpython-38-any.so)"),
        (os.path.basename(_C.__file__), "did not load"),
    ],
    ids=["other_python", "broken"],
)
def test_info_says_why_the_library_did_not_load(name, reason, tmp_path):
    folder = copy_package(tmp_path, {name: b"not a library"})
    text = run("-c", COPY + "from dyhead import info; info.main()", folder)
    assert "NOT LOADED, the plain PyTorch operator runs" in text
    assert reason in text
    assert "pip install -e . --no-build-isolation" in text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("_C_cuda.cpython-38-any.so", "was built for another Python (_C_cuda.cpython-38-any.so)"),
        (os.path.basename(_C.__file__).replace("_C", "_C_cuda"), "did not load"),
        (None, "was not built"),
    ],
    ids=["other_python", "broken", "absent"],
)
def test_info_says_why_the_cuda_library_did_not_load(name, reason, tmp_path):
    if reason == "did not load" and torch.version.cuda is None:
        reason = "needs a PyTorch with CUDA"
    with open(_C.__file__, "rb") as file:
        libraries = {os.path.basename(_C.__file__): file.read()}
    folder = copy_package(tmp_path, libraries | ({name: b"not a library"} if name else {}))
    text = run("-c", COPY + "from dyhead import info; info.main()", folder)
    assert "CPU operator    loaded" in text
    assert "CUDA operator   NOT LOADED, the plain PyTorch operator runs" in text
    assert reason in text
    # The CPU operator is none the worse for it.
    run("-c", COPY + "from dyhead.ops import library; assert library.DEVICES == {'cpu', 'meta'}", folder)


def test_info_says_what_was_built(capsys):
    info.main()
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert "loaded, for PyTorch >= 2.11" in text
    assert f"used here: {_C.build_info()['cpu_path']}" in text


def test_device_without_an_operator_warns_once():
    device = torch.device("xpu")
    library._warned.discard("xpu")
    with pytest.warns(UserWarning, match="no compiled operator for xpu tensors"):
        assert not library.runs_on(device)
    assert not library.runs_on(device)


def test_oldest_pytorch_is_the_same_everywhere():
    oldest = ".".join(map(str, TORCH_MINIMUM))
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert re.findall(r'"torch>=([^"]+)"', project) == [oldest, oldest]  # to build, and to run
    assert _C.build_info()["torch_minimum"] == oldest


def test_info_lists_every_part():
    lines = info.collect()
    assert {"dyhead", "Python", "PyTorch", "torchvision", "detectron2", "CPU operator", "CUDA operator"} <= set(lines)
