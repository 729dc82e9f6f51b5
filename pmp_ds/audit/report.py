"""All attacks in order, and the output of an audit: table, audit.json, audit.png."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from pmp_ds import formats
from pmp_ds.audit import derivative, revisions, seeds, shadow, storage, training, values
from pmp_ds.audit.attack import MARGIN, WORDS, Result
from pmp_ds.audit.case import Case
from pmp_ds.run_dir import write_json

FORMAT_VERSION = formats.current("audit")
ATTACKS = (
    *storage.ATTACKS,
    *seeds.ATTACKS,
    *revisions.ATTACKS,
    *derivative.ATTACKS,
    *values.ATTACKS,
    *training.ATTACKS,
    *shadow.ATTACKS,
)
_COLOURS = {"leak": "#c0392b", "open": "#d9822b"}
_GREY = "#888888"


def table(results: Sequence[Result]) -> str:
    """Return one line per attack, with its note below."""
    head = f"{'attack':<32}{'AUC':>6}{'outside':>9}{'IoU':>7}{'chance':>8}  verdict"
    lines = [head, "-" * len(head)]
    for result in results:
        rates = (result.auc, result.auc_outside_embeddings, result.iou, result.chance_iou)
        numbers = "".join(
            f"{'-' if rate is None else f'{rate:.3f}':>{width}}"
            for rate, width in zip(rates, (6, 9, 7, 8), strict=True)
        )
        lines.append(f"{result.attack:<32}{numbers}  {WORDS[result.verdict]}")
        lines += textwrap.wrap(result.note, 96, initial_indent="    ", subsequent_indent="    ")
        if result.verdict == "leak":
            lines.append(f"    countermeasure: {result.countermeasure}")
    lines.append("AUC: 0.5 is chance; outside: outside embeddings; IoU: of the recovered mask")
    return "\n".join(lines)


def as_json(case: Case, results: Sequence[Result]) -> dict[str, Any]:
    """Return the content of audit.json, which depends on the mask and is as private as the run."""
    return {
        "format_version": FORMAT_VERSION,
        "release": str(case.release.folder),
        "num_params": case.release.num_params,
        "sampled": sum(case.sizes()),
        "with_ticket": case.mask is not None,
        "margin": MARGIN,
        "leaks": [result.attack for result in results if result.verdict == "leak"],
        "attacks": [result.as_json() for result in results],
    }


def write(folder: Path, case: Case, results: Sequence[Result]) -> None:
    """Write audit.json and, if anything was measured, audit.png."""
    write_json(folder / "audit.json", as_json(case, results), private=True)
    measured = [result for result in results if result.iou is not None]
    if measured:
        _picture(folder / "audit.png", measured)


def _picture(path: Path, results: Sequence[Result]) -> None:
    """Plot each attack's IoU and the chance level."""
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.35 * len(results)), layout="constrained")
    places = range(len(results))
    axes.barh(
        places,
        [result.iou or 0.0 for result in results],
        color=[_COLOURS.get(result.verdict, _GREY) for result in results],
    )
    chances = [result.chance_iou or 0.0 for result in results]
    axes.scatter(chances, places, marker="|", s=300, color="black", label="chance")
    axes.set_yticks(places, [result.attack for result in results])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.02), xlabel="IoU of the recovered mask", title="What each attack recovers")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    path.chmod(0o600)
