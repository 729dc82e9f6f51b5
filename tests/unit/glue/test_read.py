"""Every task from files and through `datasets`; subsets; every fault of a file."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pmp_ds.errors import UserError
from pmp_ds.glue.read import TaskData, load
from pmp_ds.glue.tasks import COLUMNS, TASKS, find_task
from tests.helpers.glue import write_glue, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"))


def read(folder: Path, name: str, max_train: int | None = None, seed: int = 0) -> TaskData:
    return load(find_task(name), folder, max_train, seed)


def test_columns_are_those_of_the_paper():
    assert COLUMNS == ("CoLA", "SST-2", "MRPC", "QQP", "STS-B", "MNLI-m", "MNLI-mm", "QNLI", "RTE")


def test_every_task_from_files(folder: Path):
    columns: list[str] = []
    for name, task in TASKS.items():
        data = read(folder, name)
        columns += data.validation
        for rows, count in ((data.train, 48), *((rows, 24) for rows in data.validation.values())):
            assert len(rows) == len(rows.labels) == count
            assert {len(texts) for texts in rows.texts} == {len(task.fields)}
            assert rows.labels.dtype == (np.float32 if name == "stsb" else np.int64)
            assert set(rows.labels) == set(range(6 if name == "stsb" else task.num_outputs))
    assert tuple(columns) == COLUMNS


def test_words_are_labels_in_the_order_of_glue(folder: Path):
    """The deciding word of the generated rows is found at its integer."""
    matched = read(folder, "mnli").validation["MNLI-m"]
    adverbs = ("surely", "perhaps", "never")
    for (_, hypothesis), label in zip(matched.texts, matched.labels, strict=True):
        assert adverbs[label] in hypothesis
    for (_, second), label in zip(*_columns(read(folder, "rte")), strict=True):
        assert ("an animal" in second) == (label == 0)
    for (question, sentence), label in zip(*_columns(read(folder, "qnli")), strict=True):
        assert question.startswith("What colour")
        assert ("was sold" in sentence) == (label == 1)


def _columns(data: TaskData) -> tuple[list[tuple[str, ...]], np.ndarray]:
    return data.train.texts, data.train.labels


def test_similarities_need_not_be_integers(tmp_path: Path):
    home = write_glue(tmp_path) / "STS-B"
    write_rows(home / "train.jsonl", [{"sentence1": "a", "sentence2": "b", "label": 3.75}])
    assert read(tmp_path, "stsb").train.labels.tolist() == [3.75]


def test_mnli_with_one_of_its_columns(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "MNLI", tmp_path / "mnli")
    (tmp_path / "mnli" / "validation_mismatched.jsonl.gz").unlink()
    data = read(tmp_path, "mnli")
    assert list(data.validation) == ["MNLI-m"]
    assert data.train.sha256 == read(folder, "mnli").train.sha256


def test_a_file_with_the_exact_name_comes_first(tmp_path: Path):
    write_glue(tmp_path)
    write_rows(tmp_path / "SST-2" / "train_sample.jsonl", [{"sentence": "x", "label": 0}])
    assert len(read(tmp_path, "sst2").train) == 48
    (tmp_path / "SST-2" / "train.jsonl").unlink()
    assert read(tmp_path, "sst2").train.texts == [("x",)]


def test_max_train_draws_the_same_rows_for_the_same_seed(folder: Path):
    everything = read(folder, "sst2").train
    ten, again, five, other = (
        read(folder, "sst2", max_train=count, seed=seed).train
        for count, seed in ((10, 3), (10, 3), (5, 3), (10, 4))
    )
    assert len(ten) == 10
    assert ten.texts == again.texts
    assert ten.sha256 == again.sha256
    assert len({everything.sha256, ten.sha256, five.sha256, other.sha256}) == 4
    rows = list(zip(everything.texts, everything.labels.tolist(), strict=True))
    places = [rows.index(row) for row in zip(ten.texts, ten.labels.tolist(), strict=True)]
    assert len(places) == 10
    assert set(five.texts) <= set(ten.texts)
    assert ten.texts != other.texts
    assert read(folder, "sst2", max_train=48).train.sha256 == everything.sha256
    assert read(folder, "sst2", max_train=10).validation["SST-2"].sha256 == (
        read(folder, "sst2").validation["SST-2"].sha256
    )


def test_digest_sees_texts_labels_and_order(folder: Path):
    rows = read(folder, "rte").train
    backwards = rows.take(np.arange(len(rows))[::-1])
    relabelled = type(rows)(rows.texts, 1 - rows.labels)
    assert len({rows.sha256, backwards.sha256, relabelled.sha256}) == 3
    assert rows.sha256 == rows.take(np.arange(len(rows))).sha256


def test_without_a_folder_datasets_reads_the_same_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A dataset repository on disk, with a configuration per task as on the hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub = tmp_path / "hub"
    splits = {
        "train": "train_sample",
        "validation_matched": "validation_matched",
        "validation_mismatched": "validation_mismatched",
    }
    files = "".join(
        f"  - split: {split}\n    path: MNLI/{stem}.jsonl.gz\n" for split, stem in splits.items()
    )
    shutil.copytree(folder / "MNLI", hub / "MNLI")
    (hub / "README.md").write_text(
        f"---\nconfigs:\n- config_name: mnli\n  data_files:\n{files}---\n"
    )
    found = load(TASKS["mnli"], None, hub=str(hub))
    local = read(folder, "mnli")
    assert found.train.sha256 == local.train.sha256
    assert {column: rows.sha256 for column, rows in found.validation.items()} == {
        column: rows.sha256 for column, rows in local.validation.items()
    }
    with pytest.raises(UserError, match=r"hub, sst2, train cannot be read .*SST-2/train\.jsonl"):
        load(TASKS["sst2"], None, hub=str(hub))


def test_unknown_task():
    with pytest.raises(UserError, match=r"'SST-2' \(did you mean sst2\?\); .*cola.*rte$"):
        find_task("SST-2")
    with pytest.raises(UserError, match=r"unknown task 'squad'; the tasks are cola"):
        find_task("squad")


def test_max_train_has_to_be_positive(folder: Path):
    with pytest.raises(UserError, match="max_train=0"):
        read(folder, "sst2", max_train=0)


def _line(task: str, row: object) -> Callable[[Path], None]:
    """Put ``row`` (JSON, or bytes unchanged) after the first line of a task's training file."""

    def change(folder: Path) -> None:
        file = folder / task / "train.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        lines.insert(1, row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n")
        file.write_bytes(b"".join(lines))

    return change


