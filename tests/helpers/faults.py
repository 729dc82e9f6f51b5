"""Faults and their consequences: one list for the tests that provoke them and for the docs.

    python -m tests.helpers.faults > docs/FAULTS.md

A test provokes its fault and passes what it saw to ``seen``, which compares it with the list.
"""

import re
from dataclasses import dataclass

from pmp_ds.errors import EXIT_FAULT, EXIT_MISTAKE, EXIT_REQUEUE


@dataclass(frozen=True)
class Fault:
    """Describe one fault: a row of the document."""

    fault: str
    injected: str
    happens: str
    code: int | None  # exit code; None if no command ends
    says: str  # regular expression found in the output; "" for no message
    lost: str


SINCE = "the updates since the last checkpoint"
ONE_BEFORE = "the updates since the previous checkpoint"
NOTHING = "nothing"

CHECKPOINTS = {
    "torn write": Fault(
        "a torn write of a file of a checkpoint",
        "each file in turn cut to half its length",
        "named and skipped; the run resumes from the previous one",
        0,
        r"warning: checkpoint .* is damaged: ",
        ONE_BEFORE,
    ),
    "bit flip": Fault(
        "a bit flip in a file of a checkpoint",
        "one bit in the middle of each file in turn",
        "named and skipped; the run resumes from the previous one",
        0,
        r"warning: checkpoint .* is damaged: ",
        ONE_BEFORE,
    ),
    "missing shard": Fault(
        "a missing shard of a checkpoint",
        "each file in turn deleted",
        "named and skipped; the run resumes from the previous one",
        0,
        r"warning: checkpoint .* is damaged: ",
        ONE_BEFORE,
    ),
    "foreign file": Fault(
        "a file in a checkpoint that its manifest does not list",
        "a pickled program put next to the weights, and next to the states",
        "not opened; the checkpoint is named and skipped",
        0,
        r"warning: checkpoint .* is damaged: it has .*, which its manifest does not list",
        ONE_BEFORE,
    ),
    "unreadable": Fault(
        "no checkpoint can be read",
        "one bit in the middle of a file of each",
        "refused, nothing is changed; `--start-afresh` sets them aside and starts over",
        EXIT_MISTAKE,
        r"error: .*checkpoints has 2 checkpoints, but none is readable; nothing was changed:\n"
        r"  checkpoint .*update-00000012 is damaged: .*\n  checkpoint .*update-00000008 is damaged",
        "nothing, with a backup of one",
    ),
    "other format": Fault(
        "checkpoints in another format",
        "the number in the newest manifest, and in every manifest, set to 1",
        "refused, nothing is changed; an older checkpoint is not used instead",
        EXIT_MISTAKE,
        r"checkpoint .*update-00000012 has format 1, which a development version of pmp-ds 0\.1\.0 "
        r"before .* reads; this is pmp-ds .*, which reads formats 2, 3, 4 and 5: ",
        NOTHING,
    ),
    "lost checkpoints": Fault(
        "the folder of checkpoints is lost",
        "deleted",
        "refused, nothing is changed: the metrics record earlier checkpoints",
        EXIT_MISTAKE,
        r"error: .*checkpoints has no checkpoint, but .*metrics\.jsonl records that one was "
        r"saved at update 12; nothing was changed: ",
        "nothing, with a backup of one",
    ),
    "not read back": Fault(
        "a checkpoint that differs from what was written when it is read back",
        "a file of each rank in turn cut between the rename and the check",
        "set aside with a warning; training continues without it",
        0,
        r"warning: the checkpoint update-00000008 was not written: rank \d: checkpoint .* is "
        r"damaged: .*; the one before is intact\. It is set aside; check the disk of ",
        NOTHING,
    ),
    "latest": Fault(
        "a torn `latest`, the name of the newest checkpoint",
        "emptied, and deleted",
        "written again; the folders themselves show which is the newest",
        0,
        "",
        NOTHING,
    ),
    "ticket": Fault(
        "a torn write of or bit flip in the ticket",
        "each of its two files cut to half its length, and one bit flipped in each",
        "refused before training",
        EXIT_MISTAKE,
        r"error: .*ticket",
        "nothing, with a backup of it",
    ),
    "key": Fault(
        "a bit flip in the initial-weight key",
        "one bit",
        "refused before training",
        EXIT_MISTAKE,
        r"error: .*init/key is damaged or another run's",
        "nothing, with a backup of it",
    ),
    "lost key": Fault(
        "a lost initial-weight key",
        "deleted",
        "refused before training: it is never replaced by a new one",
        EXIT_MISTAKE,
        r"error: .*init/key is missing, but .*theta0\.json was made with it: restore the run's own "
        r"key",
        "nothing, with a backup of it",
    ),
    "lost key, report": Fault(
        "the same before `report.py`",
        "the same",
        "refused: a new key would report that the whole complement changed",
        EXIT_MISTAKE,
        r"error: .*init/key is missing, but .*theta0\.json was made with it",
        "nothing, with a backup of it",
    ),
    "lost key, seal": Fault(
        "the same before `vault.py seal` or `trace`",
        "the same",
        "refused: no copy is marked with another key",
        EXIT_MISTAKE,
        r"error: .*init/key is missing, but .*theta0\.json was made with it",
        "nothing, with a backup of it",
    ),
    "key, seal": Fault(
        "a bit flip in the key before `vault.py seal` or `trace`",
        "one bit",
        "the same",
        EXIT_MISTAKE,
        r"error: .*init/key is damaged or another run's",
        "nothing, with a backup of it",
    ),
    "base gone": Fault(
        "the folder of `init.weights` is lost before masked training has a checkpoint",
        "renamed during discovery",
        "refused, nothing is changed",
        EXIT_MISTAKE,
        r"error: init\.weights=.* does not exist, and .* has no checkpoint of masked pretraining",
        "nothing, with a backup of it",
    ),
    "base gone at the end": Fault(
        "the same later",
        "renamed after update 7",
        "the run resumes and is completed; only the count of the complement waits for the folder",
        EXIT_MISTAKE,
        r"error: init\.weights=.* does not exist, and all 12 updates are saved",
        NOTHING,
    ),
    "base changed": Fault(
        "a bit flip in the weights of `init.weights`",
        "one bit",
        "refused before training",
        EXIT_MISTAKE,
        r"error: init\.weights=.* has other weights than this run started from",
        "nothing, with a backup of it",
    ),
    "facts": Fault(
        "a torn write of or bit flip in a run's own records",
        "`config.yaml`, `data.json` and the digest of the initial weights",
        "refused before training",
        EXIT_MISTAKE,
        r"error: ",
        "nothing, with a backup of it",
    ),
    "store": Fault(
        "a shard of the token store with a flipped bit, torn or missing",
        "a shard of a copy of the store",
        "refused before training",
        EXIT_MISTAKE,
        r"error: .*data shard .* is ",
        NOTHING,
    ),
    "metrics": Fault(
        "a torn last line of metrics.jsonl",
        "cut in the middle of the last record",
        "dropped with the updates that are repeated",
        0,
        "",
        NOTHING,
    ),
}

