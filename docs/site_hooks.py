"""A hook of mkdocs (mkdocs.yml): what GitHub's Markdown allows and Python-Markdown does not.

A list or table may follow a line of text there; here a blank line has to stand between them.
"""

import re
from typing import Any

_ITEM = re.compile(r"(?:[-*]|\d+\.) ")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with a blank line before each list and table that follows text."""
    found: list[str] = []
    fenced = inside = False
    for line in markdown.split("\n"):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        starts = _ITEM.match(line) or line.startswith("|")
        before = found[-1] if found else ""
        if not fenced and starts and not inside and before and not before.startswith(("#", "|")):
            found.append("")
        found.append(line)
        if not fenced:
            inside = bool(_ITEM.match(line)) or (inside and line.startswith(" ") and line != "")
    return "\n".join(found)
