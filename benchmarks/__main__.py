"""All benchmarks that this machine can run in ten minutes, and one table of their figures.

    make bench
    python -m benchmarks --only step discovery

Each part (parts.py) is a process. The table goes to bench/TIME.md, anew after every part, and to
the terminal at the end. The exit code is 1 if a part failed or had no time left.
"""

import argparse
import contextlib
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.common import hardware
from benchmarks.parts import Machine, Part, parts

FIGURE = re.compile(r"^figure (\w+) (\S+)(?: goal (\S+ \S+) (met|short))?$", re.MULTILINE)
LEAST_SECONDS = 10  # to begin a part
END_SECONDS = 10  # to end one that was asked to


@dataclass
class Outcome:
    """What became of a part."""

    part: Part
    seconds: float = 0.0
    fault: str = ""
    """Why it did not run to its end."""
    lines: list[str] = field(default_factory=list)


def main(options: argparse.Namespace) -> int:
    begun = time.monotonic()
    machine = Machine.here()
    chosen = [
        part
        for part in parts(machine, tiny=options.tiny)
        if not options.only or part.name.split()[0] in options.only
    ]
    file = Path(options.folder, time.strftime("%Y-%m-%d-%H%M%S.md"))
    file.parent.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for number, part in enumerate(chosen, 1):
        left = options.minutes * 60 - (time.monotonic() - begun)
        print(f"\n[{number}/{len(chosen)}] {part.name} ({left / 60:.1f} minutes left)", flush=True)
        outcomes.append(run(part, left))
        if outcomes[-1].fault:
            print(f"{part.name}: {outcomes[-1].fault}", flush=True)
        write(file, report(machine, outcomes))
    print("\n" + table(outcomes))
    failed = [f"{one.part.name} ({one.fault})" for one in outcomes if one.fault]
    minutes = (time.monotonic() - begun) / 60
    print(
        f"\n{len(outcomes) - len(failed)} of {len(outcomes)} parts ran to their end in "
        f"{minutes:.1f} minutes; the table and all output: {file}"
    )
    if failed:
        print("not: " + "; ".join(failed))
    return 1 if failed else 0


def run(part: Part, seconds: float) -> Outcome:
    """Run a part for at most so many seconds and pass its output on."""
    outcome = Outcome(part)
    if seconds < LEAST_SECONDS:
        outcome.fault = "no time left"
        return outcome
    start = time.monotonic()
    process = subprocess.Popen(
        part.command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # with all its ranks
    )
    timers = [
        # First as Ctrl-C does: compilers remove their locks.
        threading.Timer(seconds, _send, (process, signal.SIGINT)),
        threading.Timer(seconds + END_SECONDS, _send, (process, signal.SIGKILL)),
    ]
    for timer in timers:
        timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            outcome.lines.append(line)
        code = process.wait()
    except BaseException:  # such as Ctrl-C, which the part does not get
        _send(process, signal.SIGINT)
        raise
    finally:
        for timer in timers:
            timer.cancel()
    outcome.seconds = time.monotonic() - start
    if outcome.seconds >= seconds:
        outcome.fault = f"ended after {seconds:.0f} seconds"
    elif code:
        outcome.fault = f"exit code {code}"
    return outcome


def _send(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def table(outcomes: list[Outcome]) -> str:
    """Return the figures of all parts as Markdown."""
    rows = ["| part | figure | value | goal | |", "|---|---|---|---|---|"]
    for one in outcomes:
        figures = FIGURE.findall("".join(one.lines))
        rows += [f"| {one.part.name} | {' | '.join(figure)} |" for figure in figures]
        if one.fault:
            rows.append(f"| {one.part.name} | {one.fault} | | | |")
    return "\n".join(rows)


def report(machine: Machine, outcomes: list[Outcome]) -> str:
    """Return the file's content: the machine, the table, and the output of every part."""
    head = ["# Benchmarks", "", *(f"- {fact}" for fact in facts(machine)), ""]
    sections = [
        f"\n## {one.part.name}: {one.seconds:.0f} s\n\n```\n{''.join(one.lines)}```"
        for one in outcomes
    ]
    return "\n".join([*head, table(outcomes), *sections]) + "\n"


def facts(machine: Machine) -> list[str]:
    """Return the hardware and the versions, a line each."""
    lines = [time.strftime("%Y-%m-%d %H:%M"), hardware(torch.device("cpu"))]
    if machine.gpus:
        lines += [
            f"{machine.gpus} x {torch.cuda.get_device_name()}, {machine.gpu_bytes / 1e9:.0f} GB",
            f"driver {_driver()}, CUDA {torch.version.cuda}",
        ]
    lines.append(f"{os.cpu_count()} processors, {platform.system()} {platform.release()}")
    names = ("torch", "triton", "deepspeed", "transformers")
    return [*lines, ", ".join(f"{name} {_version(name)}" for name in names)]


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "not known"
    return found.stdout.split("\n")[0].strip()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def write(file: Path, text: str) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, help="time for all parts")
    add("--only", nargs="+", metavar="NAME", help="only these: rates, step, ...")
    add("--tiny", action="store_true", help="seconds per part, to see that they run")
    add("--folder", default="bench", help="where the table goes")
    return parser


if __name__ == "__main__":
    sys.exit(main(arguments().parse_args()))