DISK = {
    "disk full": Fault(
        "a full disk while a checkpoint is written",
        "a limit on the size of files (RLIMIT_FSIZE) on one rank, so that its write stops halfway",
        "`guard.disk: warn`: a warning; training continues without it",
        0,
        r"warning: the checkpoint update-00000008 was not written: rank 1: ",
        NOTHING,
    ),
    "disk full, stop": Fault(
        "the same under `guard.disk: stop`",
        "the same",
        "the run stops",
        EXIT_MISTAKE,
        r"error: the checkpoint update-00000008 was not written: rank 1: ",
        SINCE,
    ),
    "disk full at the end": Fault(
        "a full disk at the last save, or after a stop signal",
        "the same",
        "the run stops, whatever `guard.disk` says",
        EXIT_MISTAKE,
        r"error: the checkpoint update-00000012 was not written: rank 1: ",
        SINCE,
    ),
    "disk nearly full": Fault(
        "a nearly full disk before a save",
        "`shutil.disk_usage` reports 1,000 free bytes",
        "the save is not begun; otherwise as with a full disk",
        0,
        r"warning: the checkpoint update-00000008 was not written: rank 0: it needs .* free",
        NOTHING,
    ),
    "metrics on a full disk": Fault(
        "a full disk while metrics are written",
        "RLIMIT_FSIZE on rank 0",
        "the run stops",
        EXIT_MISTAKE,
        r"error: .*metrics\.jsonl cannot be written: ",
        SINCE,
    ),
    "read-only folder": Fault(
        "a read-only checkpoint folder",
        "mode 0500, and root's capability to ignore it dropped",
        "as with a full disk",
        0,
        r"warning: the checkpoint update-00000008 was not written: rank 0: .*Permission denied",
        NOTHING,
    ),
}

