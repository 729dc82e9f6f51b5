"""`make clients`: environments are made completely or not at all, and a table names every fault.

The clients here are an empty package, from a folder of wheels; pip contacts nothing else. The tests
that take seconds run when `make clients` does: in `make nightly`.
"""

import contextlib
import os
import signal
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.clients import __main__ as command
from tests.clients import releases, tries
from tests.clients.environments import TORCH, Client, call, complaint, install, ready

NOTHING = Client("Nothing at all", "nothing", ("nothing",), "nothing", common=())
TRIAL = """
import json, sys
client, folder, result = sys.argv[1:]
print("tried", folder)
found = {"ids": 5, "logits": 1e-6, "greedy": 5, "also": [client]}
if "odd" in folder:
    found |= {"greedy": 4}
if "raises" in folder:
    found |= {"error": "ValueError: of /a/b/c.json | d"}
with open(result, "w") as file:
    json.dump(found, file)
if "killed" in folder:
    import os
    os.kill(os.getpid(), 11)
if "raises" in folder:
    raise ValueError
"""


def _wheel(folder: Path, name: str, version: str = "1.0") -> Path:
    """Make a package of an empty module."""
    file, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        named = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"
        wheel.writestr(f"{info}/METADATA", named)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: any")
        wheel.writestr(f"{info}/RECORD", "")
    return file


@pytest.fixture(autouse=True)
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in ("nothing", "unfit"):
        _wheel(folder, name)
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "file:///no/such/index",
        "PIP_FIND_LINKS": str(folder),
        "PYTHONPATH": "/not/the/client's",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.nightly
def test_an_environment_is_made_once_and_a_half_made_one_again(tmp_path: Path) -> None:
    client = replace(NOTHING, packages=("nothing", "unfit"), remove=("unfit",))
    place = client.place(tmp_path)
    python = install(client, tmp_path)
    found = {file.name for file in place.glob("lib/python*/site-packages/*.py")}
    assert found == {"nothing.py"}
    assert (python, ready(client, tmp_path)) == (place / "bin/python", True)

    mark = place / "mark"
    mark.touch()
    assert install(client, tmp_path) == python
    assert mark.exists(), "it was ready, and made again"

    (place / "installed").unlink()  # what a kill leaves
    install(client, tmp_path)
    assert not mark.exists()

    assert not ready(replace(client, packages=("nothing==1.0", "unfit")), tmp_path)


def test_an_environment_that_pip_cannot_make_is_refused_in_a_line(tmp_path: Path) -> None:
    client = replace(NOTHING, packages=("nothing", "absent==7"))
    with pytest.raises(RuntimeError, match=r"^No matching distribution found for absent==7$"):
        install(client, tmp_path)
    assert not ready(client, tmp_path)
    assert "PYTHONPATH" not in client.log(tmp_path).read_text(encoding="utf-8")


def test_torch_alone_is_taken_from_the_index_that_make_was_given(tmp_path: Path) -> None:
    index = tmp_path / "index"
    (index / "torch").mkdir(parents=True)
    wheel = _wheel(index / "torch", *TORCH.split("=="))
    page = f'<!DOCTYPE html><a href="{wheel.name}">{wheel.name}</a>'
    (index / "torch/index.html").write_text(page, encoding="utf-8")
    client = replace(NOTHING, common=(TORCH,))
    install(client, tmp_path, torch_index=index.as_uri())
    assert ready(client, tmp_path)


@pytest.mark.nightly
def test_no_process_of_a_client_is_left(tmp_path: Path) -> None:
    """A server that a client started, after it ended and after its time was up."""
    start = "import subprocess, sys; child = subprocess.Popen(['sleep', '60']); print(child.pid)"
    log = tmp_path / "log"
    for ending, raises in (
        ("", contextlib.nullcontext()),
        ("; sys.stdout.flush(); child.wait()", pytest.raises(RuntimeError, match=r"^no end after")),
    ):
        with log.open("w", encoding="utf-8") as file, raises:
            call(NOTHING, tmp_path, [sys.executable, "-c", start + ending], file, seconds=2)
        child = int(log.read_text(encoding="utf-8"))
        until = time.monotonic() + 5
        while psutil.pid_exists(child) and psutil.Process(child).status() != "zombie":
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("ERROR: no such thing\nWARNING: use another /tmp/pip\n", "no such thing"),
        ("a\nERROR: first\nERROR: Failed to build x\n", "Failed to build x"),
        ("Traceback\nKeyError: '/root/x/y.py'\n", "KeyError: 'y.py'"),
        ("", "it said nothing"),
    ],
)
def test_the_line_that_tells_why(said: str, line: str) -> None:
    assert complaint(said) == line


