"""YAML without surprises: unique keys, and bounded size and depth, including what aliases repeat.

    settings = read_settings(Path("recipe.yaml"), "--config recipe.yaml")

Used for files and, as the loader of jsonargparse, for values on the command line.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_loader

from pmp_ds.errors import UserError
from pmp_ds.foreign import read_bytes

MAX_BYTES = 1 << 18
MAX_DEPTH = 16
MAX_NODES = 20_000  # values, each counted as often as aliases repeat it
_QUOTES = "text that begins with one of [ { * & ! % @ needs quotes"
_FLOAT = "tag:yaml.org,2002:float"
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """A loader that refuses YAML whose meaning differs from its looks."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if self._depth >= MAX_DEPTH:
            raise _Refused(f"nested more than {MAX_DEPTH} deep", event)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _extent(node, {})
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _Refused("a key must be a word", key_node)
            key = "<<" if key_node.tag == _MERGE else self.construct_object(key_node)
            if key in lines:
                raise _Refused(
                    f"{key_node.value} appears twice, in line {lines[key]} too: the first would be "
                    "ignored; merge them",
                    key_node,
                )
            lines[key] = key_node.start_mark.line + 1
        return node


class _Refused(yaml.MarkedYAMLError):
    def __init__(self, problem: str, at: Any) -> None:
        super().__init__(problem=problem, problem_mark=at.start_mark)

    def __str__(self) -> str:
        return _in_words(self)


def _extent(node: Any, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return how many values a node has and their depth, with aliases expanded. Raises _Refused
    beyond the bounds, and for a node that contains itself."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = (MAX_NODES, MAX_DEPTH)  # until it is known; seen again, it contains itself
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in children for child in pair]
    inner = [_extent(child, known) for child in children]
    found = 1 + sum(count for count, _ in inner), 1 + max((deep for _, deep in inner), default=0)
    if found[0] > MAX_NODES:
        raise _Refused(f"its aliases expand to more than {MAX_NODES:,} values", node)
    if found[1] > MAX_DEPTH + 1:
        raise _Refused(f"nested more than {MAX_DEPTH} deep by its aliases", node)
    known[id(node)] = found
    return found


def _resolvers() -> Iterator[tuple[str, Any]]:
    """Yield YAML 1.1's resolvers, except that `1e-3` is a number and a date is text."""
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items():
        yield first, [(tag, rule) for tag, rule in rules if tag not in (_FLOAT, _TIMESTAMP)]


_Loader.yaml_implicit_resolvers = dict(_resolvers())
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"([-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse(text: str) -> Any:
    """Return the value of ``text``. Raises ``yaml.YAMLError``."""
    try:
        return _apart(yaml.load(text, _Loader))
    except (ValueError, OverflowError) as error:  # 0b2, 9:99:99 and other invalid numbers
        raise yaml.YAMLError(str(error)) from error


def _apart(value: Any) -> Any:
    """Return an equal value in which every repetition by an alias is a separate object."""
    if isinstance(value, dict):
        return {key: _apart(one) for key, one in value.items()}
    return [_apart(one) for one in value] if isinstance(value, list) else value


def read_settings(path: Path, name: str) -> dict[str, Any]:
    """Return the mapping in a file. Raises UserError that begins with ``name``."""
    try:
        settings = parse(read_bytes(path, MAX_BYTES).decode("utf-8-sig"))
    except ValueError as error:  # a ForeignError too
        raise UserError(f"{name} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        if isinstance(error, _Refused):
            raise UserError(f"{name}, {error}") from error
        raise UserError(f"{name} is not YAML: {_in_words(error)}; {_QUOTES}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{name} contains no settings: write `name: value` lines")
    for key in settings:
        if not isinstance(key, str):
            raise UserError(f"{name}: {key!r} is not a setting: write `name: value` lines")
    seen: set[str] = set()
    for dotted in _paths(settings):
        if dotted in seen:
            raise UserError(f"{name}: {dotted} appears twice; remove one")
        seen.add(dotted)
    return settings


def _in_words(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.context_mark or error.problem_mark  # the beginning tells more
        if mark is not None:
            return f"line {mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())


def _paths(settings: dict[Any, Any], above: str = "") -> Iterator[str]:
    """Yield the dotted names of all values: `{train.lr: 1}` and `{train: {lr: 1}}` are the same."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _paths(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


def _parse_value(text: str) -> Any:
    """Return a value of the command line; `{a, b}` and `a:` are text, not mappings to null."""
    value = parse(text)
    return text if isinstance(value, dict) and value and ":" not in text.strip()[:-1] else value


set_loader("yaml", _parse_value, (yaml.YAMLError,))
