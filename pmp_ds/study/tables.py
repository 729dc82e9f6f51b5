"""One table, written as Markdown, LaTeX and HTML."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from pmp_ds.errors import shown

_MARKDOWN = "\\`|<"
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}


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
        """A table environment that needs no package."""
        lines = [" & ".join(map(_latex, line)) + r" \\" for line in (self.head, *self.rows)]
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                r"\small",
                rf"\begin{{tabular}}{{{'l' * len(self.head)}}}",
                r"\hline",
                lines[0],
                r"\hline",
                *lines[1:],
                r"\hline",
                r"\end{tabular}",
                rf"\caption{{{_latex(self.caption)}}}",
                rf"\label{{tab:{self.name}}}",
                r"\end{table}",
                "",
            ]
        )

    def html(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            scope = ' scope="col"' if tag == "th" else ""
            return "<tr>" + "".join(f"<{tag}{scope}>{as_html(c)}</{tag}>" for c in cells) + "</tr>"

        body = "\n".join(line(row, "td") for row in self.rows)
        return (
            '<div class="wide"><table>\n'
            f"<caption>{as_html(self.caption)}</caption>\n<thead>{line(self.head, 'th')}</thead>\n"
            f"<tbody>\n{body}\n</tbody>\n</table></div>"
        )


def plain(text: str) -> str:
    """Return ``text`` for Markdown, where it stands for itself."""
    escaped = "".join(f"\\{c}" if c in _MARKDOWN else c for c in shown(text))
    return escaped.replace("](", "]\\(")  # a link; intervals have brackets too


def as_html(text: str) -> str:
    """Return ``text`` for HTML, where it stands for itself."""
    return html.escape(shown(text))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in shown(text))
