"""The README's Python runs as it stands, and what it names exists."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python( detectron2)?\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize(
    "code",
    [pytest.param(code, marks=[pytest.mark.detectron2] if needs else []) for needs, code in EXAMPLES],
    ids=[re.findall(r"import (\w+)$", code, flags=re.MULTILINE)[-1] for _, code in EXAMPLES],
)
def test_example_runs(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_there_are_examples():
    assert len(EXAMPLES) == 3


def test_every_linked_file_config_and_module_exists():
    paths = re.findall(r"\]\((?!https?:)([^)#]+)\)", README) + re.findall(r"--config-file (\S+)", README)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for module in set(re.findall(r"-m (dyhead[\w.]*)", README)):
        assert importlib.util.find_spec(module) is not None, module
