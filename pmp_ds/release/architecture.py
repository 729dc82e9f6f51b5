"""The rule of the allow-list for config.json: which keys describe an architecture.

A config may contain anything besides its architecture. A release keeps the keys that its class
declares, and numbers and switches that the architecture's code reads without declaring them, such
as the `head_dim` of a qwen3_moe. Undeclared text is never published.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

_BASE = frozenset(field.name for field in fields(PreTrainedConfig))
_OF_ANY = frozenset({"per_layer_config", "rope_parameters"})  # accepted by every class
_READ = re.compile(r"""\bconfig\.([a-z]\w*)|getattr\(\s*(?:self\.)?config,\s*["']([a-z]\w*)["']""")


@cache
def declared(config_class: type[PreTrainedConfig]) -> frozenset[str]:
    """Return the keys that the class declares, under all their names, without those of every
    config."""
    names = {field.name for field in fields(config_class)} | set(config_class.sub_configs)
    both = config_class.attribute_map.items()
    names |= {one for pair in both if names & set(pair) for one in pair}
    return frozenset(names - _BASE | _OF_ANY)


@cache
def read_by_code(config_class: type[PreTrainedConfig]) -> frozenset[str]:
    """Return the keys read by the source of the models next to the class."""
    own = Path(inspect.getfile(config_class))
    source = own.with_name(own.name.replace("configuration_", "modeling_"))
    text = source.read_text(encoding="utf-8") if source.is_file() else ""
    names = {name for match in _READ.findall(text) for name in match}
    return frozenset(names - set(dir(PreTrainedConfig)) - _BASE)


def kept(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the part of ``config`` that describes its architecture, at every depth."""
    return _kept(type(config), config.to_dict())


def _kept(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in values.items() if _belongs(config_class, key, value)}
    for key, inner in own.items():
        if (part := _part(config_class, key, inner)) is not None:
            own[key] = _kept(part, inner) | {"model_type": part.model_type}
    return own


def strangers(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> Iterator[str]:
    """Yield keys of ``values``, the content of a config of this class, that no architecture needs.

    Nested configs are included; in them the keys of every config are allowed.
    """
    for key, value in values.items():
        if not _belongs(config_class, key, value):
            yield key
        elif (part := _part(config_class, key, value)) is not None:
            inner = {k: v for k, v in value.items() if k not in _BASE | {"model_type"}}
            yield from (f"{key}.{name}" for name in strangers(part, inner))


def _belongs(config_class: Any, key: str, value: Any) -> bool:
    if key in declared(config_class):
        return True
    return key in read_by_code(config_class) and _is_plain(value)


def _part(
    config_class: type[PreTrainedConfig], key: str, value: Any
) -> type[PreTrainedConfig] | None:
    """Return the class of a config inside a config, or None."""
    if key not in config_class.sub_configs or not isinstance(value, dict):
        return None
    kind = value.get("model_type")
    return CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else None  # noqa: SIM401 - no get()


def _is_plain(value: Any) -> bool:
    """Return whether a value is a number, a switch, None, or a list of those."""
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float)