UPDATES = {
    "nan": Fault(
        "a NaN batch: the loss is not finite",
        "the loss of one rank's share set to NaN",
        "the run stops while the next update is computed; nothing corrupt is saved",
        EXIT_MISTAKE,
        r"error: update 6: the loss is nan; the last checkpoint is intact",
        SINCE,
    ),
    "nan, skip": Fault(
        "the same under `guard.nonfinite: skip`",
        "the same",
        "the batch is skipped: no weight, moment or counter changes",
        0,
        r"warning: update 6: the loss is nan; the batch is skipped",
        "the batch",
    ),
    "inf": Fault(
        "a non-finite gradient with a finite loss",
        "on one rank's share",
        "the run stops while the next update is computed; nothing corrupt is saved",
        EXIT_MISTAKE,
        r"error: update 6: the gradient norm is (inf|nan); the last checkpoint is intact",
        SINCE,
    ),
    "inf, skip": Fault(
        "the same under `guard.nonfinite: skip`",
        "the same",
        "the batch is skipped",
        0,
        r"warning: update 6: a gradient is not finite; the batch is skipped",
        "the batch",
    ),
    "spike": Fault(
        "a loss spike",
        "the loss of one rank's share multiplied by 100",
        "`guard.spike: warn`: a warning",
        0,
        r"warning: update 54: the loss .* running standard deviations above its running mean",
        NOTHING,
    ),
    "spike, skip": Fault(
        "the same under `guard.spike: skip`",
        "the same",
        "the batch is skipped",
        0,
        r"warning: update 54: .*; the batch is skipped",
        "the batch",
    ),
    "spike, stop": Fault(
        "the same under `guard.spike: stop`",
        "the same",
        "the state before that update is saved, then the run stops",
        EXIT_MISTAKE,
        r"error: update 54: .*raise guard\.spike_sigmas",
        NOTHING,
    ),
    "drift": Fault(
        "frozen weights change in memory",
        "one bit flipped in each of 1,024 neighbouring elements on one rank",
        "found at the next check (`guard.drift_every`) or before a save; stopped, nothing saved",
        EXIT_MISTAKE,
        r"error: update \d+: frozen elements changed in the memory of rank 1",
        SINCE,
    ),
    "mask drift": Fault(
        "the mask changes in memory",
        "one bit of it flipped on one rank",
        "the same",
        EXIT_MISTAKE,
        r"error: update \d+: the mask changed in the memory of rank 1",
        SINCE,
    ),
    "other ticket": Fault(
        "ranks that read different tickets",
        "one rank reads another file",
        "refused before training",
        EXIT_MISTAKE,
        r"error: rank 1 read another ticket than rank 0",
        NOTHING,
    ),
    "clock jump": Fault(
        "the clock jumps",
        "`time.time` jumps ahead by a year at one update, back by two at another",
        "no effect: limits and timings use the monotonic clock",
        0,
        "",
        NOTHING,
    ),
}