def _main(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clients: tuple[Client, ...],
    *arguments: str,
    kinds: tuple[str, ...] = ("plain",),
) -> tuple[str, str]:
    """Return the document after `python -m tests.clients`, and the exit code."""
    home, document, trial = tmp_path / "home", tmp_path / "RELEASE.md", tmp_path / "trial.py"
    document.write_text(f"before\n{command.BEGIN}\nold\n{command.END}\nafter\n", encoding="utf-8")
    if not trial.exists():
        trial.write_text(TRIAL, encoding="utf-8")

    def make(folder: Path, name: str) -> Path:
        (folder / name / "release").mkdir(parents=True, exist_ok=True)
        return folder / name / "release"

    for name, value in {
        "HOME": home,
        "DOCUMENT": document,
        "CLIENTS": clients,
        "make": make,
        "KINDS": dict.fromkeys(kinds),
    }.items():
        monkeypatch.setattr(command, name, value)
    monkeypatch.setattr(tries, "TRIAL", trial)
    monkeypatch.setattr(sys, "argv", ["clients", *arguments])
    ended = ""
    try:
        command.main()
    except SystemExit as end:
        ended = str(end)
    return document.read_text(encoding="utf-8"), ended


def test_a_table_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document, ended = _main(tmp_path, monkeypatch, (NOTHING,), kinds=("plain", "bos"))
    row = "| Nothing at all | 1.0 | 5 / 5 | 1e-06 / 1e-06 | 5 / 5 | nothing |"
    assert not ended
    assert document.startswith(f"before\n{command.BEGIN}\n| client |")
    assert document.endswith(f"\n{command.END}\nafter\n")
    assert row in document
    assert "Taken on 2" in document
    shown = capsys.readouterr()
    assert row in shown.out
    assert "[1/1] Nothing at all: installation " in shown.err

    log = NOTHING.log(tmp_path / "home")
    log.unlink()
    again, _ = _main(tmp_path, monkeypatch, (NOTHING,), kinds=("plain", "bos"))
    assert again == document
    assert "[1/1] Nothing at all: plain " in capsys.readouterr().err, "it was installed again"
    assert not log.exists(), "it was tried again"

    os.utime(tmp_path / "trial.py", (2e9, 2e9))  # another trial than before
    _main(tmp_path, monkeypatch, (NOTHING,))
    assert log.exists(), "what another trial found was taken for this one's"


@pytest.mark.nightly
def test_a_client_that_is_missing_is_an_error_and_the_others_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = replace(NOTHING, name="Missing", packages=("absent",))
    document, ended = _main(tmp_path, monkeypatch, (missing, NOTHING))
    assert "Missing cannot be installed: No matching distribution found for absent" in ended
    assert "\nold\n" in document, "a table with a hole went into the document"
    out = capsys.readouterr().out
    assert "| Missing | - | - | - | - | not installed: No matching distribution" in out
    assert "| Nothing at all | 1.0 | 5 |" in out

    document, ended = _main(tmp_path, monkeypatch, (missing, NOTHING), "--only", "Noth", "vLLM")
    assert (ended, "\nold\n" in document) == ("", True)
    _, ended = _main(tmp_path, monkeypatch, (missing, NOTHING), "--only", "vLLM")
    assert ended == "2"
    assert "no client is named vLLM...: Missing, Nothing at all" in capsys.readouterr().err


def test_what_was_not_as_expected_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ("odd", "raises", "killed")
    document, ended = _main(tmp_path, monkeypatch, (NOTHING,), kinds=kinds)
    out = capsys.readouterr().out
    assert "\nold\n" in document
    assert "Nothing at all on odd: {" in ended
    assert "Nothing at all on raises: ValueError: of c.json / d (" in ended
    assert f"killed: killed by {signal.Signals.SIGSEGV.name} |" in out
    before = NOTHING.log(tmp_path / "home").stat().st_size
    _main(tmp_path, monkeypatch, (NOTHING,), kinds=kinds)
    assert NOTHING.log(tmp_path / "home").stat().st_size > before, "it was not tried again"
    assert "| 5 / 5 / 5 | 1e-06 / 1e-06 / 1e-06 | 4 / 5 / 5 |" in out


@pytest.mark.nightly
def test_a_half_made_release_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "UPDATES", 1)
    for left in ("tokenizer", "weights", "release"):
        (tmp_path / "gpt2" / left).mkdir(parents=True)
    expected = tmp_path / "gpt2/expected.json"
    expected.write_text('{"made_of": "', encoding="utf-8")  # cut short
    release = releases.make(tmp_path, "gpt2")
    before = expected.stat().st_mtime_ns
    assert (release / "model.safetensors").exists()
    assert releases.make(tmp_path, "gpt2") == release
    assert expected.stat().st_mtime_ns == before, "it was there, and made again"
    monkeypatch.setattr(releases, "_texts", lambda: ["another corpus"])
    monkeypatch.setattr(releases, "prepare", lambda config: (_ for _ in ()).throw(KeyError))
    with pytest.raises(KeyError):
        releases.make(tmp_path, "gpt2")
    assert not expected.exists(), "a release of yesterday's code was tried"
