"""results.jsonl: keys, several writers, lines cut off by a kill."""

import multiprocessing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pmp_ds import results
from pmp_ds.errors import UserError
from pmp_ds.results import Result

RESULT = Result(
    kind="finetune",
    arm="base",
    model="m",
    model_digest="ab",
    settings={"lr": 1e-4, "seed": 0},
    values={"score": 0.5},
    seconds=1.0,
    hardware="none",
)


def test_round_trip_keeps_the_last_of_a_key(tmp_path: Path):
    file = tmp_path / "a" / "results.jsonl"
    later = replace(RESULT, values={"score": 0.75}, model="elsewhere", arm="renamed")
    other = replace(RESULT, settings={"lr": 1e-4, "seed": 1})
    for result in (RESULT, other, later):
        results.append(file, result)
    assert results.read(file) == [other, later]
    assert later.key == RESULT.key != other.key
    assert replace(RESULT, kind="perplexity").key != RESULT.key
    assert replace(RESULT, model_digest="cd").key != RESULT.key


def test_another_ticket_is_another_measurement(tmp_path: Path):
    file, settings = tmp_path / "results.jsonl", {"mask": "own", "ticket": results.mark("a")}
    old = replace(RESULT, settings={"mask": "own"}, model_digest="of 0.1.0")
    for result in (replace(RESULT, settings=settings), old):
        results.append(file, result)
    known = {one.key: one for one in results.read(file)}
    other = settings | {"ticket": results.mark("b")}
    assert results.find(known, "finetune", "ab", settings) == replace(RESULT, settings=settings)
    assert results.find(known, "finetune", "ab", other) is None
    assert results.find(known, "finetune", "of 0.1.0", other) == old, "which names no ticket"
    assert results.find(known, "perplexity", "ab", settings) is None


@pytest.mark.parametrize("method", ["ticket", "complement"])
def test_settings_of_fine_tuning_tell_tickets_apart(method: str):
    from pmp_ds.finetune.cell import settings_of
    from pmp_ds.finetune.config import FinetuneConfig

    config = FinetuneConfig(model="m", task="sst2", method=method, ticket="t")
    task: Any = SimpleNamespace(digest="d")
    first, second = (settings_of(config, task, one) for one in ("a", "b"))
    assert first != second
    assert first | {"ticket": ""} == second | {"ticket": ""}
    assert "ticket" not in settings_of(FinetuneConfig(model="m", task="sst2"), task, None)


def test_a_last_line_without_its_end_is_kept(tmp_path: Path):
    """An editor, or a copy, took it away."""
    file, second = tmp_path / "results.jsonl", replace(RESULT, settings={"seed": 1})
    results.append(file, RESULT)
    file.write_bytes(file.read_bytes()[:-1])
    results.append(file, second)
    assert results.read(file) == [RESULT, second]


def test_missing_file_is_empty(tmp_path: Path):
    assert results.read(tmp_path / "results.jsonl") == []


def _write(file: Path, first: int) -> None:
    for i in range(50):
        results.append(file, replace(RESULT, settings={"seed": first + i}))


@pytest.mark.processes
def test_several_writers(tmp_path: Path):
    file = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(file, 100 * i)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    seeds = {result.settings["seed"] for result in results.read(file)}
    assert seeds == {100 * i + j for i in range(3) for j in range(50)}


def test_cut_off_line_is_left_out_and_then_removed(tmp_path: Path):
    file = tmp_path / "results.jsonl"
    results.append(file, RESULT)
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:40])
    assert results.read(file) == [RESULT]
    other = replace(RESULT, settings={"seed": 1})
    results.append(file, other)
    assert results.read(file) == [RESULT, other]


def test_damaged_line_is_named(tmp_path: Path):
    file = tmp_path / "results.jsonl"
    results.append(file, RESULT)
    file.write_bytes(b"{]\n" + file.read_bytes())
    with pytest.raises(UserError, match="line 1 is damaged"):
        results.read(file)
