"""Fine-tuning through the real engine: every task, the parameters that each method may change,
sweeps, resuming."""

import gc
import json
import re
import signal
from pathlib import Path

import pytest
import torch

from pmp_ds import results
from pmp_ds.glue.tasks import COLUMNS, TASKS
from pmp_ds.lease import hold
from pmp_ds.log import read_metrics
from pmp_ds.run_dir import RunDir
from pmp_ds.ticket.keys import new_identity, public_keys
from pmp_ds.ticket.ticket import load_ticket
from pmp_ds.ticket.vault import seal
from tests.helpers import finetune
from tests.helpers.commands import files_of
from tests.helpers.finetune import tune, weights, write_model
from tests.helpers.glue import write_glue, write_rows
from tests.helpers.lives import act, raise_signal
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def home(ranks1, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    write_glue(folder / "glue")
    ranks1.run(write_model, folder)
    return folder


def flags(home: Path, *more: str) -> list[str]:
    return [
        "--data.glue_dir",
        f"{home}/glue",
        "--train.steps",
        "6",
        "--train.lr",
        "1e-2",
        "--train.global_batch_size",
        "8",
        "--train.micro_batch_size",
        "4",
        "--run.val_every",
        "3",
        *more,
    ]


def test_all_tasks(ranks2, home):
    """One command gives nine columns with GLUE's metrics and the majority baseline."""
    asked = f"task={','.join(TASKS)}"
    found, _ = ranks2.run(tune, str(home), flags(home, "--task", "sst2"), (asked,))
    metrics = {column: row for one in found for column, row in one.values["metrics"].items()}
    assert tuple(metrics) == COLUMNS
    for one in found:
        task = TASKS[one.settings["task"]]
        for name in ("metrics", "majority", "primary"):
            assert set(one.values[name]) == set(task.splits.values())
        for column, row in one.values["metrics"].items():
            assert tuple(row) == task.metrics
            assert all(-1 <= value <= 1 for value in row.values())
            assert one.values["primary"][column] == task.primary
            # 24 held-out rows, of which the training majority hits what write_glue planted.
            assert round(row["accuracy"] * 24) == pytest.approx(row["accuracy"] * 24)
        assert [point[0] for point in one.values["curve"]] == sorted(
            {round(i * 8 * one.values["tokens"] / 48) for i in (0, 3, 6)}
        )


@pytest.mark.parametrize("method", daily(["full", "lora", "ticket", "random"], ["lora", "ticket"]))
def test_each_method_learns(ranks1, home, method):
    """A word decides the label, so a few epochs beat the majority by far."""
    given = flags(
        home,
        "--task",
        "sst2",
        "--method",
        method,
        "--run.name",
        f"learns-{method}",
        "--train.steps",
        "120",
        "--run.val_every",
        "120",
        "--ticket",
        f"{home}/ticket",
    )
    (found,) = ranks1.run(tune, str(home), given)[0]
    assert found.values["majority"]["SST-2"]["accuracy"] == 0.5
    assert found.values["metrics"]["SST-2"]["accuracy"] > 0.75


@pytest.mark.parametrize(
    ("method", "ranks", "stage"),
    daily(
        [
            (m, *s)
            for m in ("full", "lora", "ticket", "random", "complement")
            for s in ((1, 0), (2, 1), (2, 3))
        ],
        [("full", 1, 0), ("lora", 2, 1), ("ticket", 2, 3), ("random", 1, 0), ("complement", 1, 0)],
    ),
)
def test_what_may_change(request, home, method, ranks, stage):
    """Parameters outside the method's mask keep their bits; the new head always changes."""
    pool = request.getfixturevalue(f"ranks{ranks}")
    name = f"touch-{method}-{ranks}-{stage}"
    given = flags(
        home, "--task", "sst2", "--method", method, "--run.name", name, "--ticket", f"{home}/ticket"
    )
    found = pool.run(tune, str(home), given, (), stage)[0][0]
    run = RunDir(home / "runs" / name)
    before, after = weights(home / "release"), weights(run.private / "model")
    mask = load_ticket(home / "ticket").mask
    if method == "lora":
        assert all(".lora_" in key or "score" in key for key in after)
        assert sum(tensor.numel() for tensor in after.values()) == found.values["trainable"]
        assert all(tensor.ne(0).any() for key, tensor in after.items() if "lora_B" in key)
        return
    head = after.pop("score.weight")
    assert head.shape == (2, 32)
    assert set(after) == set(before) - {"lm_head.weight"}
    changed = {key: (after[key] != before[key]) for key in after}
    moved = sum(int(c.sum()) for c in changed.values())
    if method == "full":
        seen = {key: c for key, c in changed.items() if "embed" not in key}
        assert all(c.float().mean() > 0.95 for c in seen.values())
    elif method == "random":
        backbone = sum(tensor.numel() for tensor in after.values())
        assert found.values["trainable"] == int(0.7 * backbone) + head.numel()
        assert 0 < moved <= int(0.7 * backbone)
        kept = sum(int((c & mask.full(key)).sum()) for key, c in changed.items())
        assert kept < 0.8 * moved  # it is not the ticket
    else:
        for key, c in changed.items():
            allowed = mask.full(key) if method == "ticket" else ~mask.full(key)
            assert not (c & ~allowed).any(), key
            if "embed" not in key and allowed.any():
                assert c[allowed].float().mean() > 0.95, key


def test_new_head_trains_whole(ranks1, home):
    """The head trains whole, even with a ticket, and depends on the seed."""
    heads = []
    for name, steps, seed in (("head-0", "1", "5"), ("head-1", "1", "5"), ("head-2", "1", "6")):
        given = flags(
            home,
            "--task",
            "mnli",
            "--method",
            "ticket",
            "--run.name",
            name,
            "--ticket",
            f"{home}/ticket",
            "--train.steps",
            steps,
            "--seed",
            seed,
            "--train.warmup_ratio",
            "0",
            "--train.lr",
            "1e-6",
        )
        ranks1.run(tune, str(home), given)
        heads.append(weights(home / "runs" / name / "private" / "model")["score.weight"])
    assert heads[0].shape == (3, 32)
    assert torch.equal(heads[0], heads[1])
    assert (heads[0] != heads[2]).all()


def test_sweep_repeats_nothing(ranks1, home, capfd):
    given = flags(home, "--task", "sst2", "--run.name", "swept", "--train.steps", "2")
    grid = ("train.lr=1e-3,1e-2", "seed=0,1")
    first = ranks1.run(tune, str(home), given, grid, 1, False)[0]
    file = home / "runs/swept/results.jsonl"
    before = file.read_bytes()
    assert [(r.settings["lr"], r.settings["seed"]) for r in first] == [
        (1e-3, 0),
        (1e-3, 1),
        (1e-2, 0),
        (1e-2, 1),
    ]
    again = ranks1.run(tune, str(home), given, grid, 1, False)[0]
    assert again == first
    assert file.read_bytes() == before
    more = ranks1.run(tune, str(home), given, ("train.lr=1e-2", "seed=1,2"), 1, False)[0]
    assert more[0] == first[3]
    assert len(results.read(file)) == 5
    assert not list((home / "runs/swept/cells").rglob("update-*"))  # no states are left


def left_by_failures(folder: str, given: list[str], stage: int) -> list[int]:
    """The bytes of all tensors after each of three sweeps that fail."""
    found = []
    for name in ("a", "b", "c"):
        finetune.problem(folder, [*given, "--run.name", f"{name}{stage}"], ("seed=0,1",), stage)
        gc.collect()
        tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors}
        found.append(sum(storage.nbytes() for storage in storages.values()))
    return found


