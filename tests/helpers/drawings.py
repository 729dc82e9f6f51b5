"""The drawings of docs/CONCEPTS.md, as SVG: shapes and words, without a library.

python -m tests.helpers.drawings        # writes docs/drawings/*.svg
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from tests.helpers.distributed import REPO

FOLDER = REPO / "docs" / "drawings"

INK, GREY, PAPER = "#1f2937", "#6b7280", "#ffffff"
TICKET, FROZEN, SECRET, PLAIN = "#2563eb", "#d1d5db", "#fee2e2", "#f3f4f6"
RANKS = ("#2563eb", "#0d9488", "#d97706", "#9333ea")
"""One colour for what each of four ranks holds alone."""


def text(x: float, y: float, words: str, *, size: int = 14, fill: str = INK, **more: str) -> str:
    """Return words that start at (x, y); ``anchor="middle"`` centres them there."""
    anchor = more.get("anchor", "start")
    weight = more.get("weight", "normal")
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{escape(words)}</text>'
    )


def box(x: float, y: float, width: float, height: float, fill: str, *, line: str = INK) -> str:
    """Return a rectangle."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" '
        f'stroke="{line}" rx="3"/>'
    )


def arrow(x: float, y: float, end: float) -> str:
    """Return an arrow to the right, from (x, y) to (end, y)."""
    head = f"{end:g},{y:g} {end - 9:g},{y - 5:g} {end - 9:g},{y + 5:g}"
    return (
        f'<line x1="{x:g}" y1="{y:g}" x2="{end - 8:g}" y2="{y:g}" stroke="{INK}" '
        f'stroke-width="2"/><polygon points="{head}" fill="{INK}"/>'
    )


def grid(x: float, y: float, kept: Sequence[int], trained: str) -> str:
    """Return a matrix of weights, 6 wide: those ``kept`` in one colour, the others grey."""
    cells = []
    for place, bit in enumerate(kept):
        left, top = x + 18 * (place % 6), y + 18 * (place // 6)
        cells.append(box(left, top, 16, 16, trained if bit else FROZEN, line="none"))
    return "".join(cells)


def svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """Return a picture on white paper, so that it is readable on a dark page."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{escape(title)}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
    )
    paper = box(0, 0, width, height, PAPER, line="none")
    return "\n".join([head, f"<title>{escape(title)}</title>", paper, *parts, "</svg>"]) + "\n"


MASK = (1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1)
"""17 of 24: about the default density of 0.7."""


def stages() -> str:
    """Return the three stages, what each gives to the next, and what leaves."""
    names = ("I. Discover", "Rewind", "II. Train the ticket", "III. Release")
    notes = (
        ("train densely; score each", "element by its gradients", "until the top 70% is stable"),
        ("back to the initial weights", "theta(0); the ticket", "(blue) is known"),
        ("update the ticket alone;", "the complement (grey)", "keeps its initial value"),
        ("all weights, without", "the mask", ""),
    )
    whole = (1,) * len(MASK)
    grids = ((whole, "#93c5fd"), (MASK, "#bfdbfe"), (MASK, TICKET), (whole, "#94a3b8"))
    parts = [
        box(10, 14, 640, 196, SECRET, line="#fca5a5"),
        box(670, 14, 200, 196, PLAIN, line="#d1d5db"),
    ]
    for i, (name, lines, (kept, colour)) in enumerate(zip(names, notes, grids, strict=True)):
        x = 28 + 220 * i
        parts += [text(x, 40, name, size=16, weight="bold"), grid(x, 54, kept, colour)]
        parts += [text(x, 150 + 18 * j, line, size=13) for j, line in enumerate(lines)]
        if i < 3:
            parts.append(arrow(x + 116, 88, x + 212))
    parts += [
        text(144, 78, "ticket", size=12, fill=GREY),
        text(364, 78, "mask", size=12, fill=GREY),
        text(584, 78, "export", size=12, fill=GREY),
        text(
            28,
            232,
            "private: key of theta(0), ticket, checkpoints, ledger",
            size=13,
            fill="#b91c1c",
        ),
        text(688, 232, "public: runs/NAME/release/", size=13, fill=INK),
    ]
    return svg(880, 246, "The three stages of Private Mask Pre-Training", parts)


ROWS = (
    ("16-bit weights", "dense"),
    ("gradients", "dense"),
    ("fp32 master weights", "dense"),
    ("moments", "ticket"),
    ("mask, 1 bit each", "dense"),
)
"""What an update needs, and whether it exists for all elements or for the ticket's alone."""

WHOLE_BELOW = {1: 2, 3: 0}
"""Of a ZeRO stage: how many of ``ROWS``, from the top, every rank holds whole."""


def ownership() -> str:
    """Return what each of four ranks holds of one model, under ZeRO 1 and ZeRO 3."""
    parts = []
    for column, stage in enumerate(WHOLE_BELOW):
        left = 170 + 366 * column
        parts.append(text(left, 28, f"ZeRO {stage}", size=16, weight="bold"))
        for rank in range(4):
            x = left + 84 * rank
            parts.append(text(x + 38, 50, f"rank {rank}", size=12, fill=GREY, anchor="middle"))
            for row, (_, extent) in enumerate(ROWS):
                y = 60 + 34 * row
                parts.append(box(x, y, 76, 24, PLAIN, line="#d1d5db"))
                whole = row < WHOLE_BELOW[stage]
                start, width = (0.0, 76.0) if whole else (19.0 * rank, 19.0)
                if extent == "ticket":
                    width *= 0.7
                fill = "#94a3b8" if whole else RANKS[rank]
                parts.append(box(x + start, y, width, 24, fill, line="none"))
    for row, (name, extent) in enumerate(ROWS):
        y = 60 + 34 * row
        parts.append(text(12, y + 11, name, size=13))
        words = "all elements" if extent == "dense" else "the ticket's alone"
        parts.append(text(12, y + 25, words, size=11, fill=GREY))
    parts += [
        box(170, 240, 14, 14, "#94a3b8", line="none"),
        text(190, 252, "the same on every rank", size=12),
        *(box(356 + 16 * i, 240, 14, 14, colour, line="none") for i, colour in enumerate(RANKS)),
        text(426, 252, "this rank's share, on no other rank", size=12),
    ]
    return svg(880, 268, "What a rank holds under ZeRO 1 and ZeRO 3", parts)


DRAWINGS: dict[str, Callable[[], str]] = {"stages.svg": stages, "ownership.svg": ownership}


def main() -> list[Path]:
    """Write every drawing and return their paths."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
    return [FOLDER / name for name in DRAWINGS]


if __name__ == "__main__":
    print(*main(), sep="\n")
