"""A reader who types what a document says: bash runs the shell blocks, with the real commands.

    furnish(home)                       text, a tokenizer, GLUE's files: what a reader has
    said = follow(home, scripts)        one script after the other

Stand-ins in `home/bin` start the real commands in real processes and add settings that make them
small (``SMALLER``). Those for schedulers run here, one after the other, what they are given.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.helpers.distributed import REPO
from tests.helpers.glue import write_glue
from tests.helpers.workdir import write_corpus

TINY = """\
run: {val_every: 6, val_blocks: 4, checkpoint_every: 3}
model: {hidden_size: 32, num_layers: 2, num_heads: 4, max_positions: 64}
mask: {iou_threshold: 0.5, patience: 2, max_steps: 30}
train: {steps: 6, warmup_steps: 1, global_batch_size: 4, precision: fp32, lr: 1.0e-3}
"""
SMALLER = {
    "prepare-data": ["--block-size", "32", "--train-vocab-size", "400", "--workers", "1"],
    "pretrain": ["--config", "tiny.yaml"],
    "finetune": ["--train.steps", "2", "--data.max-train", "16", "--data.glue-dir", "glue"],
    "audit": ["--seconds", "1", "--seeds", "0:1000"],
    "study": ["--plan"],
    "doctor": ["--config", "tiny.yaml", "--data.store", "tokenized_data/demo"],
    "evaluate": ["--glue-dir", "glue", "--glue-tasks", "sst2", "--seeds", "1"],
}
"""Words added to a command, after those of the document, which they override."""

_STAND_IN = f"""\
#!{sys.executable}
import json, os, re, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
start = {{
    "pmp-ds": ["-c", "import sys; from pmp_ds.commands import main; sys.exit(main())"],
    "python": [],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", "1"],
}}[name]
smaller = json.loads({json.dumps(json.dumps(SMALLER))})
verbs = [re.sub(r"launcher/(\\w+)\\.py", r"\\1", word) for word in words]
more = next((smaller[verb] for verb in verbs if verb in smaller), [])
if "--dry-run" in words or {{"plan", "pack", "finish"}} & set(words):
    more = []
if more and "prepare-data" in words and "--input" not in words:
    more = [*more, "--input", "corpus"]
os.execv(sys.executable, [sys.executable, *start, *words, *more])
"""

_SRUN = """\
#!/bin/bash
while [[ $1 == -* ]]; do shift; done
exec "$@"
"""

_SBATCH = """\
#!/bin/bash
array=0-0
while [ $# -gt 0 ]; do
  case $1 in
    --array=*) array=${1#*=} ;;
    --wrap) script=$2; shift ;;
  esac
  shift
done
for SLURM_ARRAY_TASK_ID in $(seq "${array%-*}" "${array#*-}"); do
  export SLURM_ARRAY_TASK_ID
  bash -ec "$script" >&2 || exit 1
done
echo 17
"""

PROGRAMS = {
    **dict.fromkeys(("pmp-ds", "python", "deepspeed"), _STAND_IN),
    **dict.fromkeys(("make", "curl"), "#!/bin/sh\n"),
    "srun": _SRUN,
    "sbatch": _SBATCH,
}


def furnish(home: Path) -> None:
    """Write what the documents presuppose."""
    for name in ("corpus", "bin", ".venv/bin", "path/to"):
        (home / name).mkdir(parents=True)
    write_corpus(home / "corpus" / "corpus.jsonl")
    write_glue(home / "glue")
    (home / "tiny.yaml").write_text(TINY)
    (home / "big.yaml").write_text("{input: [corpus], tokenizer: path/to/tokenizer, workers: 1}\n")
    (home / ".venv/bin/activate").touch()
    (home / "launcher").symlink_to(REPO / "launcher")
    for name in ("tokenizer", "llama"):
        (home / "path/to" / name).symlink_to("../../tokenized_data/demo/tokenizer")
    for name, text in PROGRAMS.items():
        (home / "bin" / name).write_text(text)
        (home / "bin" / name).chmod(0o755)


def follow(home: Path, scripts: Iterable[str]) -> str:
    """Run scripts in ``home`` and return what they wrote; every command must succeed."""
    said = []
    for script in scripts:
        done = subprocess.run(
            ["/bin/bash", "-e", "-c", script],
            cwd=home,
            env=os.environ
            | {
                "PATH": os.pathsep.join([str(home / "bin"), os.environ["PATH"]]),
                "PYTHONPATH": str(REPO),
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        said.append(done.stdout)
    return "".join(said)