@pytest.mark.parametrize("stage", daily(range(4), [2, 3]))
def test_cells_that_fail_leave_nothing_in_memory(ranks1, home, stage):
    given = flags(home, "--task", "sst2", "--train.lr", "1e30")
    _, second, third = ranks1.run(left_by_failures, str(home), given, stage)[0]
    model = sum(tensor.nbytes for tensor in weights(home / "release").values())
    assert third - second < model, "each sweep has two engines"


@pytest.mark.parametrize("method", daily(["ticket", "lora"], ["ticket"]))
def test_stopped_and_resumed(ranks2, home, method):
    """After SIGTERM in update 4 the same command gives the bits of an undisturbed run."""
    values, models = [], []
    for name in (f"alone-{method}", f"stopped-{method}"):
        given = flags(
            home,
            "--task",
            "mrpc",
            "--method",
            method,
            "--run.name",
            name,
            "--ticket",
            f"{home}/ticket",
            "--train.steps",
            "8",
        )
        if name.startswith("stopped"):
            assert ranks2.run(_stopped, str(home), given)[0] == "SIGTERM"
            assert (home / "runs" / name / "private/checkpoints/update-00000005").is_dir()
        (found,) = ranks2.run(tune, str(home), given)[0]
        values.append(found.values)
        models.append(weights(home / "runs" / name / "private" / "model"))
    assert values[0] == values[1]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


