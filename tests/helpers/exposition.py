"""A strict reader of Prometheus' text format, for the files that a run writes.

The rules are those that `promtool check metrics` and node_exporter's textfile collector apply: HELP
and TYPE once and before the samples of their family, names and labels well formed, no sample twice,
no time stamps (the collector refuses them), counters end in `_total`, and nothing else does.
"""

import re

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"({NAME})\{{({LABEL}(?:,{LABEL})*)\}} (NaN|[+-]Inf|-?[0-9.]+(?:e[+-]?\d+)?)")


def parse(text: str) -> dict[tuple[str, str], float]:
    """Return the samples by name and labels; AssertionError for whatever breaks a rule."""
    assert text.endswith("\n")
    kinds: dict[str, str] = {}
    helped: list[str] = []
    found: dict[tuple[str, str], float] = {}
    order: list[str] = []
    for line in text.splitlines():
        if match := re.fullmatch(rf"# HELP ({NAME}) (\S.*)", line):
            assert match[1] not in helped, f"a second HELP: {line}"
            helped.append(match[1])
        elif match := re.fullmatch(rf"# TYPE ({NAME}) (gauge|counter)", line):
            assert match[1] not in kinds, f"a second TYPE: {line}"
            assert helped[-1] == match[1], f"TYPE without HELP: {line}"
            kinds[match[1]] = match[2]
            assert match[1].endswith("_total") == (match[2] == "counter"), line
        else:
            match = SAMPLE.fullmatch(line)
            assert match is not None, f"not a sample: {line!r}"
            name, labels, value = match.groups()
            assert list(kinds)[-1] == name, f"a sample outside its family: {line}"
            assert (name, labels) not in found, f"a sample twice: {line}"
            found[name, labels] = float(value)
            order.append(name)
    assert set(kinds) == set(order), "a family without samples"
    return found
