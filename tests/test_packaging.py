"""The source distribution is complete, and the wheel that is built from it has all that commands need."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks", "configs", "csrc", "docs", "examples", "dyhead", "tests", "tools")
LEFT_OUT = shutil.ignore_patterns("*.so", "*.o", "__pycache__")


def build(kind, folder, **environment):
    """What setuptools builds in a folder, without a network."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    environment = {**os.environ, "PYTHONPATH": "", **environment}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return folder / "dist" / run.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=LEFT_OUT)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    with tarfile.open(build("sdist", folder)) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(sources):
    """Built on a machine that seems to have no compiler."""
    return build("wheel", sources, PATH="", CXX="")


def test_the_sources_are_complete(sources):
    built = {".so", ".o", ".pyc"}
    there = (path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file())
    files = {path.relative_to(ROOT) for path in there if path.suffix not in built}
    files |= {
        Path(name)
        for name in ("Makefile", "constraints.txt", "setup.py", "pyproject.toml", "train_net.py", "mkdocs.yml")
    }
    assert len(files) > 300
    assert sorted(str(file) for file in files if not (sources / file).is_file()) == []
    assert list(sources.rglob("*.so")) == []


def test_a_wheel_without_libraries_is_for_any_machine(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (archive.read(name).decode() for name in names if name.endswith("/entry_points.txt"))
    assert re.search(r"^dyhead = dyhead.cli:main$", entry_points, re.M)
    assert {"dyhead/py.typed", "dyhead/torchvision/detectron2_defaults.yaml"} <= names
    configs = {f"dyhead/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"dyhead"}


def test_an_installed_wheel_finds_its_configs(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    code = "from dyhead.config_files import find_file; print(find_file('fcos_dyhead_R18_shapes.yaml'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, check=True)
    found = tmp_path / "site/dyhead/configs/quickstart/fcos_dyhead_R18_shapes.yaml"
    assert run.stdout == f"{found}\n"
