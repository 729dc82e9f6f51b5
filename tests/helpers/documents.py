"""The documents of the repository: their fenced blocks, code spans, links and anchors, and the
commands that bash finds in their shell blocks.

    for block in blocks(text):
        if block.language == "bash":
            for words in recorded(block.text, folder, PROGRAMS):      # ["pmp-ds", "export", ...]

``recorded`` lets bash read a block, with stand-ins for all programs that write their words down, so
quotes, line ends, variables and pipes mean what they mean to a reader's shell.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.distributed import REPO

LANGUAGES = frozenset({"bash", "json", "mermaid", "python", "text", "yaml"})
"""Of a fenced block: every block has one. `text` is for output and drawings."""

_FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
_STARTERS = ("srun", "mpirun", "torchrun")  # `srun [options] PROGRAM WORDS`
_RECORD = "printf '%s\\0' {name} \"$@\" > {log}/$EPOCHREALTIME-$$\n"
"""A file for each start: the programs of a pipe run at the same time."""


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    text: str
    line: int
    """Of its first line in the file."""


def documents() -> list[Path]:
    """Return every document that a reader may start from, README.md first."""
    top = [REPO / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    docs = sorted((REPO / "docs").glob("**/*.md"))
    folders = [REPO / name / "README.md" for name in ("ds_configs", "tokenized_data")]
    return [*top, *docs, *folders, REPO / "tests" / "pretend" / "README.md"]


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a markdown text."""
    found = []
    for match in _FENCE.finditer(text):
        body = "\n".join(
            line.removeprefix(match[1]) for line in match[3].removesuffix("\n").split("\n")
        )
        found.append(Block(match[2], body + "\n", text.count("\n", 0, match.start(3)) + 1))
    return found


def spans(text: str) -> list[str]:
    """Return the `spans` of a markdown text outside its fenced blocks."""
    return _SPAN.findall(_FENCE.sub("", text))


def links(text: str) -> list[str]:
    """Return the targets of a markdown text's links, those to other sites left out."""
    found = _LINK.findall(_SPAN.sub("", _FENCE.sub("", text)))
    return [link for link in found if not re.match(r"\w+:", link)]


def anchors(text: str) -> set[str]:
    """Return the anchors of a markdown text's headings, as GitHub and the site make them."""
    found: set[str] = set()
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        found.add(re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain.lower())))
    return found


def recorded(script: str, folder: Path, programs: Collection[str]) -> list[list[str]]:
    """Return the words of each of ``programs`` that bash starts when it runs ``script``.

    The programs do nothing but record; `srun` and its like then start the program behind their
    options, and `sbatch --wrap` its text. Raises AssertionError for any other program, and for
    text that is not a script.
    """
    bin_folder, log = folder / "bin", folder / "words"
    for empty in (bin_folder, log):
        shutil.rmtree(empty, ignore_errors=True)
        empty.mkdir(parents=True)
    for name in programs:
        text = "#!/bin/bash\n" + _RECORD.format(name=shlex.quote(name), log=shlex.quote(str(log)))
        if name in _STARTERS:
            text += 'while [[ "$1" == -* ]]; do shift; done; "$@"\n'
        if name == "sbatch":
            text += (
                'echo 1; while [ $# -gt 0 ]; do [ "$1" = --wrap ] && bash -c "$2"; shift; done\n'
            )
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    (bin_folder / "bash").symlink_to("/bin/bash")
    done = subprocess.run(
        ["/bin/bash", "-c", script],
        cwd=folder,
        env={
            "PATH": str(bin_folder),
            "HOME": str(folder),
            "SLURM_JOB_ID": "1",
            "SLURM_ARRAY_TASK_ID": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    if done.stderr or done.returncode != 0:
        raise AssertionError(f"exit code {done.returncode}: {done.stderr}")
    return [path.read_text().removesuffix("\0").split("\0") for path in sorted(log.iterdir())]


def shell_words(span: str) -> list[str]:
    """Return the words of a one-line command without variables at its head."""
    words = shlex.split(span, comments=True)
    while words and re.match(r"\w+=", words[0]):
        del words[0]
    return words


def shown(path: Path) -> str:
    """Return a document's name for a message."""
    return os.path.relpath(path, REPO)
