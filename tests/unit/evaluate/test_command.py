"""Each mistake of launcher/evaluate.py is one clear error, before anything is measured."""

from pathlib import Path

import pytest

from pmp_ds import results
from pmp_ds.commands.evaluate import main
from pmp_ds.errors import UserError
from pmp_ds.evaluate import harness
from pmp_ds.ticket.mask import ParamMask
from pmp_ds.ticket.ticket import Ticket, save_ticket
from tests.helpers.stores import write_store as write_numbered
from tests.unit.evaluate.conftest import write_store


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, release: Path, mask: ParamMask) -> Path:
    """Return a folder with model/, store/, other stores, ticket/ and files of the wrong kind."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "model").symlink_to(release)
    write_store(folder / "store", release)
    write_numbered(folder / "numbers", first=0, train=2)
    (folder / "empty.txt").touch()
    shapes = {name: (*shape, 1) for name, shape in mask.shapes.items()}
    altered = ParamMask(bits=mask.bits, shapes=shapes)
    for name, own in (("ticket", mask), ("other", altered)):
        save_ticket(
            Ticket(
                mask=own,
                density=0.7,
                source="random",
                score=None,
                step=None,
                stable=True,
                model_digest="d",
            ),
            folder / name,
        )
    return folder


STORE = ("--store", "store")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sizes"], "unknown measure 'sizes'; the measures are perplexity"),
        (["perplexity"], "perplexity needs --store; see --help"),
        (["last_word"], "last_word needs --text"),
        (["lm_eval"], "lm_eval needs --tasks"),
        (["gradients", *STORE], "gradients needs --ticket"),
        (["landscape", "--ticket", "ticket"], "landscape needs --store"),
        (["glue", "--model", "nowhere"], "--model nowhere does not exist"),
        (["glue", "--model", "store"], "store is not a model: it has no config.json"),
        (["glue", "--results", "model/r.jsonl"], "--results model/r.jsonl is inside --model model"),
        (["glue", "--results", "store"], "--results store is a folder"),
        (["glue", "--glue_tasks", "sst"], r"unknown task 'sst' \(did you mean"),
        (["glue", "--glue_dir", "store"], "store has no folder CoLA/"),
        (["last_word", "--text", "nowhere"], "--text nowhere does not exist"),
        (["last_word", "--text", "empty.txt"], "--text empty.txt is empty"),
        (["perplexity", "--store", "model"], r"the data folder model has no manifest.json"),
        (["perplexity", "--store", "numbers"], "has a vocabulary of 100000 ids, the model"),
        (["perplexity", *STORE, "--blocks", "0"], "--blocks 0 must be at least 1"),
        (["perplexity", *STORE, "--device", "tpu9"], "--device tpu9: "),
        (["gradients", *STORE, "--ticket", "store"], "no ticket at store"),
        (["gradients", *STORE, "--ticket", "empty.txt"], "is a sealed file: pass --identity"),
        (["gradients", *STORE, "--ticket", "other"], "the ticket belongs to another model"),
        (
            ["landscape", *STORE, "--ticket", "ticket", "--finetuned", "store"],
            "store is not a model: it has no config.json",
        ),
    ],
)
def test_mistakes(place: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str):
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=message):
        main([*arguments, *(() if "--model" in arguments else ("--model", "model"))])
    assert not (place / "results.jsonl").exists()


def test_nothing_is_measured_twice(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(place)
    file = tmp_path / "new" / "results.jsonl"
    command = [
        "perplexity",
        "gradients",
        "--model",
        "model",
        *STORE,
        "--ticket",
        "ticket",
        "--results",
        str(file),
    ]
    main(command)
    first = results.read(file)
    assert [result.kind for result in first] == ["perplexity", "gradients"]
    assert "they are for its owner's study" in capsys.readouterr().out
    main([*command, "--batch_size", "2"])
    assert capsys.readouterr().out.count(f"already in {file}") == 2
    main([*command, "--blocks", "2"])
    main([*command, "--again"])
    assert len(file.read_text().splitlines()) == 6
    assert [result.values for result in results.read(file)[-2:]] == [r.values for r in first]


def test_a_later_mistake_stops_the_first_measure(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place)
    command = ["perplexity", "last_word", "--model", "model", *STORE, "--text", "empty.txt"]
    with pytest.raises(UserError, match="empty"):
        main(command)
    assert not (place / "results.jsonl").exists()


def test_harness_is_not_installed(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(harness, "PACKAGE", "no-such-package")
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=r"not installed: pip install 'pmp_ds\[eval\]'"):
        main(["lm_eval", "--model", "model", "--tasks", "piqa"])