@pytest.mark.parametrize("task", daily(["sst2", "stsb"], ["stsb"]))
def test_stopped_and_resumed_on_three_ranks(ranks1, ranks3, home, task):
    """8 examples on one rank, then 3 + 3 + 2 on three: the losses of an undisturbed run."""
    runs = [RunDir(home / "runs" / f"{task}-{name}") for name in ("one", "three")]
    for run in runs:
        given = [
            "--data.glue_dir",
            f"{home}/glue",
            "--task",
            task,
            "--run.name",
            run.root.name,
            "--train.steps",
            "8",
            "--train.lr",
            "1e-3",
            "--train.global_batch_size",
            "8",
        ]
        pool = ranks1
        if run is runs[1]:
            assert ranks1.run(_stopped, str(home), given, 0)[0] == "SIGTERM"
            pool = ranks3
        pool.run(tune, str(home), given)
    losses = [[r["loss"] for r in read_metrics(run.metrics) if "loss" in r] for run in runs]
    assert len(losses[0]) == len(losses[1]) == 8
    assert losses[0][:4] == losses[1][:4]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=0)
    models = [weights(run.private / "model") for run in runs]
    for name, weight in models[0].items():
        torch.testing.assert_close(models[1][name], weight, atol=1e-4, rtol=0)


def test_one_sweep_at_a_time_in_a_folder(ranks2, home):
    given = flags(home, "--task", "sst2", "--run.name", "held")
    with hold(home / "runs/held", "it"):
        message = ranks2.run(finetune.problem, str(home), given)[1]
    assert re.search(r"the run's folder .*held is in use by .* on host ", message)
    assert not (home / "runs/held").exists()


def test_ranks_without_an_example(ranks2, home):
    """The mistake is found before the first cell of a sweep begins."""
    given = flags(home, "--task", "sst2", "--run.name", "never")
    message = ranks2.run(finetune.problem, str(home), given, ("train.global_batch_size=8,1",))[0]
    assert "train.global_batch_size=1 is less than one sequence for each of 2 ranks" in message
    assert not (home / "runs/never").exists()


def test_checkpoints_that_cannot_be_read(ranks2, home):
    """The run is refused and no file changes; started over on request, it gives the same bits."""
    values = []
    for name in ("whole", "spoilt"):
        given = flags(home, "--task", "mrpc", "--run.name", name, "--train.steps", "8")
        run = RunDir(home / "runs" / name)
        if name == "spoilt":
            ranks2.run(_stopped, str(home), given)
            (run.checkpoints / "update-00000005" / "manifest.json").write_text("{}")
            before = files_of(run.root)
            message = ranks2.run(finetune.problem, str(home), given)[0]
            assert "has 1 checkpoint, but none is readable; nothing was changed:" in message
            assert "update-00000005 is damaged: manifest.json" in message
            assert files_of(run.root) == before
        (found,) = ranks2.run(tune, str(home), given, (), 1, True, name == "spoilt")[0]
        values.append(found.values)
    assert (run.private / "checkpoints.unreadable-1" / "update-00000005").is_dir()
    assert values[0] == values[1]
    assert run.config.read_text().startswith("# begun with pmp-ds ")


