"""How much memory preparing a large corpus takes: text repeated to --gigabytes, then prepared.

    python -m benchmarks.data_memory --input corpus/*.jsonl --tokenizer path/to/tokenizer

Measures the proportional set size of the process and its descendants every 20 ms. The corpus and
the store are deleted at the end. The exit code says only whether it ran.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main(options: argparse.Namespace) -> None:
    import torch

    from benchmarks.common import hardware, print_figure

    print(f"hardware: {hardware(torch.device('cpu'))}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        corpus, out = Path(folder, "corpus.jsonl"), Path(folder, "out")
        _repeat([Path(name) for name in options.input], corpus, int(options.gigabytes * 1e9))
        command = [
            sys.executable,
            "launcher/prepare_data.py",
            "--input",
            str(corpus),
            "--out",
            str(out),
            "--tokenizer",
            options.tokenizer,
            "--workers",
            str(options.workers),
        ]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if process.returncode:
            raise SystemExit(1)
        splits = json.loads((out / "manifest.json").read_text())["splits"]
        blocks = sum(split["blocks"] for split in splits.values())
        size = corpus.stat().st_size
    print(
        f"{size / 1e9:.2f} GB of JSON lines, {blocks:,} blocks, {options.workers} workers, "
        f"{seconds:.1f} s with imports"
    )
    print_figure("prepare_peak_gigabytes", peak / 1e9, 1.5)


def tree_bytes(pid: int) -> int:
    """Return the proportional set size of a process and its descendants; one that just ended counts
    0."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(map(tree_bytes, map(int, (task / "children").read_text().split())))
    except (OSError, ValueError):
        pass
    return total


def _repeat(inputs: list[Path], out: Path, num_bytes: int) -> None:
    data = [path.read_bytes() for path in inputs]
    with open(out, "wb") as file:
        while file.tell() < num_bytes:
            for text in data:
                file.write(text if text.endswith(b"\n") else text + b"\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="memory that preparing a large corpus takes")
    parser.add_argument("--input", nargs="+", required=True, help="JSON lines with a field `text`")
    parser.add_argument("--tokenizer", required=True, help="as prepare_data takes it")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the corpus")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", help="where the corpus and the store are for the while")
    main(parser.parse_args())
