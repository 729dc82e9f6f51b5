"""The report as Markdown and as one HTML file that needs nothing beside it."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pmp_ds.study.figures import Picture
from pmp_ds.study.tables import Table, as_html, plain


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it, in order; strings are paragraphs."""

    title: str
    parts: Sequence[str | Table | Picture]


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Pictures by their path below the report's folder."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for part in section.parts:
            match part:
                case Table():
                    lines.append(part.markdown())
                case Picture():
                    text = (
                        f"![{plain(part.alt)}](figures/{part.name}.png)\n\n{plain(part.caption)}\n"
                    )
                    lines.append(text)
                case _:
                    lines.append(f"{plain(part)}\n")
    return "\n".join(lines)


def page(title: str, sections: Sequence[Section], figures: Path) -> str:
    """Self-contained: pictures of the folder ``figures`` are inside."""
    body = [f"<h1>{as_html(title)}</h1>"]
    for section in sections:
        body.append(f"<h2>{as_html(section.title)}</h2>")
        for part in section.parts:
            match part:
                case Table():
                    body.append(part.html())
                case Picture():
                    body.append(_figure(part, figures))
                case _:
                    body.append(f"<p>{as_html(part)}</p>")
    return _PAGE.format(title=as_html(title), style=_STYLE, body="\n".join(body))


def _figure(picture: Picture, figures: Path) -> str:
    content = base64.b64encode((figures / f"{picture.name}.png").read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{content}" alt="{as_html(picture.alt)}">\n'
        f"<figcaption>{as_html(picture.caption)}</figcaption></figure>"
    )


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h2:first-of-type + p { font-size: 1.15em; font-weight: 600; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: 0.4rem; opacity: 0.8; }
th, td { padding: 0.25rem 0.6rem; text-align: left; white-space: nowrap; }
th { border-bottom: 1px solid var(--line); }
tbody tr:nth-child(odd) { background: var(--soft); }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
figcaption { font-size: 0.85rem; opacity: 0.8; }
"""