RANKS = {
    "other ranks": Fault(
        "a restart with a number of ranks that does not divide the batch",
        "1, 2, 3 and 1 ranks, `train.micro_batch_size` = `train.global_batch_size` = 8",
        "the batch is divided anew, and the plan shows how",
        0,
        r"3 sequences x 1 accumulation step x 3 ranks - 1 repeated with weight 0 = 8 sequences .*"
        r"\(train\.micro_batch_size=8 is more than a rank's share of 3\)",
        NOTHING,
    ),
    "smaller micro-batch": Fault(
        "a smaller `train.micro_batch_size` after the start",
        "halved at a restart",
        "the run continues with it",
        0,
        r"resuming after update 7 of 12",
        NOTHING,
    ),
    "too many ranks": Fault(
        "more ranks than sequences in a batch",
        "2 ranks, `train.global_batch_size: 1`",
        "refused before training",
        EXIT_MISTAKE,
        r"error: train\.global_batch_size=1 is less than one sequence for each of 2 ranks: start "
        r"at most 1",
        NOTHING,
    ),
    "straggler": Fault(
        "a slow rank",
        "it sleeps in each forward pass",
        "`guard.straggler: warn`: a warning names it",
        0,
        r"warning: update 20: rank 1 takes .* times as long as the others",
        NOTHING,
    ),
    "straggler, stop": Fault(
        "the same under `guard.straggler: stop`",
        "the same",
        "the rank is named, the state is saved and the run stops",
        EXIT_REQUEUE,
        r"stopped: rank 1 takes .* times as long as the others",
        NOTHING,
    ),
    "killed rank": Fault(
        "a killed rank",
        "SIGKILL for one of two ranks in training",
        "the others stop within seconds and name it",
        EXIT_FAULT,
        r"fault: rank 0: rank 1 on host \S+ is gone",
        SINCE,
    ),
    "killed rank, restarts": Fault(
        "the same with `run.restarts: 1`",
        "the same",
        "all ranks restart by themselves and the run completes",
        0,
        r"restart 1 of 1: rank 1 ended with SIGKILL",
        SINCE,
    ),
    "hung rank": Fault(
        "a hung rank",
        "SIGSTOP for one of two ranks, `guard.hang_seconds: 5`",
        "the others write their stacks, name the rank that did not, and stop",
        EXIT_FAULT,
        r"fault: rank 0: no progress for 5 s in update \d+: .*; rank 1 wrote none",
        SINCE,
    ),
    "killed launcher": Fault(
        "a killed launcher",
        "SIGKILL for the `deepspeed` process",
        "saved and stopped",
        EXIT_REQUEUE,
        r"stopped: the launcher is gone: saved after update",
        NOTHING,
    ),
    "kills": Fault(
        "SIGKILL at any moment",
        "`make torture`: 50 and more, of a rank, the launcher or all",
        "the same command resumes; in the end all bits equal those of an undisturbed run",
        0,
        "",
        SINCE,
    ),
}

SIGNALS = {
    "signal during start": Fault(
        "a signal before training is set up",
        "SIGTERM while modules are imported, ranks wait for each other or the store is read",
        "ends at once; the state saved by earlier starts is untouched",
        EXIT_REQUEUE,
        r"stopped: SIGTERM before there was anything to save",
        NOTHING,
    ),
    "signal": Fault(
        "SIGTERM, SIGINT or SIGUSR1 to a rank",
        "each of them during an update of one rank",
        "all ranks finish the update, save and stop",
        EXIT_REQUEUE,
        r"stopped: SIG\w+: saved after update 7 of 12",
        NOTHING,
    ),
    "signal in discovery": Fault(
        "the same in discovery",
        "SIGTERM",
        "the same",
        EXIT_REQUEUE,
        r"stopped: SIGTERM: saved after update 3 of discovery",
        NOTHING,
    ),
    "launcher SIGTERM": Fault(
        "SIGTERM to the `deepspeed` process",
        "in training, on two ranks",
        "the ranks save and stop by themselves",
        None,
        r"stopped: .*: saved after update",
        NOTHING,
    ),
    "second signal": Fault(
        "a second signal, more than 1 s after the first",
        "SIGTERM twice to a rank that is busy",
        "it ends at once; the previous checkpoint is intact",
        143,
        r"second signal: ending at once",
        SINCE,
    ),
    "max_time": Fault(
        "`run.max_time` is nearly over",
        "a limit that has already passed",
        "saved and stopped",
        EXIT_REQUEUE,
        r"stopped: run\.max_time=.* s is nearly over: saved after update 2",
        NOTHING,
    ),
}

