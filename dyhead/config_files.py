"""Config files and overrides as they are written, before anything is made of their text.

YAML guesses what a plain word may be: ``2026_11_25`` is the number 20261125 to it, ``1:30`` is 90, ``010`` is 8. Which
of these was meant is known only where the key's default is, so files are read as text here, and :func:`resolve` makes a
value of it.
"""

from __future__ import annotations

import ast
import difflib
import operator
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

BASE = "_BASE_"
_EVAL = "tag:yaml.org,2002:python/object/apply:eval"
_MOST_NODES = 100_000  # a file of a few lines whose aliases nest stands for billions
_NULLS = ("~", "null", "Null", "NULL")
_NUMBER = re.compile(r"[-+]?(\d[\w.]*([eE][-+]\d+)?|\.\d[\w.]*([eE][-+]\d+)?)")
_NOT_FINITE = re.compile(r"[-+]?\.?(inf|nan)", re.IGNORECASE)
# What YAML 1.1 takes for a truth value.
_FLAGS = {
    word: value for value in (True, False) for word in (("yes", "true", "on") if value else ("no", "false", "off"))
}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file or key, what was expected and what came."""


@dataclass(frozen=True)
class Scalar:
    """One word, number or text as it was written; null is None instead.

    Attributes:
        text: without the quotes.
        quoted: whether it was in quotes.
    """

    text: str
    quoted: bool = False


class Section(tuple):
    """In place of a value: keys follow that stand in this one. Holds nothing."""


@dataclass(frozen=True)
class Setting:
    """One key, or one section, that a file or an override sets.

    Attributes:
        key: the full name, "SOLVER.BASE_LR".
        written: a :class:`Scalar`, None for null, a list or tuple of such, or a :class:`Section`.
        origin: file and line, for errors.
    """

    key: str
    written: Any
    origin: str


def packaged_configs() -> Path:
    """The folder of the config files that come with the package: in a checkout, the one beside it."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_file(file: str | os.PathLike) -> str:
    """A config file where it is, or else the one of that name that comes with the package.

    ``configs/quickstart/NAME.yaml``, ``quickstart/NAME.yaml`` and ``NAME.yaml`` are then the same. What neither is
    there comes back as it was.
    """
    path = os.path.expanduser(os.fspath(file))
    if os.path.lexists(path) or os.path.isabs(path) or not path or "\0" in path:
        return path
    parts, folder = Path(os.path.normpath(path)).parts, packaged_configs()
    name = Path(*parts[1:]) if parts[0] == "configs" and len(parts) > 1 else Path(*parts)
    if ".." in parts or name.suffix != ".yaml":
        return path
    there = [folder / name] if (folder / name).is_file() else []
    if not there and len(parts) == 1:
        there = [other for other in folder.rglob("*.yaml") if other.name == name.name]
    return str(there[0]) if len(there) == 1 else path


def read_file(file: str | os.PathLike) -> list[Setting]:
    """The settings of a YAML file after those of its bases (``_BASE_``: a file, or a list of files; later ones win).

    A relative base starts at the folder of the file that names it; ``~`` is the home folder. A file, or a base, that is
    not there may be one that comes with the package, see :func:`find_file`.

    Raises:
        ConfigError: a file is missing, is not UTF-8 or not YAML, has a tag (but :func:`_arithmetic`), is no mapping, or
            has a key twice; bases that name each other.
    """
    try:
        return _read_with_bases(find_file(file), [])
    except RecursionError as error:
        raise ConfigError(f"config file {file}: nested too deeply") from error


def read_overrides(words: Sequence[str]) -> list[Setting]:
    """The settings of ``["SOLVER.BASE_LR", "0.01", ...]``.

    Raises:
        ConfigError: these are no pairs, or an option such as ``--resume`` is among them.
    """
    words = [str(word) for word in words]
    for word in words:
        if word.startswith("--"):
            raise ConfigError(f"overrides: expected KEY VALUE pairs, got {word}; options stand before the first KEY")
    for key in words[::2]:
        if "=" in key:
            name, _, value = key.partition("=")
            raise ConfigError(f"overrides: expected KEY VALUE pairs, got {key}; write {name} {value}")
    if len(words) % 2:
        raise ConfigError(f"overrides: expected KEY VALUE pairs, got {len(words)} words: {' '.join(words):.200}")
    if BASE in words[::2]:
        raise ConfigError(f"overrides: {BASE} stands in files only, got {BASE} {words[words.index(BASE) + 1]}")
    return [Setting(key, Scalar(value), "overrides") for key, value in zip(words[::2], words[1::2], strict=True)]


