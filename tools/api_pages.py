"""Pages of the API from docstrings, and what else docs/ needs to be a site: a hook of MkDocs (mkdocs.yml).

Sources are parsed, not imported, so that the site is built without PyTorch, Detectron2 or a compiler. A page has what
the `__all__` of a package, or of a module in `MODULES`, lists.

    python -m tools.api_pages FOLDER    # write the pages without MkDocs
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Modules with a page of their own, beside the packages in dyhead/.
MODULES = ("dyhead.layers.mmcv",)
_SECTIONS = ("Args", "Arguments", "Attributes", "Example", "Examples", "Note", "Raises", "Returns", "Yields")


@dataclass(frozen=True)
class Symbol:
    """A public name: where it is listed, and what defines it."""

    page: str  # the dotted name of the package or module that lists it
    name: str
    module: str  # that defines it
    node: ast.ClassDef | ast.FunctionDef

    @property
    def link(self) -> str:
        """The address of its section, from another page of the API."""
        return f"{_file(self.page)}#{self.name.lower()}"


def pages() -> dict[str, str]:
    """Markdown by file name, api/ops.md and so on."""
    listed = {page: _symbols(page) for page in _documented()}
    symbols = [symbol for group in listed.values() for symbol in group]
    return {f"api/{_file(page)}": _page(page, group, symbols) for page, group in listed.items()}


def _documented() -> list[str]:
    packages = (path.parent.name for path in sorted((ROOT / "dyhead").glob("*/__init__.py")))
    found = [f"dyhead.{name}" for name in packages if _listed(_tree(f"dyhead.{name}"))]
    return sorted([*found, *MODULES])


def _file(page: str) -> str:
    return page.removeprefix("dyhead.") + ".md"


def _path(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _tree(module: str) -> ast.Module:
    path = _path(module)
    return ast.parse(path.read_text(encoding="utf-8")) if path else ast.Module([], [])


def _listed(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return [name for name in ast.literal_eval(node.value)]
    return []


def _symbols(page: str) -> list[Symbol]:
    found = ((name, _definition(page, name)) for name in _listed(_tree(page)))
    return [Symbol(page, name, *definition) for name, definition in found if definition]


def _definition(module: str, name: str) -> tuple[str, ast.ClassDef | ast.FunctionDef] | None:
    """The module and node that define a class or function, followed through imports; None for anything else."""
    for node in _tree(module).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    package = module if (_path(module) or ROOT).name == "__init__.py" else module.rpartition(".")[0]
                    source = ".".join(filter(None, [package if node.level else "", node.module]))
                    return None if source == module else _definition(source, alias.name)  # its own: a module
    return None


def _page(page: str, group: list[Symbol], symbols: list[Symbol]) -> str:
    parts = [f"# {page}", _markdown(ast.get_docstring(_tree(page)) or "", page, symbols)]
    for symbol in group:
        parts += [f"## {symbol.name}", _signature(symbol.name, symbol.node)]
        parts.append(_markdown(ast.get_docstring(symbol.node) or "", page, symbols))
        if isinstance(symbol.node, ast.ClassDef):
            for method in _public_methods(symbol.node):
                is_property = any(getattr(decorator, "id", "") == "property" for decorator in method.decorator_list)
                parts.append(f"**{method.name}**" + (" (property)" if is_property else ""))
                parts += [] if is_property else [_signature(method.name, method)]
                parts.append(_markdown(ast.get_docstring(method) or "", page, symbols))
    return "\n\n".join(part for part in parts if part) + "\n"


def _public_methods(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef) and not child.name.startswith("_") and ast.get_docstring(child):
            yield child


def _signature(name: str, node: ast.ClassDef | ast.FunctionDef) -> str:
    returns = ""
    if isinstance(node, ast.FunctionDef):
        arguments = _arguments(node)
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    else:
        constructors = [x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "__init__"]
        fields = [x for x in node.body if isinstance(x, ast.AnnAssign) and not ast.unparse(x.target).startswith("_")]
        if constructors:
            arguments = _arguments(constructors[0])
        elif not fields:  # the base's
            return f"```python\nclass {name}({', '.join(map(ast.unparse, node.bases))})\n```"
        else:
            arguments = [f"{ast.unparse(field.target)}: {ast.unparse(field.annotation)}" for field in fields]
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {argument},\n" for argument in arguments) + f"){returns}"
    return f"```python\n{line}\n```"


def _arguments(node: ast.FunctionDef) -> list[str]:
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    texts = [_argument(*pair) for pair in zip(positional, defaults, strict=True)]
    if positional and positional[0].arg in ("self", "cls"):
        texts = texts[1:]
    if given.vararg or given.kwonlyargs:
        texts.append(f"*{ast.unparse(given.vararg)}" if given.vararg else "*")
    texts += [_argument(*pair) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return [*texts, f"**{ast.unparse(given.kwarg)}"] if given.kwarg else texts


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    text = ast.unparse(argument)
    if default is None:
        return text
    return f"{text} = {ast.unparse(default)}" if argument.annotation else f"{text}={ast.unparse(default)}"


def _markdown(docstring: str, page: str, symbols: list[Symbol]) -> str:
    """A docstring in Google's form as Markdown; roles become links where what they name has a section."""
    out: list[str] = []
    lines = inspect.cleandoc(docstring).splitlines()
    while lines:
        line = lines.pop(0)
        title = line.removesuffix(":")
        if title not in _SECTIONS or not line.endswith(":"):
            out.append(_inline(line, page, symbols) if not line.startswith("    ") else line)
            continue
        body = []
        while lines and (not lines[0] or lines[0].startswith("    ")):
            body.append(lines.pop(0))
        text = textwrap.dedent("\n".join(body)).strip("\n")
        out += ["", f"**{title}**", ""]
        if title.startswith("Example"):
            out += _examples(text)
        elif title in ("Args", "Arguments", "Attributes", "Raises"):
            entries = re.split(r"\n(?=\S)", text)
            out += [_entry(" ".join(entry.split()), page, symbols) for entry in entries]
        else:
            out.append(_inline(text, page, symbols))
        out.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip("\n")