JOBS = {
    "second command": Fault(
        "a second command on one run",
        "the same command again while the first one trains",
        "refused, with host, process and job of the first, which is not disturbed",
        EXIT_MISTAKE,
        r"error: the run's folder .* is in use by pretrain\.py on host .*, pid \d+",
        NOTHING,
    ),
    "taken port": Fault(
        "a taken port",
        "another process listens on MASTER_PORT",
        "refused before training",
        EXIT_MISTAKE,
        r"error: port \d+ of .* is taken, so the ranks cannot meet",
        NOTHING,
    ),
    "host without the folder": Fault(
        "a host without the run's folder",
        "a mount namespace with an empty `run.root` for rank 1",
        "refused before anything is written, by rank 0, which names rank and host",
        EXIT_MISTAKE,
        r"error: rank 1 on host \S+: the run's folder .* is not the one that rank 0 writes to",
        NOTHING,
    ),
    "host without the store": Fault(
        "a host without the token store",
        "a mount namespace with an empty `data.store` for rank 1",
        "the same",
        EXIT_MISTAKE,
        r"error: rank 1 on host \S+: .*store",
        NOTHING,
    ),
    "host without network": Fault(
        "a host without network",
        "two network namespaces; one loses all packets, `guard.lost_seconds: 6`",
        "each host names the other one and stops",
        EXIT_FAULT,
        r"fault: rank 0: rank 1 on host h2 gave no sign of life for 6 s",
        SINCE,
    ),
}

MACHINE = {
    "no passwd entry": Fault(
        "a user without a passwd entry, name or home, as under `docker run --user 12345`",
        "every command in a user namespace, without USER, LOGNAME and HOME",
        "every command works; caches go to a private folder in /tmp",
        0,
        "",
        NOTHING,
    ),
    "no kernel source": Fault(
        "an installation without the source of the C++ kernel",
        "`masked_adamw.cpp` removed from an installed wheel",
        "a warning; training continues in torch operations, with the same bits",
        0,
        r"many times slower on CPU: .*masked_adamw\.cpp is missing: .* reinstall it",
        NOTHING,
    ),
}

STRANGERS = {
    "missing tensors": Fault(
        "a release with missing or renamed tensors",
        "a tensor removed from a release, and one renamed, before `finetune.py`",
        "refused, nothing is written: missing tensors are not initialised at random",
        EXIT_MISTAKE,
        r"error: .* lacks model\.norm\.weight: it is not a whole causal model",
        NOTHING,
    ),
    "code in a release": Fault(
        "a release that contains code",
        "`auto_map` in its config.json, and a file next to it",
        "refused; none of its code is run or offered to run",
        EXIT_MISTAKE,
        r"error: .*config\.json has auto_map: it brings code of its own",
        NOTHING,
    ),
    "two names": Fault(
        "a release with different values under an older and a newer name",
        "`rope_theta` of a finished release changed before `export.py --check`",
        "refused: clients of transformers 4 would compute other logits than those of 5",
        EXIT_MISTAKE,
        r"config\.json: rope_theta is 7\.0, but its newer name says 10000\.0",
        NOTHING,
    ),
    "crafted ticket": Fault(
        "a ticket whose packed bits have another type or length",
        "signed bytes as bits, with a matching id",
        "refused before anything is loaded or written; `attach` and the operators check again",
        EXIT_MISTAKE,
        r"error: the ticket at .* is damaged: the mask of '.*' is int8 of shape \[.*\], but .* "
        r"elements need uint8 of shape \[",
        NOTHING,
    ),
    "no file": Fault(
        "a FIFO, a device, a folder or 8 GiB of holes in place of a file",
        "each in place of a ticket's manifest, of results.jsonl and of audit.json",
        "refused at once, without waiting and without unbounded reads",
        EXIT_MISTAKE,
        r"error: .* (is not a regular file|is longer than [\d,]+ bytes)",
        NOTHING,
    ),
    "odd fields": Fault(
        "a results.jsonl or audit.json with fields of the wrong type",
        "text for a loss, a list for a name, JSON nested 100,000 deep, a duplicate key",
        "refused: the file, the line and the field are named",
        EXIT_MISTAKE,
        r"error: .*(results\.jsonl|audit\.json).* is damaged: ",
        NOTHING,
    ),
    "sparse archive": Fault(
        "a sealed ticket that claims more memory than it has bytes",
        "tar headers of 4 GiB, with holes and without, inside a small age file",
        "refused, nothing is unpacked",
        EXIT_MISTAKE,
        r"error: .*\.age (is damaged: mask\.safetensors is not in it as it stands|opens with this "
        r"key, but contains no ticket)",
        NOTHING,
    ),
    "second spelling": Fault(
        "a second spelling of a recipient's name",
        "different case, full-width letters, a soft hyphen, a change of writing direction",
        "refused: two copies of one partner would carry two watermarks",
        EXIT_MISTAKE,
        r"error: --name .* (was sealed under the name 'Partner A', another spelling of the same"
        r"|contains unprintable characters)",
        NOTHING,
    ),
    "names on screen": Fault(
        "names with terminal control codes",
        "escape codes and line ends in the name of a tensor",
        "escaped on screen and in report.md",
        EXIT_MISTAKE,
        r"error: .* has unknown tensors: \\x1b\[31mred\\nerror: ",
        NOTHING,
    ),
}

