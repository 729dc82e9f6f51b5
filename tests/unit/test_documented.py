"""Every command in the documents and in --help is one that the real parsers accept.

bash reads each shell block, with stand-ins for the programs that it may name; the words of ours go
to the parser of the command. `tests/unit/test_drift.py` looks up flags that stand alone in a
sentence, and `tests/e2e/test_documents_run.py` runs them all for real.
"""

import re
import sys
from pathlib import Path

import pytest
import yaml

from pmp_ds import launch
from pmp_ds.commands import HELP, VERBS, main
from pmp_ds.config import Config
from pmp_ds.errors import UserError
from tests.helpers.command_lines import forms, read
from tests.helpers.distributed import REPO
from tests.helpers.documents import (
    LANGUAGES,
    blocks,
    documents,
    recorded,
    shell_words,
    shown,
    spans,
)

OURS = ("pmp-ds", "python", "python3", "deepspeed")
OTHERS = {
    "make": "tests/unit/test_docs.py: the targets exist; and below, their variables",
    "srun": "tests/unit/test_slurm_script.py; the program behind it is parsed",
    "scontrol": "tests/unit/test_slurm_script.py",
    "sbatch": "the command in --wrap is parsed",
}
"""Programs of others that documents may start, and the test that runs their like."""

GIVEN = {
    "big.yaml": "{input: [corpus], tokenizer: path/to/llama}",
    "recipe.yaml": "{init: {seed: 42}}",
    ".venv/bin/activate": "",
}
"""Files that a reader of the documents has."""

COMMANDS = tuple(f"{name} " for name in (*OURS, "make"))
NO_COMMANDS = {"pmp-ds packed tokens"}  # the name of a format
CUT_SHORT = re.compile(
    r"(?:is|are) missing|needs a verb|^name one of|expected one argument|are required: command"
    r"|deepspeed refuses \['--\S+'\]|arms has no `base`"
)
"""What a parser says of a command that is right as far as it goes."""

DOCUMENTS = {shown(path): path.read_text(encoding="utf-8") for path in documents()}
BLOCKS = {
    f"{name}:{block.line}": block for name, text in DOCUMENTS.items() for block in blocks(text)
}
SHELL = {where: block.text for where, block in BLOCKS.items() if block.language == "bash"}


def helps() -> dict[str, str]:
    """Return the examples in each --help text, as scripts."""
    found = {"pmp-ds": HELP, "pmp_ds.launch": launch.__doc__ or ""}
    for name, form in forms().items():
        found[name] = f"{form.parser.description or ''}\n{form.parser.epilog or ''}"
    return {name: script for name, text in found.items() if (script := _examples(text))}


def _examples(text: str) -> str:
    """Return the lines that are commands, without those that only show a form."""
    joined = re.sub(r"\\\n +", "", text)
    lines = re.findall(r"^ +((?:\w+=\S+ )*(?:pmp-ds|python|deepspeed) .*)$", joined, re.MULTILINE)
    return "\n".join(line for line in lines if not re.search(r"\.\.\.|\[|\S {3,}[^ #]", line))


@pytest.fixture(autouse=True)
def _household(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in GIVEN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)


def refused(words: list[str]) -> str | None:
    """Return what is wrong with a command line, or None."""
    try:
        if words[0] == "make":
            makefile = (REPO / "Makefile").read_text(encoding="utf-8")
            names = [word.partition("=")[0] for word in words[1:] if "=" in word]
            unused = [name for name in names if not re.search(rf"\$[({{]{name}\b", makefile)]
            return f"the Makefile does not use {unused}" if unused else None
        if words[0] in OURS:
            read(words)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("where", BLOCKS)
def test_each_block_says_what_it_is(where: str):
    assert BLOCKS[where].language in LANGUAGES, f"{where}: label the block, as ```bash or ```text"


@pytest.mark.parametrize("where", SHELL)
def test_commands_of_the_documents(where: str, tmp_path: Path):
    lines = recorded(SHELL[where], tmp_path, [*OURS, *OTHERS])
    assert lines, f"{where}: no command; is it ```text?"
    assert [(words, why) for words in lines if (why := refused(words))] == []


def test_containers_of_the_manifests():
    """The command and arguments of each container that the documents show."""
    found = 0
    for where, block in BLOCKS.items():
        for part in yaml.safe_load_all(block.text) if block.language == "yaml" else ():
            if part.get("kind") == "Job":
                for container in part["spec"]["template"]["spec"]["containers"]:
                    found += 1
                    assert refused([*container["command"], *container["args"]]) is None, where
    assert found