def _entry(text: str, page: str, symbols: list[Symbol]) -> str:
    names, colon, meaning = text.partition(": ")
    if not colon:
        return f"* {_inline(text, page, symbols)}"
    return f"* `{names}`: {_inline(meaning, page, symbols)}"


def _examples(text: str) -> list[str]:
    """Doctests as code; the text between them as it is."""
    out: list[str] = []
    for block in text.split("\n\n"):
        is_code = block.lstrip().startswith(">>>")
        out += ["```python", block, "```", ""] if is_code else [block, ""]
    return out


def _inline(text: str, page: str, symbols: list[Symbol]) -> str:
    text = re.sub(r":math:`([^`]*)`", r"*\1*", text)
    text = re.sub(r":[a-z]+:`~?([^`<]*)`", lambda match: _reference(match[1], page, symbols), text)
    return text.replace("``", "`")


def _reference(target: str, page: str, symbols: list[Symbol]) -> str:
    """What a role names as code, with a link if it has a section."""
    name = target.rpartition(".")[2]
    scope = target.rpartition(".")[0]
    found = [s for s in symbols if s.name == name and (not scope or scope in (s.page, s.module))]
    here = [s for s in found if s.page == page]
    if len(here or found) != 1:
        return f"`{target}`"
    (symbol,) = here or found
    return f"[`{target}`]({'#' + symbol.name.lower() if here else symbol.link})"


# What MkDocs calls.


def on_config(config):
    """Appends the pages of the API to the menu."""
    config["nav"].append({"API": [{page: f"api/{_file(page)}"} for page in _documented()]})
    return config


def on_files(files, config):
    """Adds the pages of the API, and the pictures outside docs/ that its pages show."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    for path in sorted((ROOT / "docs").glob("*.md")):
        for picture in re.findall(r"!\[[^]]*\]\(\.\./([^)]+)\)", path.read_text(encoding="utf-8")):
            files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Pictures from outside docs/ are part of the site; files and folders there are named, without a link."""
    markdown = re.sub(r"(!\[[^]]*\]\()\.\./", r"\1", markdown)
    return re.sub(r"(?<!!)\[([^]]*)\]\(\.\./[^)]*\)", r"\1", markdown)


if __name__ == "__main__":
    for name, text in pages().items():
        path = Path(sys.argv[1], name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