FAMILIES = {
    "not causal": Fault(
        "a model whose tokens attend to later tokens",
        "the config.json of a BERT",
        "refused before the run's name is taken",
        EXIT_MISTAKE,
        r"error: model_type=.bert. is not trained: it reads in both .*: add .is_decoder.: true",
        NOTHING,
    ),
    "not its release": Fault(
        "a model whose release would differ from it",
        "an export rule that drops a key of config.json: one that defines a shape, and the rope",
        "found at tiny width and refused, before anything is trained",
        EXIT_MISTAKE,
        r"error: model_type='llama' is not trained: .*(would describe another architecture|its "
        r"release would not be the model: the release's logits differ by)",
        NOTHING,
    ),
    "no initial weights": Fault(
        "a model whose initial weights cannot be reproduced from a key",
        "an architecture that leaves its parameters as torch created them",
        "the same",
        EXIT_MISTAKE,
        r"error: model_type='llama' is not trained: .*does not initialise all of",
        NOTHING,
    ),
    "changing buffer": Fault(
        "a model that changes tensors other than its parameters",
        "a persistent buffer that the forward pass adds to",
        "the same",
        EXIT_MISTAKE,
        r"error: model_type='llama' is not trained: .*its forward pass changes model\.seen",
        NOTHING,
    ),
    "no classifier": Fault(
        "GLUE on a family without a classifier that takes no head",
        "a base model without the plain head of transformers",
        "refused; most families without a classifier get a head",
        EXIT_MISTAKE,
        r"error: model_type='cohere' accepts no classification head: .* --task lm",
        NOTHING,
    ),
    "other classifier": Fault(
        "GLUE on a family whose classifier is not built on the causal model",
        "a BART, whose classifier has an encoder",
        "refused: the encoder would be random",
        EXIT_MISTAKE,
        r"error: .* BartForSequenceClassification is not built on the causal model: .* would be "
        r"lost or random",
        NOTHING,
    ),
    "no end of text": Fault(
        "GLUE on a model without an end-of-text token",
        "`eos_token_id: null` in config.json",
        "refused; of several end-of-text tokens the first is used for padding",
        EXIT_MISTAKE,
        r"error: --model .*: its config\.json has no eos_token",
        NOTHING,
    ),
}

