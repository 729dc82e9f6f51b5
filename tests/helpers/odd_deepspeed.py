"""DeepSpeed JSONs with every key that DeepSpeed knows and every odd value.

python -m tests.helpers.crafted 'DeepSpeed JSON'    # a table of what became of them
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmp_ds.config import TrainConfig
from pmp_ds.engine import deepspeed_keys
from pmp_ds.engine.deepspeed_config import OWN_SECTION, merge, read_json
from pmp_ds.engine.deepspeed_refused import REFUSED

CONFIG = TrainConfig(global_batch_size=4, micro_batch_size=4, precision="bf16")
VALUES = (
    "null",
    '"text"',
    '""',
    "-1",
    "-0.5",
    "NaN",
    "Infinity",
    "1e400",
    f"{10**30}",
    "true",
    "false",
    "[]",
    '["a"]',
    "{}",
    '{"a": {"b": 1}}',
    '"auto"',
    "0",
    "1",
)


class Asked(dict[str, Any]):
    """Record which keys DeepSpeed reads from a JSON object."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.keys_asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> "Asked":
        return self


@dataclass(frozen=True)
class Odd:
    """Describe one JSON file."""

    kind: str
    text: str
    name: str

    def open(self, folder: Path) -> None:
        """Read and merge the file. Raises UserError if it is refused."""
        from deepspeed.runtime.config import DeepSpeedConfig

        path = folder / "odd.json"
        path.write_text(self.text)
        DeepSpeedConfig(merge(read_json(path), CONFIG, 1))
        assert self.kind == "value", f"accepted though {self.kind}"


def every_key(model: Any = None, above: str = "") -> Iterator[str]:
    """Return every key of every section, dotted."""
    model = model or deepspeed_keys._top()
    for name, field in model.model_fields.items():
        where = f"{above}{field.alias or name}"
        yield where
        for kind in deepspeed_keys._kinds(field.annotation):
            if hasattr(kind, "model_fields"):
                yield from every_key(kind, f"{where}.")


def odd() -> Iterator[Odd]:
    own = [OWN_SECTION, f"{OWN_SECTION}.compact_master", f"{OWN_SECTION}.master"]
    every = dict.fromkeys([*every_key(), *REFUSED, *own])
    for key in every:
        for value in VALUES:
            yield Odd("value", _nested(key, value), f"{key} = {value}")
        yield Odd("misspelt", _nested(f"{key}z", "1"), f"{key}z")
        *above, last = key.split(".")
        twice = f'1, "{last}": 1'
        yield Odd("duplicate", _nested(".".join([*above, last]), twice), f"{key} twice")
    large = '{"a": "' + "x" * 300_000 + '"}'
    for text in (
        "",
        "[" * 100_000,
        '{"a": ' * 40_000,
        large,
        "x",
        "nan",
        "[]",
        "{}x",
        '"a"',
        "{'a': 1}",
        '{"a": 1,}',
    ):
        yield Odd("not an object", text, f"{text[:9]!r}, {len(text)} characters")
    yield Odd("value", "\ufeff{}", "a byte order mark")


def _nested(dotted: str, value: str) -> str:
    text = value
    first, *rest = reversed(dotted.split("."))
    text = f'{{"{first}": {text}}}'
    for section in rest:
        stage = ', "stage": 2' if section == "zero_optimization" and '"stage"' not in text else ""
        text = f'{{"{section}": {text[:-1]}{stage}}}}}'
    return text