def test_commands_inside_sentences():
    """One that is cut short, as `pmp-ds audit`, may lack what is required; `...` ends one."""
    wrong, seen = [], 0
    for name, text in DOCUMENTS.items():
        for span in spans(text):
            if span.startswith(COMMANDS) and span not in NO_COMMANDS:
                seen += 1
                why = refused(shell_words(span.replace("VERB", "export").partition(" ...")[0]))
                if why and not CUT_SHORT.search(why):
                    wrong.append((name, span, why))
    assert seen > 40
    assert wrong == []


def test_commands_have_one_spelling():
    """`pmp-ds VERB` in sentences, not the name of its file alone; FAULTS.md is generated."""
    old = re.compile(rf"(?:{'|'.join(verb.replace('-', '_') for verb in VERBS)})\.py\b")
    texts = {name: text for name, text in DOCUMENTS.items() if name != "docs/FAULTS.md"}
    assert {
        (name, one) for name, text in texts.items() for one in spans(text) if old.match(one)
    } == set()


def test_commands_of_the_help_texts(tmp_path: Path):
    scripts = helps()
    assert {"pmp-ds pretrain", "pmp-ds export", "pmp-ds"} <= scripts.keys()
    wrong = [
        (name, words, why)
        for name, script in scripts.items()
        for words in recorded(script, tmp_path, [*OURS, *OTHERS])
        if (why := refused(words))
    ]
    assert wrong == []


def test_other_programs_still_occur():
    """A program that no document starts any more is taken off the list."""
    everything = "\n".join(SHELL.values())
    assert [name for name in OTHERS if not re.search(rf"\b{name} ", everything)] == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("pmp-ds pretrain --train.learning-rate 1", "unknown flag"),
        ("pmp-ds pretrain --train.optimizer adam", "unknown"),
        ("pmp-ds pretrain --train.lr -1", "must be positive"),
        ("pmp-ds pretrain --config nowhere", "recipes by name"),
        ("pmp-ds pretrain --deepspeed-config zero9", "files by name"),
        ("pmp-ds exprot --run x", "unknown command"),
        ("pmp-ds export", "name one of"),
        ("pmp-ds vault seal --run x --name N --out o", "give --to KEY"),
        ("deepspeed --num_accelerators 2 launcher/finetune.py --model m --task none", None),
        ("python -m pmp_ds.launch --ranks 2 finetune --model m --task sst2 --methd full", "methd"),
        ("pmp-ds finetune --model m --task sst2 --sweep method=full,loar,seed=0", "loar"),
        ("python -m benchmarks.topk --unheard 1", "no flag"),
        ("python -m pmp_ds.nothing", "no module"),
        ("python -m venv --without-pip .venv", None),
        ("make demo TROCH_INDEX=x", "TROCH_INDEX"),
    ],
)
def test_what_is_refused(line: str, why: str | None):
    found = refused(line.split())
    assert (found is None) == (why is None), found
    assert why is None or (found is not None and why in found)


def test_bash_reads_the_blocks(tmp_path: Path):
    script = "a='x y'\npmp-ds one \"$a\" \\\n  two > out | make b # c\n[ 1 ] && srun -n2 pmp-ds d\n"
    assert sorted(recorded(script, tmp_path, ["pmp-ds", "make", "srun"])) == [
        ["make", "b"],
        ["pmp-ds", "d"],
        ["pmp-ds", "one", "x y", "two"],
        ["srun", "-n2", "pmp-ds", "d"],
    ]
    for bad in ("pip install x", "pmp-ds '", "case x in"):
        with pytest.raises(AssertionError, match=r"exit code \d+: .*bash"):
            recorded(bad, tmp_path, ["pmp-ds"])


def test_a_command_line_gives_its_settings():
    words = "deepspeed --num_accelerators 2 launcher/pretrain.py --config demo --train.lr 5e-4"
    assert read(words.split())[Config].train.lr == 5e-4


def test_each_command_has_a_form():
    names = {name.split()[1] for name in forms()}
    assert names == set(VERBS)
    assert {"pmp-ds vault seal", "pmp-ds prepare-data pack", "pmp-ds prepare-data"} <= set(forms())
    assert "pmp_ds.commands" in sys.modules
    assert main(["--version"]) == 0