LEAVING = {
    "altered digest": Fault(
        "a changed digest of the initial weights in theta0.json before `export.py`",
        "its `sha256` set to zeros, which would allow a second revision",
        "refused: the digest was sealed with the run's key",
        EXIT_MISTAKE,
        r"error: .*init/theta0\.json was altered: its digest does not match the seal",
        "nothing, with a backup of it",
    ),
    "ledger line": Fault(
        "a lost newline at the end of the ledger",
        "its last byte removed",
        "the line still counts: a second revision is refused",
        EXIT_MISTAKE,
        r"error: .*their difference is the mask",
        NOTHING,
    ),
    "derivative of a copy": Fault(
        "`export.py --derivative` by a recipient",
        "`--ticket` names a copy instead of the run's own ticket",
        "refused: the model would no longer identify the copy used to tune it",
        EXIT_MISTAKE,
        r"error: --ticket copy is not the ticket of a run",
        NOTHING,
    ),
}

SETTINGS = {
    "aliases": Fault(
        "a small YAML file that expands to a huge number of values",
        "nested aliases, 9^9 values",
        "refused at once",
        EXIT_MISTAKE,
        r"error: .*, line \d+: its aliases expand to more than 20,000 values",
        NOTHING,
    ),
    "section twice": Fault(
        "a duplicate setting or section in a YAML file",
        "`train:` at the top and the end",
        "refused with both lines: YAML itself would ignore the first",
        EXIT_MISTAKE,
        r"error: --config .*, line 3: train appears twice, in line 1 too",
        NOTHING,
    ),
    "null": Fault(
        "`null`, an empty value or `~` for a setting that needs a value",
        "every setting of every command in turn (`make crafted`)",
        "refused with the setting's name and its allowed values",
        EXIT_MISTAKE,
        r"error: mask\.source: expected one of 'earlybird', .*, got null",
        NOTHING,
    ),
}

DEEPSPEED = {
    "misspelt key": Fault(
        "a misspelt key in the DeepSpeed JSON",
        "`zero_optimisation`, which DeepSpeed ignores",
        "refused before anything is written, all of them in one list",
        EXIT_MISTAKE,
        r"zero_optimisation: DeepSpeed does not know this key: did you mean zero_optimization\?",
        NOTHING,
    ),
    "unsupported section": Fault(
        "a DeepSpeed section that masked updates cannot use",
        "`elasticity`, `sequence_parallel_size`, `compression_training` and the others",
        "refused by name with the reason",
        EXIT_MISTAKE,
        r"elasticity: a run resumes on any number of ranks without it; remove it",
        NOTHING,
    ),
    "static loss scale": Fault(
        "a static loss scale",
        "`fp16.loss_scale: 128`",
        "refused; the loss scale is always dynamic",
        EXIT_MISTAKE,
        r"fp16\.loss_scale: with a static loss scale a checkpoint",
        NOTHING,
    ),
    "no fp16": Fault(
        "a precision that the device does not support",
        "fp16 on a CPU that reports no support",
        "refused before the run's name is taken",
        EXIT_MISTAKE,
        r"error: train\.precision=fp16 is not supported on \w+ here: use bf16 or fp32",
        NOTHING,
    ),
}

DATA = {
    "link back": Fault(
        "a folder that an input reaches twice",
        "a link in the folder to its parent",
        "refused by name; links to other folders are entered",
        EXIT_MISTAKE,
        r"error: input .* reaches .*/loop twice, the first time as .*, so its documents would",
        NOTHING,
    ),
    "hidden files": Fault(
        "hidden files in an input folder",
        "`.ipynb_checkpoints/`, `._a.txt`",
        "left out, and counted in the summary",
        0,
        r"left out 2 hidden \(first: \._a\.txt",
        "those files",
    ),
    "other files": Fault(
        "files of other types in an input folder",
        "`.csv`, `.txt.gz`",
        "left out, and counted",
        0,
        r"left out 2 of other types \(first: .*1 x \.csv",
        "those files",
    ),
    "random tokenizer": Fault(
        "a tokenizer that draws at random",
        "`dropout` in a tokenizer.json",
        "refused",
        EXIT_MISTAKE,
        r"error: tokenizer .* has dropout=0\.1: it splits a text differently every time",
        NOTHING,
    ),
    "packed to nothing": Fault(
        "an input that unpacks to far more than text would",
        "1 GiB of one line, of rows or of line ends as .gz, .zst and Parquet",
        "refused",
        EXIT_MISTAKE,
        r"error: input .* unpacks to more than 200 times its size",
        NOTHING,
    ),
    "endless document": Fault(
        "a document or a line of more than 64 MiB",
        "text files and JSON lines of several GiB, Parquet of one text",
        "refused",
        EXIT_MISTAKE,
        r"error: input .* is too long: .* a document may have at most 67,108,864 bytes",
        NOTHING,
    ),
    "growing file": Fault(
        "an input that changes while it is read",
        "a line added between two reads",
        "refused",
        EXIT_MISTAKE,
        r"error: input .* changed while it was read",
        NOTHING,
    ),
}

