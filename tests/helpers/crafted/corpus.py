"""All crafted inputs."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from tests.helpers import odd_deepspeed, odd_settings
from tests.helpers.crafted.kinds import DEEPSPEED, KINDS, SETTINGS
from tests.helpers.crafted.special import special
from tests.helpers.crafted.variants import DOCUMENTS, FILES, Change, Input, bytes_, in_object


def at(file: str, change: Change) -> Change:
    """Apply ``change`` to one file of a folder."""
    return lambda folder: change(folder / file)


@cache
def inputs(kind: str) -> tuple[Input, ...]:
    """Return every input of one kind."""
    return tuple(_of_kind(kind))


def find(wanted: Sequence[tuple[str, str]]) -> list[Input]:
    kinds = dict.fromkeys(kind for kind, _ in wanted)
    known = {(one.kind, one.name): one for kind in kinds for one in inputs(kind)}
    return [known[key] for key in wanted]


def _of_kind(kind: str) -> Iterator[Input]:
    if kind in SETTINGS:
        for setting in odd_settings.odd(SETTINGS[kind]):
            yield Input(kind, setting.name, lambda _: None, setting.open)
        return
    if kind == DEEPSPEED:
        for config in odd_deepspeed.odd():
            yield Input(kind, config.name, lambda _: None, config.open)
        return
    about = KINDS[kind]
    for file in about.files:
        for name, change in FILES.items():
            if (file, name) == ("passphrase", "fifo"):
                continue  # a descriptor is one: `--passphrase-file <(...)`
            if kind == "checkpoint" and name == "8 GiB of holes":
                continue  # a checkpoint may be as long
            yield Input(kind, f"{file}: {name}", at(file, change))
        if file.endswith((".json", ".jsonl", ".yaml", ".pub")):
            for name, change in DOCUMENTS.items():
                yield Input(kind, f"{file}: {name}", at(file, change))
    with tempfile.TemporaryDirectory() as place:
        about.make(Path(place))
        for file in about.json:
            lines = [(Path(place) / file).read_text()]
            if file.endswith(".jsonl"):
                lines = lines[0].splitlines(keepends=True)
            seen: set[str] = set()
            for number, line in enumerate(lines):
                values = json.loads(line)
                signature = str(values.get("kind")) + str(sorted(values))
                if signature in seen:
                    continue
                seen.add(signature)
                for name, text in in_object(values, about.depth):
                    before = "".join(lines[:number]).encode()
                    after = b"\n" + "".join(lines[number + 1 :]).encode()
                    where = f"{file}, {number + 1}" if len(lines) > 1 else file
                    yield Input(kind, f"{where}: {name}", at(file, bytes_(before + text + after)))
    for name, change in special(kind):
        yield Input(kind, name, change)
