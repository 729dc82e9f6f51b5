"""The report as Markdown and as one HTML file that needs nothing beside it."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from pmp_ds.errors import shown
from pmp_ds.study.figures import Picture
from pmp_ds.study.tables import Table, plain


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it, in order; strings are paragraphs."""

    title: str
    parts: Sequence[str | Table | Picture]


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Return the report as Markdown, pictures by their path below its folder."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", "", *map(_markdown, section.parts)]
    return "\n".join(lines)


def _markdown(part: str | Table | Picture) -> str:
    match part:
        case Table():
            return part.markdown()
        case Picture():
            return f"![{plain(part.alt)}](figures/{part.name}.png)\n\n{plain(part.caption)}\n"
        case _:
            return f"{plain(part)}\n"


def page(title: str, sections: Sequence[Section], figures: Path) -> str:
    """Return the report as HTML, with the pictures of the folder ``figures`` inside."""

    def content(name: str) -> str:
        return base64.b64encode((figures / f"{name}.png").read_bytes()).decode()

    return _PAGE.render(title=title, sections=sections, content=content)


# Every value is escaped, and spelled out where a browser or an editor would obey it.
_PAGE = jinja2.Environment(
    autoescape=True, finalize=shown, trim_blocks=True, keep_trailing_newline=True
).from_string("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
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
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% for part in section.parts %}
{% if part is string %}
<p>{{ part }}</p>
{% elif part.rows is defined %}
<div class="wide"><table>
<caption>{{ part.caption }}</caption>
<thead><tr>{% for cell in part.head %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in part.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% else %}
<figure><img src="data:image/png;base64,{{ content(part.name) }}" alt="{{ part.alt }}">
<figcaption>{{ part.caption }}</figcaption></figure>
{% endif %}
{% endfor %}
{% endfor %}
</body>
</html>
""")