def _stopped(folder: str, given: list[str], rank: int = 1) -> str:
    from pmp_ds.errors import Stopped

    try:
        with act(4, rank, raise_signal, signal.SIGTERM):
            tune(folder, given)
    except Stopped as stop:
        return str(stop).partition(":")[0]
    raise AssertionError("it did not stop")


def test_text(ranks2, ranks1, home, work):
    """Next tokens on a store: a random mask starts from the same loss, and more steps help."""
    store = str(work / "store")
    ranks1.run(_release_of_store, str(work), str(home / "lm"))
    given = [
        "--task",
        "lm",
        "--data.store",
        store,
        "--train.global_batch_size",
        "8",
        "--train.micro_batch_size",
        "4",
        "--train.steps",
        "20",
        "--train.lr",
        "1e-2",
        "--run.val_every",
        "10",
        "--run.val_blocks",
        "8",
    ]
    sweeps = ("method=full,random",)
    full, masked = ranks2.run(tune, str(home / "lm"), given, sweeps)[0]
    losses = [[loss for _, loss in one.values["curve"]] for one in (full, masked)]
    assert losses[0][0] == losses[1][0]
    for curve in losses:
        assert curve[0] - 0.5 > curve[1] > curve[2]
    assert full.values["metrics"] == {"LM": {"loss": losses[0][-1]}}
    assert full.values["tokens"] == 20 * 8 * 32
    refused = finetune.problem
    other = ranks1.run(refused, str(home), given)[0]
    assert "was tokenized for another model" in other


def _release_of_store(work: str, folder: str) -> None:
    """Return a model with the tokenizer of the store in ``work``."""
    import shutil

    from transformers import AutoTokenizer

    from pmp_ds.model.build import build_model, model_config
    from tests.helpers import tiny

    tokenizer = AutoTokenizer.from_pretrained(f"{work}/store/tokenizer")
    hf_config = model_config(
        tiny.LLAMA,
        vocab_size=len(tokenizer),
        eos_id=tokenizer.eos_token_id,
        bos_id=None,
        block_size=32,
    )
    torch.manual_seed(3)
    build_model(hf_config).save_pretrained(f"{folder}/release")
    shutil.copytree(f"{work}/store/tokenizer", f"{folder}/release", dirs_exist_ok=True)


def test_sealed_ticket(ranks1, home, tmp_path):
    """The partner needs one command; another key is refused."""
    ticket = load_ticket(home / "ticket")
    (tmp_path / "partner.pub").write_text(new_identity(tmp_path / "key.txt") + "\n")
    new_identity(tmp_path / "other.txt")
    sealed = seal(ticket, public_keys([str(tmp_path / "partner.pub")]))
    (tmp_path / "partner.age").write_bytes(sealed)
    given = flags(
        home,
        "--task",
        "rte",
        "--method",
        "ticket",
        "--run.name",
        "partner",
        "--train.steps",
        "2",
        "--ticket",
        str(tmp_path / "partner.age"),
    )
    (found,) = ranks1.run(tune, str(home), [*given, "--identity", str(tmp_path / "key.txt")])[0]
    assert found.settings["mask"] == "own"
    other = [*given, "--identity", str(tmp_path / "other.txt"), "--seed", "1"]
    assert "partner.age" in ranks1.run(finetune.problem, str(home), other)[0]
    assert ticket.id not in json.dumps([found.settings, found.values])


