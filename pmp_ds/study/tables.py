"""One table, as Markdown and LaTeX; report.html's template writes it as HTML."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from pmp_ds.errors import shown

_MARKDOWN = re.compile(r"[\\`|<]|(?<=\])\(")  # a link's bracket; intervals have brackets too
_RULES = [{"selector": f"{place}rule", "props": ":hline"} for place in ("top", "mid", "bottom")]
_SMALL = {"selector": "small", "props": ":"}


@dataclass(frozen=True)
class Table:
    """Cells are plain text."""

    name: str
    """Of its files: tables/NAME.md and .tex."""
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        body = "\n".join("| " + " | ".join(map(plain, line)) + " |" for line in lines)
        return f"{body}\n\n{plain(self.caption)}\n"

    def latex(self) -> str:
        """Return a table environment that needs no package."""
        frame = pd.DataFrame(self.rows, columns=list(self.head)).map(shown).rename(columns=shown)
        style = frame.style.hide(axis="index").set_table_styles([_SMALL, *_RULES])
        style = style.format(escape="latex").format_index(escape="latex", axis="columns")
        text: str = style.to_latex(
            column_format="l" * len(self.head),
            position_float="centering",
            caption=re.sub(r"[&%$#_{}]", r"\\\g<0>", self.caption),
            label=f"tab:{self.name}",
        )
        return text.replace("±", r"$\pm$")


def plain(text: str) -> str:
    """Return ``text`` for Markdown, where it stands for itself."""
    return _MARKDOWN.sub(r"\\\g<0>", shown(text))