def _file(name: str, content: bytes | None) -> Callable[[Path], None]:
    """Write the file, or remove it."""

    def change(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)

    return change


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / name)


PAIR = {"sentence1": "a", "sentence2": "b"}
BAD = {
    "no folder": ("sst2", _remove("."), "glue is not a folder: name one with SST-2/"),
    "no task": ("qqp", _remove("QQP"), "glue has no folder QQP/, only CoLA, MNLI, MRPC, QNLI"),
    "task twice": ("sst2", _file("sst2/x", b""), "several of one kind: SST-2, sst2; keep one"),
    "no train": (
        "mrpc",
        _file("MRPC/train.jsonl", None),
        "MRPC has no train.jsonl or train.jsonl.gz, only validation.jsonl",
    ),
    "no validation": (
        "mrpc",
        _file("MRPC/validation.jsonl", None),
        "MRPC has no validation.jsonl",
    ),
    "split twice": (
        "sst2",
        _file("SST-2/train.jsonl.gz", b""),
        "several of one kind: train.jsonl, train.jsonl.gz; keep one",
    ),
    "empty": ("sst2", _file("SST-2/train.jsonl", b"\n\n"), "train.jsonl has no rows: sst2"),
    "not gzip": (
        "cola",
        _file("CoLA/train.jsonl.gz", b"{}"),
        "CoLA/train.jsonl.gz cannot be read (Not a gz",
    ),
    "cut off": (
        "cola",
        _file("CoLA/train.jsonl.gz", gzip.compress(b'{"sentence": "a", "label": 1}')[:-9]),
        "CoLA/train.jsonl.gz cannot be read",
    ),
    "not JSON": ("sst2", _line("SST-2", b"great\t1\n"), "train.jsonl, line 2: it is not JSON"),
    "not UTF-8": ("sst2", _line("SST-2", b'"\xff"\n'), "train.jsonl, line 2: it is not UTF-8"),
    "not an object": ("sst2", _line("SST-2", ["a", 1]), "line 2: ['a', 1] is not a JSON object"),
    "no column": (
        "sst2",
        _line("SST-2", {"text": "a", "label": 1}),
        "line 2: no field 'sentence', which sst2 needs, only text, label; fix or delete it",
    ),
    "no label": ("sst2", _line("SST-2", {"sentence": "a"}), "line 2: no field 'label'"),
    "no text": (
        "sst2",
        _line("SST-2", {"sentence": None, "label": 1}),
        "line 2: field 'sentence' is None, not a text",
    ),
    "half a character": (
        "sst2",
        _line("SST-2", b'{"sentence": "\\ud800", "label": 1}\n'),
        "line 2: it is not UTF-8, or has",
    ),
    "hidden label": (
        "sst2",
        _line("SST-2", {"sentence": "a", "label": -1}),
        "line 2: label -1 is not a number from 0 to 1 or one of negative, positive; fix",
    ),
    "label too large": ("rte", _line("rte", {**PAIR, "label": 2}), "line 2: label 2 is not"),
    "half a class": ("rte", _line("rte", {**PAIR, "label": 0.5}), "line 2: label 0.5 is not"),
    "true": ("rte", _line("rte", {**PAIR, "label": True}), "line 2: label True is not"),
    "unknown word": (
        "rte",
        _line("rte", {**PAIR, "label": "neutral"}),
        "line 2: label 'neutral' is not a number from 0 to 1 or one of entailment, not_entailment",
    ),
    "similarity": (
        "stsb",
        _line("STS-B", {**PAIR, "label": 5.1}),
        "line 2: label 5.1 is not a number from 0 to 5; fix",
    ),
    "similarity in words": ("stsb", _line("STS-B", {**PAIR, "label": "5"}), "label '5' is not"),
    "not a number": (
        "stsb",
        _line("STS-B", {**PAIR, "label": float("nan")}),
        "line 2: label nan is not",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str, folder: Path, tmp_path: Path):
    task, change, message = BAD[case]
    copy = tmp_path / "glue"
    shutil.copytree(folder, copy)
    change(copy)
    with pytest.raises(UserError) as error:
        read(copy, task)
    assert message in str(error.value)