@pytest.mark.parametrize("family", ["gpt2", "padded"])
def test_other_models(ranks1, tmp_path, home, family):
    """GPT-2 with its tied embeddings, and a release without the rows that padded its vocabulary."""
    given = (finetune.GPT2, 0) if family == "gpt2" else (finetune.LLAMA, 7)
    ranks1.run(write_model, tmp_path, *given)
    sweeps = ("method=full,lora,ticket",)
    asked = flags(home, "--task", "stsb", "--ticket", f"{tmp_path}/ticket")
    found = ranks1.run(tune, str(tmp_path), asked, sweeps)[0]
    assert len(found) == 3
    assert {tuple(one.values["metrics"]["STS-B"]) for one in found} == {
        ("pearson", "spearman", "accuracy")
    }


def test_scratch_is_a_control(ranks1, home):
    """Fresh weights of the same architecture: nothing of the release remains."""
    given = flags(
        home,
        "--task",
        "sst2",
        "--scratch",
        "true",
        "--run.name",
        "scratch",
        "--train.steps",
        "1",
        "--train.lr",
        "1e-8",
    )
    (found,) = ranks1.run(tune, str(home), given)[0]
    assert found.settings["scratch"] is True
    before, after = weights(home / "release"), weights(home / "runs/scratch/private/model")
    name = "model.layers.0.mlp.up_proj.weight"
    assert (before[name] != after[name]).float().mean() > 0.99


def test_mistakes(ranks1, home, tmp_path):
    def refused(*more: str, sweeps: tuple[str, ...] = ()) -> str:
        given = flags(home, *more, "--run.name", "never")
        return str(ranks1.run(finetune.problem, str(home), given, sweeps)[0])

    assert "unknown task 'sst3' (did you mean sst2?)" in refused("--task", "sst3")
    assert "--task is missing" in refused()
    assert "needs --ticket" in refused("--task", "sst2", "--method", "ticket")
    assert "no ticket at" in refused(
        "--task", "sst2", "--method", "ticket", "--ticket", str(tmp_path / "none")
    )
    assert "has no config.json" in refused("--task", "sst2", "--model", str(tmp_path))
    message = refused("--task", "sst2", "--method", "lora", "--lora.targets", "nothing")
    assert "--lora.targets nothing" in message
    assert "q_proj" in message

    write_glue(tmp_path / "glue")
    other = ("--data.glue_dir", str(tmp_path / "glue"), "--task", "sst2")
    (tmp_path / "glue/SST-2/validation.jsonl").unlink()
    assert "SST-2 has no validation.jsonl" in refused(*other)
    write_rows(tmp_path / "glue/SST-2/validation.jsonl", [{"sentence": "x", "label": 2}])
    assert "label" in refused(*other)
    assert "line 1" in refused(*other)

    ranks1.run(write_model, tmp_path / "gpt2", finetune.GPT2)
    message = refused("--task", "sst2", "--method", "ticket", "--ticket", f"{tmp_path}/gpt2/ticket")
    assert "the ticket belongs to another model" in message

    assert "write SETTING=A,B" in refused("--task", "sst2", sweeps=("train.lr",))
    assert "twice" in refused("--task", "sst2", sweeps=("seed=1,1",))
    assert "train.lr=0.0 must be positive" in refused("--task", "sst2", sweeps=("train.lr=1e-3,0",))
    assert "--scratch" in refused("--task", "sst2", "--scratch", "true", "--method", "lora")
    assert not (home / "runs/never").exists()


def test_other_settings_in_one_run(ranks1, home):
    given = flags(home, "--task", "sst2", "--run.name", "taken", "--train.steps", "1")
    ranks1.run(tune, str(home), given)
    other = [*given, "--train.lr", "0.5"]
    message = ranks1.run(finetune.problem, str(home), other)[0]
    assert "contains a fine-tuning with other settings" in message
    assert "train.lr: 0.01, 0.5" in message
