"""YAML for recipes: the YAML 1.2 reading of plain values, each key's line kept, nothing that can run code.

PyYAML speaks YAML 1.1, where `1e-3` is text, `012345` an octal number, `no` false and `12:30` base sixty.
Here plain values mean what they look like, as in YAML 1.2. Repeated keys, keys that are not text, anchors,
aliases and tags outside the safe ones are refused: the first hide mistakes, the others make files hard to
follow.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from mmkd.data_manifests.errors import InputError
from mmkd.data_manifests.system_errors import cannot_read

Dotted = tuple[str, ...]
"""A path of nested keys."""
MAX_RECIPE_BYTES = 2**20


class _Loader(yaml.SafeLoader):
    """Safe loading with the YAML 1.2 core resolution of plain values."""

    # Empty: PyYAML's own, those of YAML 1.1, would be inherited otherwise, and `no` be false.
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's own form)


_PLAIN = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
for _tag, _pattern, _first in _PLAIN:
    # \Z, since PyYAML matches from the start alone and `$` would let a last line feed pass.
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def read_recipe_file(path: Path) -> str:
    """Return the text of a recipe file (UTF-8, byte order mark allowed)."""
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise InputError(f"{path}: larger than {MAX_RECIPE_BYTES} bytes, so it is not a recipe")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise cannot_read(f"the recipe {path}", error) from error
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read the recipe {path}: it is not UTF-8 text") from error


def parse_yaml(text: str, name: str) -> tuple[dict[str, Any], dict[Dotted, int]]:
    """Return a recipe's nested values and the line, from 1, of every key; InputError names file and line."""
    root = _compose(text, name)
    if root is None:
        return {}, {}
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{name}{_line(root.start_mark)}: a recipe is `key: value` lines")
    lines: dict[Dotted, int] = {}
    _check(root, name, lines, ())
    return _construct(root, name), lines


def parse_text(text: str, name: str) -> Any:
    """Return the value of an option's or variable's text, e.g. `5`, `1e-3`, `[a, b]`, `{a: 1}` or plain text.

    Text that is no YAML by itself (`: x`, `[a`, `@home`) is an InputError unless it cannot mean a structure.
    """
    if not text.strip():
        return text
    try:
        node = _compose(text, name)
        if node is not None:
            _check(node, name, {}, ())
        return None if node is None else _construct(node, name)
    except InputError:
        if text.lstrip()[0] in "[{":
            raise
        return text


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        for event in yaml.parse(text, Loader=_Loader):  # composed nodes show no anchors any more
            if getattr(event, "anchor", None) is not None:
                place = f"{name}{_line(event.start_mark)}"
                raise InputError(f"{place}: anchors and aliases (& and *) are not supported; write it out")
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        place = f"{name}{_line(error.problem_mark or error.context_mark)}"
        raise InputError(f"{place}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{name}: not valid YAML: {' '.join(str(error).split())[:200]}") from error


def _check(node: yaml.Node, name: str, lines: dict[Dotted, int], path: Dotted) -> None:
    """Refuse repeated keys and keys that are not text, and record the line of every key."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check(item, name, {}, ())  # a table of its own: items may have the same keys
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag != "tag:yaml.org,2002:str":
            raise InputError(f"{name}:{line}: a key must be text; put quotes around {key.value!r}")
        where = (*path, key.value)
        if where in lines:
            raise InputError(f"{name}:{line}: key {'.'.join(where)} already stands in line {lines[where]}")
        lines[where] = line
        _check(value, name, lines, where)


def _construct(root: yaml.Node, name: str) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        raise InputError(f"{name}{_line(error.problem_mark)}: {error.problem}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: {error}") from error
    finally:
        loader.dispose()


def _line(mark: Any) -> str:
    return f":{mark.line + 1}" if mark else ""
