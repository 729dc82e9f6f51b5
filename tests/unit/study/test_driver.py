"""Running a study's steps: skipping, failing, side by side. Steps are real processes."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pmp_ds.errors import EXIT_REQUEUE, Stopped, UserError
from pmp_ds.lease import hold
from pmp_ds.run_dir import write_json
from pmp_ds.study.driver import _on_ranks, run
from pmp_ds.study.plan import Step, _argv, describe
from pmp_ds.study.recipe import Arm, Study

pytestmark = pytest.mark.processes

ARMS = {"base": Arm(settings={"mask.source": "none"}), "pmp": Arm()}


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Study, list[Step]]:
    """Two steps that append to files, and a report that does."""

    def program(name: str) -> tuple[str, ...]:
        return ("-c", f"open({str(tmp_path / name)!r}, 'a').write('x')")

    monkeypatch.setattr("pmp_ds.study.driver.report_argv", lambda study: program("report"))
    study = Study(root=str(tmp_path / "root"), arms=ARMS)
    return study, [Step(n, program(n), tmp_path / n) for n in ("first", "second")]


def runs_of(folder: Path) -> dict[str, int]:
    return {path.name: len(path.read_text()) for path in sorted(folder.iterdir()) if path.is_file()}


def test_finished_steps_are_skipped(two: tuple[Study, list[Step]], tmp_path: Path):
    study, planned = two
    run(study, planned, "")
    run(study, planned, "")
    assert runs_of(tmp_path) == {"first": 1, "report": 2, "second": 1}
    assert "2 steps, 0 to do" in describe(study, planned)
    (tmp_path / "first").unlink()  # its output is gone
    planned[1] = replace(planned[1], argv=(*planned[1].argv, "--changed"))
    run(study, planned, "")
    assert runs_of(tmp_path) == {"first": 1, "report": 3, "second": 2}


def test_a_failure_stops_and_the_next_call_goes_on(two: tuple[Study, list[Step]], tmp_path: Path):
    study, planned = two
    bad = Step("bad", ("-c", "raise SystemExit(3)"), tmp_path / "bad")
    with pytest.raises(UserError, match=r"exit code 3 of: .* -c 'raise SystemExit\(3\)'"):
        run(study, [planned[0], bad, planned[1]], "")
    assert runs_of(tmp_path) == {"first": 1}
    run(study, planned, "")
    assert runs_of(tmp_path) == {"first": 1, "report": 1, "second": 1}


def test_a_step_without_its_output_has_failed(two: tuple[Study, list[Step]], tmp_path: Path):
    study, _ = two
    with pytest.raises(UserError, match="gone is missing after"):
        run(study, [Step("empty", ("-c", "pass"), tmp_path / "gone")], "")


@pytest.mark.parametrize(("may_leak", "fails"), [(True, False), (False, True)])
def test_a_leak_is_a_finding(
    two: tuple[Study, list[Step]], tmp_path: Path, may_leak: bool, fails: bool
):
    study, _ = two
    code = f"open({str(tmp_path / 'audit.json')!r}, 'w').close(); raise SystemExit(1)"
    step = Step("audit", ("-c", code), tmp_path / "audit.json", may_leak=may_leak)
    if fails:
        with pytest.raises(UserError, match="exit code 1"):
            run(study, [step], "")
    else:
        run(study, [step], "")
        assert step.is_done(Path(study.root))


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        ("deepspeed --num_gpus 2", "deepspeed --num_gpus 2 --module pmp_ds.commands.pretrain -x"),
        ("A=1 /bin/deepspeed", "env A=1 /bin/deepspeed --module pmp_ds.commands.pretrain -x"),
        ("torchrun", "torchrun -m pmp_ds.commands.pretrain -x"),
        ("python -m pmp_ds.launch --ranks 2", "python -m pmp_ds.launch --ranks 2 pretrain -x"),
    ],
)
def test_launchers_start_a_module(launch: str, words: str):
    assert _on_ranks(launch, ("-m", "pmp_ds.commands.pretrain", "-x")) == words.split()


def test_a_command_begins_in_an_empty_folder(
    two: tuple[Study, list[Step]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    study, _ = two
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    run(study, [Step("help", (*_argv("report"), "--help"), tmp_path)], "")
    assert runs_of(tmp_path) == {"report": 1}


def test_a_marker_of_a_study_that_ran_files(two: tuple[Study, list[Step]], tmp_path: Path):
    step = Step("s", ("-m", "pmp_ds.commands.prepare_data", "--out", "x"), tmp_path)
    step.marker(tmp_path).parent.mkdir()
    write_json(step.marker(tmp_path), {"argv": ["launcher/prepare_data.py", "--out", "x"]})
    assert step.is_done(tmp_path)
    assert not replace(step, argv=(*step.argv, "y")).is_done(tmp_path)


def test_launch_sets_the_environment(two: tuple[Study, list[Step]], tmp_path: Path):
    study, _ = two
    code = f"import os; open({str(tmp_path / 'seen')!r}, 'w').write(os.environ['COLOUR'])"
    run(study, [Step("s", ("-c", code), tmp_path / "seen", ranks=True)], "COLOUR=red python")
    assert (tmp_path / "seen").read_text() == "red"


def test_asked_to_stop(two: tuple[Study, list[Step]], tmp_path: Path):
    study, _ = two
    step = Step("s", ("-c", f"raise SystemExit({EXIT_REQUEUE})"), tmp_path / "s")
    with pytest.raises(Stopped, match="the same command resumes"):
        run(study, [step], "")


def test_a_signal_stops_what_runs(two: tuple[Study, list[Step]], tmp_path: Path):
    """The running command gets it too, however it ends; no further step begins."""
    study, planned = two
    code = (
        f"import time; open({str(tmp_path / 'begun')!r}, 'w').write('x')\n"
        f"try: time.sleep(600)\nexcept KeyboardInterrupt: open({str(tmp_path / 'told')!r}, 'w')"
        ".write('x'); raise SystemExit(3)"
    )
    slow = Step("slow", ("-c", code), tmp_path / "s")

    def signal_when_begun() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=signal_when_begun).start()
    with pytest.raises(Stopped, match="SIGINT: the same command resumes"):
        run(study, [slow, *planned], "")
    assert set(runs_of(tmp_path)) == {"begun", "told"}


def test_one_study_at_a_time(two: tuple[Study, list[Step]], tmp_path: Path):
    study, planned = two
    with hold(Path(study.root), "it"), pytest.raises(UserError, match="root is in use by"):
        run(study, planned, "")
    assert runs_of(tmp_path) == {}


def meeting(folder: Path, name: str, other: str) -> Step:
    """Return a step that ends only once another one has begun as well."""
    code = (
        f"import pathlib, time; here = pathlib.Path({str(folder)!r}); print('begun')\n"
        f"(here / {name!r}).write_text('x'); end = time.time() + 60\n"
        f"while not (here / {other!r}).exists(): time.sleep(0.01); assert time.time() < end"
    )
    return Step(name, ("-c", code), folder / name, independent=True)


def test_two_side_by_side(two: tuple[Study, list[Step]], tmp_path: Path):
    study, _ = two
    run(study, [meeting(tmp_path, "a", "b"), meeting(tmp_path, "b", "a")], "", jobs=2)
    logs = Path(study.root) / "logs"
    assert [(logs / f"{name}.log").read_text().splitlines()[-1] for name in "ab"] == ["begun"] * 2
    assert runs_of(tmp_path)["report"] == 1


def test_side_by_side_waits_for_what_is_needed(two: tuple[Study, list[Step]], tmp_path: Path):
    study, _ = two
    code = f"import time; time.sleep(1); open({str(tmp_path / 'slow')!r}, 'w')"
    slow = Step("slow", ("-c", code), tmp_path / "slow")
    code = f"import os; os.stat({str(tmp_path / 'slow')!r}); open({str(tmp_path / 'n')!r}, 'w')"
    needs = Step("needs", ("-c", code), tmp_path / "n", independent=True)
    run(study, [slow, needs], "", jobs=4)
    assert (tmp_path / "n").exists()


def test_a_failure_side_by_side(two: tuple[Study, list[Step]], tmp_path: Path):
    study, planned = two
    bad = Step(
        "bad", ("-c", "print('why'); raise SystemExit(3)"), tmp_path / "bad", independent=True
    )
    long = Step(
        "long",
        ("-c", f"import time; time.sleep(1); open({str(tmp_path / 'l')!r}, 'w')"),
        tmp_path / "l",
        independent=True,
    )
    never = replace(planned[0], independent=True)
    with pytest.raises(UserError, match=r"exit code 3 of: (?s:.*)what it said: .*bad\.log"):
        run(study, [long, bad, never, replace(never, name="n2")], "", jobs=2)
    assert "why" in (Path(study.root) / "logs" / "bad.log").read_text()
    assert long.is_done(Path(study.root))  # what runs may finish
    assert set(runs_of(tmp_path)) == {"l"}  # nothing else began, nor the report
