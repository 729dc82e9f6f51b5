"""Every mistake gives one line and exit code 1, and leaves nothing behind."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import yaml

from pmp_ds.config import Config
from pmp_ds.prepare.config import PrepareConfig
from tests.e2e.conftest import MainRun
from tests.helpers.commands import call, error_of, files_of, ok, run
from tests.helpers.faults import seen
from tests.helpers.stores import write_store
from tests.helpers.workdir import PREPARE

pytestmark = pytest.mark.e2e

TRAIN = ("pretrain.py", "--config", "tiny.yaml", "--run.root", "bad")


def refused(work: Path, *arguments: str | Path, watched: tuple[Path, ...] = ()) -> str:
    """Return the message of a training that must not start."""
    before = files_of(work / "store", *watched)
    message = error_of(call(*TRAIN, *arguments, cwd=work))
    assert before == files_of(work / "store", *watched)
    assert not (work / "bad").exists()
    return message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mask.density", "0"), "mask.density=0.0 must be in (0, 1]"),
        (("--mask.density", "1.2"), "mask.density=1.2 must be in (0, 1]"),
        (("--mask.densty", "0.5"), "unknown flag --mask.densty (did you mean --mask.density?)"),
        (("--train.steps", "ten"), "train.steps: expected int, got ten"),
        (("--config", "nowhere.yaml"), "cannot be read: nowhere.yaml is missing"),
        (("--run.name", "a/b"), "run.name='a/b' is not a folder name"),
        (("--mask.source", "file"), "mask.file=None does not go with mask.source='file'"),
        (("--train.micro_batch_size", "0"), "train.micro_batch_size=0 must be at least 1"),
        (
            ("--train.micro_batch_size", "many"),
            "train.micro_batch_size: expected int or 'auto', got many",
        ),
        (("--data.store", "nowhere"), "the data folder nowhere does not exist"),
        (("--data.store", "{store: 1, nowhere: 2}"), "the data folder nowhere does not exist"),
        (("--data.store", "{store: 1, b: 0}"), "data.store: the weight of b is 0.0; it must be"),
        (("--data.store", "{store: much}"), "write {FOLDER: WEIGHT, FOLDER: WEIGHT} with numbers"),
        (("--data.store", "{}"), "data.store={} names no folder"),
        (
            ("--data.separate_documents", "true", "--model.family", "auto", "--model.path", "x"),
            "data.separate_documents=true needs model.family=llama or gpt2",
        ),
        (("--deepspeed-config", "nowhere.json"), "--deepspeed-config nowhere.json: no such file"),
        (("--model.vocab_size", "20"), "model.vocab_size=20 is smaller than the tokenizer's 400"),
        (
            ("--mask.source", "file", "--mask.file", "nowhere"),
            "no ticket at nowhere: nowhere/ticket.json is missing",
        ),
        (("--run.root", "tiny.yaml"), "the run's folder tiny.yaml/main cannot be written"),
    ],
)
def test_settings(work: Path, arguments: tuple[str, ...], message: str):
    assert message in refused(work, *arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mask: {densty: 0.5}\n", "unknown setting mask.densty (did you mean mask.density?)"),
        ("train: {lr: fast}\n", "train.lr: expected float, got fast"),
    ],
)
def test_yaml(work: Path, tmp_path: Path, text: str, message: str):
    (tmp_path / "wrong.yaml").write_text(text)
    assert message in refused(work, "--config", tmp_path / "wrong.yaml")


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        (
            {"train_batch_size": 99, "bf16": {"enabled": True}, "gradient_clipping": 5.0},
            ["train_batch_size is 99, the recipe says 8", "bf16 is", "gradient_clipping is 5.0"],
        ),
        ({"optimizer": {"type": "AdamW"}}, ["optimizer: the optimizer is train.*"]),
        ("{", ["is not JSON"]),
    ],
)
def test_deepspeed_json(work: Path, tmp_path: Path, settings: object, messages: list[str]):
    path = tmp_path / "wrong.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    message = refused(work, "--deepspeed-config", path)
    assert all(part in message for part in messages)


@pytest.fixture
def copy_of_store(work: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(work / "store", tmp_path / "store"))


def test_flipped_byte_in_a_shard(work: Path, copy_of_store: Path):
    shard = next((copy_of_store / "train").glob("*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    message = refused(work, "--data.store", copy_of_store, watched=(copy_of_store,))
    assert f"data shard {shard} is damaged: its content changed" in message


def test_truncated_shard(work: Path, copy_of_store: Path):
    shard = next((copy_of_store / "validation").glob("*.arrow"))
    os.truncate(shard, shard.stat().st_size - 100)
    message = refused(work, "--data.store", copy_of_store, watched=(copy_of_store,))
    assert f"data shard {shard} is damaged: it has" in message


def test_missing_shard(work: Path, copy_of_store: Path):
    shard = next((copy_of_store / "train").glob("*.arrow"))
    shard.unlink()
    message = refused(work, "--data.store", copy_of_store, watched=(copy_of_store,))
    assert f"data shard {shard} is damaged: it is missing; run pmp-ds prepare-data" in message


def test_swapped_shards(work: Path, tmp_path: Path):
    """Two shards of equal shape are swapped: only their hashes differ."""
    folder = write_store(tmp_path / "store", 0, 64, shard=32, vocab_size=400)
    a, b = sorted((tmp_path / "store" / "train").glob("*.arrow"))
    assert a.stat().st_size == b.stat().st_size
    a.rename(tmp_path / "a")
    b.rename(a)
    (tmp_path / "a").rename(b)
    message = refused(work, "--data.store", folder, watched=(tmp_path,))
    assert f"data shard {a} is damaged: its content changed since it was written" in message


def test_edited_tokenizer(work: Path, copy_of_store: Path):
    path = copy_of_store / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"kana', '"kanu', 1))
    message = refused(work, "--data.store", copy_of_store, watched=(copy_of_store,))
    assert f"tokenizer file {path} is missing or was changed" in message
    done = call("prepare_data.py", "verify", copy_of_store, cwd=work)
    assert error_of(done) == message


def test_another_tokenizer_at_the_same_out(work: Path):
    before = files_of(work)
    prepare = ("prepare_data.py", *PREPARE, "--out", "store")
    message = error_of(call(*prepare, "--tokenizer", "store/tokenizer", cwd=work))
    assert "out=store contains another store (tokenizer is" in message
    assert before == files_of(work)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "input corpus.txt does not exist"),
        ("", "input corpus.txt contains no document with text"),
    ],
)
def test_corpus(tmp_path: Path, text: str | None, message: str):
    if text is not None:
        (tmp_path / "corpus.txt").write_text(text)
    before = files_of(tmp_path)
    done = call("prepare_data.py", "--input", "corpus.txt", "--out", "packed", cwd=tmp_path)
    assert message in error_of(done)
    assert before == files_of(tmp_path)


def test_folder_of_another_run(main_run: MainRun, work: Path):
    before = files_of(main_run.run.root)
    changes = ("--train.lr", "0.5", "--mask.density", "0.4", "--run.log_every", "3")
    message = error_of(call("pretrain.py", "--config", "tiny.yaml", *changes, cwd=work))
    lines = message.splitlines()
    assert "runs/main contains a run with another configuration" in lines[0]
    assert "--config runs/main/config.yaml" in lines[0]
    assert sorted(lines[1:]) == ["  mask.density: 0.7, 0.4", "  train.lr: 0.01, 0.5"]
    assert before == files_of(main_run.run.root)


def test_ticket_of_another_model(main_run: MainRun, work: Path):
    ticket = main_run.run.ticket
    message = refused(
        work,
        "--mask.source",
        "file",
        "--mask.file",
        ticket,
        "--model.intermediate_size",
        "64",
        watched=(ticket,),
    )
    assert f"the ticket at {ticket} belongs to a model with other parameters" in message


def test_export_and_report_of_no_run(main_run: MainRun, work: Path, tmp_path: Path):
    before = files_of(tmp_path)
    message = error_of(call("export.py", "--run", tmp_path, cwd=work))
    assert f"{tmp_path} is not a run" in message
    assert "is not a run" in error_of(call("report.py", "--run", tmp_path, cwd=work))
    assert before == files_of(tmp_path)

    for name in ("config.yaml", "data.json"):  # a run that has only just begun
        shutil.copy(main_run.run.root / name, tmp_path)
    shutil.copytree(main_run.run.init, tmp_path / "private" / "init")
    os.chmod(tmp_path / "private", 0o700)
    before = files_of(tmp_path / "private" / "init")
    message = error_of(call("export.py", "--run", tmp_path, cwd=work))
    assert f"{tmp_path} has no checkpoint yet" in message
    message = error_of(call("export.py", "--run", tmp_path, "--checkpoint", "x", cwd=work))
    assert "--checkpoint x is neither" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "data.json", "private"]
    assert before == files_of(tmp_path / "private" / "init")
    message = error_of(
        call(
            "export.py",
            "--run",
            "runs/main",
            "--checkpoint",
            "7",
            "--out",
            tmp_path / "out",
            cwd=work,
        )
    )
    assert "has no checkpoint of update 7; it has: 40, 30" in message


@pytest.mark.nightly
@pytest.mark.parametrize("case", ["ranks", "shard"])
def test_two_ranks_say_it_once(work: Path, copy_of_store: Path, case: str):
    """One mistake that every rank finds, one that only rank 0 checks; neither hangs."""
    if case == "ranks":
        arguments = ("--train.global_batch_size", "1")
        expected = "=1 is less than one sequence for each of 2 ranks: start at most 1"
    else:
        shard = next((copy_of_store / "train").glob("*.arrow"))
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        arguments = ("--data.store", str(copy_of_store))
        expected = "is damaged"
    start = time.monotonic()
    done = run(*TRAIN, *arguments, cwd=work, ranks=2)
    assert time.monotonic() - start < 60
    message = error_of(done)
    assert expected in message
    if case == "ranks":
        seen("too many ranks", done.returncode, message)
    assert not (work / "bad").exists()


@pytest.mark.parametrize("launcher", ["prepare_data.py", "pretrain.py"])
def test_printed_settings_are_read_back(work: Path, tmp_path: Path, launcher: str):
    flag = ("--block_size", "64") if launcher == "prepare_data.py" else ("--train.lr", "1e-3")
    printed = ok(call(launcher, *flag, "--print_config", cwd=tmp_path)).stdout
    kind = PrepareConfig if launcher == "prepare_data.py" else Config
    assert yaml.safe_load(printed).keys() == kind.__dataclass_fields__.keys()
    (tmp_path / "printed.yaml").write_text(printed)
    again = ok(call(launcher, "--config", "printed.yaml", "--print_config", cwd=tmp_path))
    assert again.stdout == printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["printed.yaml"]