def shown(value: Any) -> str:
    """How an error shows a value: as Python writes it, in its first 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def resolve(written: Any, *, text: bool, is_list: bool) -> Any:
    """The value that was written.

    Args:
        written: :attr:`Setting.written`.
        text: strings are meant, also by what looks like a number.
        is_list: a list is meant, so that text may be one in Python's notation, ``(1, 2)``.

    Returns:
        None, bool, int of 64 bits, float, str, or lists and tuples of these.
    """
    if is_list and isinstance(written, Scalar):
        entries = _python_list(written.text)
        written = written if entries is None else entries
    return _resolve(written, text)


def _read_with_bases(file: str, above: list[str]) -> list[Setting]:
    """``above``: the files that led to this one."""
    of = f" (a {BASE} of {above[-1]})" if above else ""
    if any(os.path.exists(other) and os.path.exists(file) and os.path.samefile(file, other) for other in above):
        raise ConfigError(f"config file {above[0]}: {BASE} leads back to itself: {' -> '.join([*above, file])}")
    try:
        content = Path(file).read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"config file {file}{of}: no such file{_near_file(file)}") from error
    except (OSError, ValueError) as error:  # ValueError: NUL in its name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"config file {file}{of}: cannot be read: {reason}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {file}{of}: cannot be read: expected UTF-8, got {error}") from error
    bases: list[str] = []
    own = []
    for setting in _Reader(file).settings(text):
        if setting.key.split(".")[0] == BASE:
            bases = _bases(setting)
        else:
            own.append(setting)
    settings = []
    for base in bases:
        path = os.path.join(os.path.dirname(file), os.path.expanduser(base))
        if not os.path.lexists(path) and find_file(base) != base:
            path = find_file(base)
        settings += _read_with_bases(path, [*above, file])
    return settings + own


def _bases(setting: Setting) -> list[str]:
    written = setting.written if type(setting.written) is list else [setting.written]
    if not all(isinstance(base, Scalar) and base.text for base in written):
        raise ConfigError(f"{setting.origin}: {BASE}: expected a file or a list of files")
    for base in written:
        if re.match(r"\w+://", base.text):
            raise ConfigError(f"{setting.origin}: {BASE}: expected a file on this machine, got {base.text}")
    return [base.text for base in written]


class _Reader:
    """Reads one file."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._lines: dict[str, int] = {}  # of the keys so far
        self._nodes = 0

    def settings(self, text: str) -> Iterator[Setting]:
        try:
            loader = yaml.BaseLoader(text)  # every scalar stays text
            loader.name = self._file
            root = loader.get_single_node()
        except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two: "\\UFFFFFFFF"
            raise ConfigError(f"config file {self._file}: not YAML that can be read safely: {error}") from error
        if not isinstance(root, yaml.MappingNode):
            got = {type(None): "nothing", yaml.SequenceNode: "a list"}.get(type(root), "text")
            raise ConfigError(f"config file {self._file}: expected a mapping of keys to values, got {got}")
        yield from self._section(root, "")

    def _section(self, node: yaml.MappingNode, prefix: str) -> Iterator[Setting]:
        for name, key_node, value in self._entries(node):
            key, line = prefix + name, key_node.start_mark.line + 1
            if key in self._lines:
                raise ConfigError(
                    f"config file {self._file}: {key} stands twice, in line {self._lines[key]} and in line {line}"
                )
            self._lines[key] = line
            is_section = isinstance(value, yaml.MappingNode)
            yield Setting(key, Section() if is_section else self._written(value), self._origin(key_node))
            if is_section:
                yield from self._section(value, f"{key}.")

    def _entries(self, node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """Names, and the nodes of keys and values; what ``<<`` merges stands back behind the mapping's own keys."""
        self._count(node)
        merged: list[yaml.Node] = []
        own = set()
        for key, value in node.value:
            self._count(key)
            if not isinstance(key, yaml.ScalarNode) or not key.value:
                raise ConfigError(f"{self._origin(key)}: expected the name of a key")
            if key.value == "<<" and not key.style:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            else:
                own.add(key.value)
                yield key.value, key, value
        for mapping in merged:
            if not isinstance(mapping, yaml.MappingNode):
                raise ConfigError(f"{self._origin(mapping)}: <<: expected a mapping or a list of mappings")
            entries = [entry for entry in self._entries(mapping) if entry[0] not in own]
            own |= {name for name, *_ in entries}
            yield from entries

    def _written(self, node: yaml.Node) -> Any:
        if node.tag == _EVAL:
            return self._evaluated(node)
        self._count(node)
        if isinstance(node, yaml.SequenceNode):
            return [self._written(part) for part in node.value]
        if isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{self._origin(node)}: expected values in a list, got keys")
        if not node.style and node.value in ("", *_NULLS):
            return None
        return Scalar(node.value, quoted=bool(node.style))

    def _evaluated(self, node: yaml.Node) -> Any:
        """What Detectron2's Base-RetinaNet.yaml has for the sizes of its anchors; see :func:`_arithmetic`."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else []
        text = parts[0].value if len(parts) == 1 and isinstance(parts[0], yaml.ScalarNode) else None
        try:
            return _arithmetic(text)
        except (ArithmeticError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{self._origin(node)}: not YAML that can be read safely: after the tag !!python/object/apply:eval, "
                f'expected ["<list of numbers>"], with + - * / ** and "for x in [...]" alone, got {shown(text)} '
                f"({error})"
            ) from error

    def _count(self, node: yaml.Node) -> None:
        if node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise ConfigError(f"{self._origin(node)}: not YAML that can be read safely: it has the tag {tag}")
        self._nodes += 1
        if self._nodes > _MOST_NODES:
            raise ConfigError(f"config file {self._file}: its aliases stand for more than {_MOST_NODES} values")

    def _origin(self, node: yaml.Node) -> str:
        return f"config file {self._file}, line {node.start_mark.line + 1}"


_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_MOST_STEPS = 10_000
_LARGEST = 2.0**53


def _arithmetic(text: str) -> list[Any]:
    """The list that an expression such as ``[[x, x * 2**(1.0/3)] for x in [32, 64]]`` stands for, as if it was written.

    Lists of numbers and nothing else: no names but those that ``for`` introduces, no calls, no attributes.
    """
    nodes = 0

    def value(node: ast.expr, names: dict[str, float]) -> Any:
        nonlocal nodes
        nodes += 1
        if nodes > _MOST_STEPS:
            raise ValueError(f"more than {_MOST_STEPS} steps")
        if isinstance(node, (ast.List, ast.Tuple)):
            return [value(part, names) for part in node.elts]
        if isinstance(node, ast.ListComp) and len(node.generators) == 1:
            (loop,) = node.generators
            if isinstance(loop.target, ast.Name) and isinstance(loop.iter, (ast.List, ast.Tuple)) and not loop.ifs:
                entries = [number(part, names) for part in loop.iter.elts]
                return [value(node.elt, names | {loop.target.id: entry}) for entry in entries]
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, ast.Constant):
            result = node.value
        elif isinstance(node, (ast.BinOp, ast.UnaryOp)) and type(node.op) in _OPERATORS:
            operands = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.operand]
            numbers = [number(operand, names) for operand in operands]
            if isinstance(node.op, ast.Pow):  # of integers it may have millions of digits
                numbers[0] = numbers[0] if 0 <= numbers[1] <= 64 else float(numbers[0])
            result = _OPERATORS[type(node.op)](*numbers)
        else:
            raise ValueError(f"{type(node).__name__} in column {node.col_offset + 1}")
        if type(result) not in (int, float) or not abs(result) <= _LARGEST:
            raise ValueError(f"expected numbers up to {_LARGEST:g}")
        return result

    def number(node: ast.expr, names: dict[str, float]) -> float:
        result = value(node, names)
        if isinstance(result, list):
            raise ValueError("a list in place of a number")
        return result

    if not isinstance(text, str):
        raise ValueError("no text")
    result = value(ast.parse(text.strip(), mode="eval").body, {})
    if not isinstance(result, list):
        raise ValueError("no list")
    return _as_written(result)


def _as_written(result: Any) -> Any:
    return list(map(_as_written, result)) if isinstance(result, list) else Scalar(repr(result))


def _near_file(file: str) -> str:
    folder = Path(os.path.dirname(file) or ".")
    packaged = packaged_configs()
    known = {path.name: str("configs" / path.relative_to(packaged)) for path in sorted(packaged.rglob("*.yaml"))}
    names = known | {path.name: str(path) for path in sorted(folder.glob("*.yaml"))}
    close = difflib.get_close_matches(os.path.basename(file), names, n=1, cutoff=0.75)
    return f"; did you mean {names[close[0]]}?" if close else ""


def _resolve(written: Any, text: bool, nested: bool = False) -> Any:
    if isinstance(written, (list, tuple)):
        return type(written)(_resolve(part, text, nested=True) for part in written)
    if written is None or (written.text == "None" and not written.quoted):
        return None
    if nested and written.quoted:
        return written.text
    if not text:
        word = written.text.strip()
        if word in _NULLS or word == "None":
            return None
        if word in ("True", "False"):
            return word == "True"
        if not written.quoted and word.lower() in _FLAGS:
            return _FLAGS[word.lower()]
        number = _number(word)
        if number is not None:
            return number
    quoted = _python(written.text) if written.text[:1] in ("'", '"') else None
    return quoted if isinstance(quoted, str) else written.text


def _number(word: str) -> int | float | None:
    if _NOT_FINITE.fullmatch(word):
        return float(word.replace(".", ""))
    value = _python(word) if _NUMBER.fullmatch(word) else None
    if type(value) is int and not -(2**63) <= value < 2**63:
        try:
            return float(value)
        except OverflowError:
            return None
    return value if type(value) in (int, float) else None


def _python(text: str) -> Any:
    """The value of a Python literal; None if the text is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _python_list(text: str) -> list | tuple | None:
    """A list or tuple in Python's notation, with its entries as written; None if the text is none."""
    line = " ".join(text.split("\n")).strip()
    if line[:1] not in ("(", "["):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(line, mode="eval").body
            return _written_in_python(tree, line.encode()) if isinstance(tree, (ast.List, ast.Tuple)) else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _written_in_python(node: ast.expr, line: bytes) -> Any:
    if isinstance(node, (ast.List, ast.Tuple)):
        return (list if isinstance(node, ast.List) else tuple)(_written_in_python(part, line) for part in node.elts)
    value = ast.literal_eval(node)
    if value is None:
        return None
    if isinstance(value, str):
        return Scalar(value, quoted=True)
    return Scalar(line[node.col_offset : node.end_col_offset].decode())