SECTIONS = {
    "Files": CHECKPOINTS,
    "Disk": DISK,
    "Updates": UPDATES,
    "Ranks": RANKS,
    "Jobs and hosts": JOBS,
    "Signals": SIGNALS,
    "Machine": MACHINE,
    "Untrusted files": STRANGERS,
    "Architectures": FAMILIES,
    "Releases": LEAVING,
    "Settings": SETTINGS,
    "DeepSpeed JSON": DEEPSPEED,
    "Input of prepare_data": DATA,
}
FAULTS = {name: fault for section in SECTIONS.values() for name, fault in section.items()}


def seen(name: str, code: int | None, screen: str) -> None:
    """Check the exit code and the screen of a test that provoked fault ``name``."""
    fault = FAULTS[name]
    assert code == fault.code, f"{name}: exit code {code}\n{screen}"
    assert re.search(fault.says, screen), f"{name}: {fault.says!r} is not on screen:\n{screen}"


def document() -> str:
    """Return docs/FAULTS.md."""
    lines = [
        "# Faults",
        "",
        "Generated by `python -m tests.helpers.faults > docs/FAULTS.md`. A test provokes each row",
        "in real runs, nearly all of two ranks, and checks the exit code given here and the",
        "message on screen. Where a run can continue, tests show that it reaches the same bits as",
        "an undisturbed run.",
        "",
        "Exit codes: 0 done; 1 something has to be changed first; 70 a fault, the same command",
        "resumes; 75 stopped on request, all is saved, the same command resumes; 128 + n signal n.",
    ]
    for title, faults in SECTIONS.items():
        lines += ["", f"## {title}", ""]
        lines += ["| fault | how it was injected | what happens | exit | lost |"]
        lines += ["|---|---|---|---|---|"]
        for fault in faults.values():
            code = "-" if fault.code is None else str(fault.code)
            cells = (fault.fault, fault.injected, fault.happens, code, fault.lost)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *_ELASTIC]) + "\n"


_ELASTIC = """
## Changing ranks and ZeRO stage

A run resumes with any number of ranks and any ZeRO stage. A run that moves from 2 ranks and ZeRO 1
to 4 ranks and ZeRO 3 to 1 rank and ZeRO 2 is compared with an unchanged run
(`tests/distributed/test_elastic.py`). It has the same samples in the same updates, the same ticket
unless discovery itself was divided, and a complement equal to the bit. Training and validation
losses agree within 1e-5 in fp32 (measured: 1e-6 in 12 updates) and 2e-2 in bf16, because a sum
over more ranks is rounded in another order. If the gradients are the same to the bit, a discovery
that is divided in this way gives the same ticket.

The batch need not divide into ranks and micro-batches. The same holds from 1 rank to 2, 3 and 1
again, with the whole batch of 8 sequences as the largest micro-batch (measured: 7e-7 in fp32 and
2e-4 in bf16 in 12 updates), and after the micro-batch was halved (5e-7 and 8e-5). Shares of 3, 3
and 2 sequences give the losses, gradient norms, weights and ticket of the plain reference at ZeRO
0 to 3 (`tests/distributed/test_uneven.py`).""".splitlines()


if __name__ == "__main__":
    print(document(), end="")
