"""README, docs/ and the pages of the API: examples run as they stand, and what they name or link exists."""

import dataclasses
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tools import api_pages

ROOT = Path(__file__).parent.parent
# Pages of the repository by path, and those that the site has in addition.
WRITTEN = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
}
PAGES = WRITTEN | {f"docs/{name}": text for name, text in api_pages.pages().items()}
EXAMPLES = [
    (page, code)
    for page in ("README.md", "docs/reuse.md", "docs/visualize.md")
    for code in re.findall(r"```python\n(.*?)```", WRITTEN[page], flags=re.DOTALL)
]


@pytest.mark.parametrize(
    "code",
    [pytest.param(code, marks=[pytest.mark.detectron2] if "detectron2" in code else []) for _, code in EXAMPLES],
    ids=[page + "-" + re.findall(r"import (\w+)", code)[-1] for page, code in EXAMPLES],
)
def test_example_runs(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(code, "page", "exec"), {"__name__": "page"})


def test_there_are_examples():
    assert len([page for page, _ in EXAMPLES if page == "README.md"]) == 2
    assert len([page for page, _ in EXAMPLES if page == "docs/reuse.md"]) == 5


def without_code(text):
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(text):
    """Those that GitHub and MkDocs give to headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(PAGES[page])):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        exists = target in PAGES or (ROOT / target).exists()
        if not exists or (anchor and anchor not in anchors(PAGES[target])):
            lost.append(link)
    assert lost == []


def test_a_lost_link_is_found():
    assert anchors("# A `b`, c\n```\n# no heading\n```\n## D's [e](f.md)") == {"a-b-c", "ds-e"}
    assert without_code("a `[b](c)` d\n```python\n[e](f)\n```\n") == "a  d\n\n"


@pytest.mark.parametrize("page", WRITTEN)
def test_every_named_config_module_and_example_exists(page):
    text = WRITTEN[page]
    if page == "CHANGELOG.md":
        return  # it names what there was
    named = re.findall(r"--config-file (\S+\.yaml)", text) + re.findall(r"`(examples/\w+\.py)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
    for module in set(re.findall(r"-m ((?:dyhead|benchmarks|tools)[\w.]*)", text)):
        assert importlib.util.find_spec(module) is not None, module


def test_every_page_and_example_is_listed():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

    def pages_of(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry if isinstance(entry, list) else entry.values()) for page in pages_of(part)]

    assert sorted(f"docs/{page}" for page in pages_of(nav)) == [page for page in WRITTEN if page.startswith("docs/")]
    for page in pages_of(nav):
        assert f"]({page})" in WRITTEN["docs/index.md"] or page == "index.md"
    for path in ROOT.glob("examples/*.py"):
        assert f"`examples/{path.name}`" in WRITTEN["docs/reuse.md"]


API = [page.removeprefix("docs/api/").removesuffix(".md") for page in PAGES if page.startswith("docs/api/")]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.detectron2] if name == "detectron2" else []) for name in API]
)
def test_the_api_has_a_section_for_every_public_class_and_function(name):
    module = importlib.import_module(f"dyhead.{name}")
    page, source = PAGES[f"docs/api/{name}.md"], inspect.getsource(module)
    for public in module.__all__:
        thing = getattr(module, public)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)) or f'"{public}"' not in source:
            continue  # a module, a table, or a class that is made from one
        section = page.split(f"\n## {public}\n")[1].split("\n## ")[0]
        first = re.split(r"[`:\n]", inspect.getdoc(thing))[0].strip()
        assert first[:60] in section, public
        function = vars(thing).get("__init__") if inspect.isclass(thing) else thing
        if dataclasses.is_dataclass(thing) or function is None:
            continue
        parameters = [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]
        assert all(re.search(rf"\b{parameter}\b", section) for parameter in parameters), public


def test_there_is_a_page_for_every_package_with_public_names():
    packages = [path.parent.name for path in ROOT.glob("dyhead/*/__init__.py") if "__all__ = [" in path.read_text()]
    assert sorted(f"docs/api/{name}.md" for name in [*packages, "layers.mmcv"]) == sorted(set(PAGES) - set(WRITTEN))


def test_a_docstring_becomes_markdown(monkeypatch):
    docstring = """Does it, see :func:`other` and :class:`~dyhead.ops.Thing`.

        y = a * x

    Args:
        x: where; ``None``
            is nowhere.
        y, z: more.

    Returns:
        A :meth:`Thing.part`.

    Example:
        Words.

        >>> f(1)
        2
    """
    node = api_pages.ast.parse("def f(): ...").body[0]
    symbols = [api_pages.Symbol("dyhead.ops", name, "dyhead.ops.source", node) for name in ("other", "Thing")]
    assert api_pages._markdown(docstring, "dyhead.layers", symbols) == (
        "Does it, see [`other`](ops.md#other) and [`dyhead.ops.Thing`](ops.md#thing).\n\n    y = a * x\n\n"
        "**Args**\n\n* `x`: where; `None` is nowhere.\n* `y, z`: more.\n\n**Returns**\n\nA `Thing.part`.\n\n"
        "**Example**\n\nWords.\n\n```python\n>>> f(1)\n2\n```"
    )


def test_a_signature_has_what_the_source_says():
    node = api_pages.ast.parse("class C:\n    def __init__(self, a, b: int = 1, *, c=(2, 3), **d) -> None: ...").body[0]
    assert api_pages._signature("C", node) == "```python\nC(a, b: int = 1, *, c=(2, 3), **d)\n```"
    node = api_pages.ast.parse("class D(C): ...").body[0]
    assert api_pages._signature("D", node) == "```python\nclass D(C)\n```"


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    for page in ("index.html", "faq/index.html", "api/layers/index.html", "architecture.svg"):
        assert (tmp_path / "site" / page).exists()
