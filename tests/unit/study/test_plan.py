"""The driver: the commands of a recipe, skipping, failing. Steps are real processes."""

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pmp_ds.cli import parse
from pmp_ds.errors import UserError
from pmp_ds.study.plan import Step, describe, report_argv, run, steps
from pmp_ds.study.recipe import Arm, Audit, Study, Tuning
from tests.helpers.distributed import REPO

ARMS = {"base": Arm(settings={"mask.source": "none"}), "pmp": Arm()}
RECIPE = REPO / "launcher" / "recipes" / "study-small.yaml"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


@pytest.fixture(scope="module")
def small() -> Iterator[tuple[Study, list[Step]]]:
    """The shipped recipe and its plan."""
    before = Path.cwd()
    os.chdir(REPO)
    study, _ = parse(Study, ["--config", str(RECIPE), "--root", "s"])
    yield study, steps(study)
    os.chdir(before)


def test_plan_of_the_small_study(small: tuple[Study, list[Step]]):
    study, planned = small
    assert len({step.name for step in planned}) == len(planned) == 40
    text = describe(study, planned)
    assert "  to do finetune-0-base-sst2                    48 cells" in text
    assert text.splitlines()[-1] == (
        "40 steps, 40 to do; 7 models, 516 fine-tunings; then the report, s/report/"
    )
    kinds = [step.name.partition("-")[0] for step in planned]
    assert list(dict.fromkeys(kinds)) == ["prepare", "pretrain", "export", "finetune", "evaluate",
                                          "audit"]  # fmt: skip


def test_commands(small: tuple[Study, list[Step]]):
    commands = {step.name: shlex.join(step.argv) for step in small[1]}
    launcher = commands["export-pmp"].partition("/export.py")[0]
    for name, rest in {
        "export-pmp": "/export.py --run s/runs/pmp",
        "pretrain-pmp-0.5": "/pretrain.py --config launcher/recipes/demo.yaml --mask.density 0.5 "
        "--run.root s/runs --run.name pmp-0.5",
        "finetune-1-pmp-sst2": "/finetune.py --model s/runs/pmp/release --task sst2 --arm pmp "
        "--results s/results.jsonl --run.root s/finetune --run.name 1-pmp-sst2 --ticket "
        "s/runs/pmp/private/ticket --density 0.7 --data.max_train 4000 --sweep "
        "method=ticket,random,complement --sweep train.lr=1e-05,0.0001,0.001,0.003 --sweep "
        "train.epochs=1,3 --sweep seed=0,1,2",
        "evaluate-1-pmp": "/evaluate.py landscape gradients --model s/runs/pmp/release --arm pmp "
        "--results s/results.jsonl --ticket s/runs/pmp/private/ticket --store tokenized_data/demo",
        "audit-pmp": "/audit.py --release s/runs/pmp/release --ticket s/runs/pmp/private/ticket "
        "--config s/runs/pmp/config.yaml --out s/audit/pmp --text tokenized_data/demo",
    }.items():
        assert commands[name] == launcher + rest
    assert "--scratch true" in commands["finetune-2-base-sst2"]
    assert shlex.join(report_argv(small[0])).endswith("--audit s/audit/pmp/audit.json")


def test_attackers_of_base_and_pmp_have_the_same_tries(small: tuple[Study, list[Step]]):
    grids = {
        step.name: [word for flag, word in zip(step.argv, step.argv[1:], strict=False)
                    if flag == "--sweep"]
        for step in small[1] if step.name.startswith("finetune-0")
    }  # fmt: skip
    assert grids["finetune-0-base-sst2"] == grids["finetune-0-pmp-sst2"]


def tuning(**changed: object) -> Tuning:
    fields = {"arms": ["pmp"], "tasks": ["rte"], "methods": ["full"], "sweep": {"seed": [0]}}
    return Tuning(**fields | changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arms": {"pmp": Arm()}}, "arms has no `base`: the study compares it"),
        ({"audit": Audit(arms=["gone"])}, "audit: arms has no `gone`; it has base, pmp"),
        ({"arms": ARMS | {"x": Arm(settings={"mask.density": 2})}}, "mask.density=2"),
        ({"tunings": [("sweep", {"train.lr": [1e-4]})]}, "the sweep has no seed"),
        ({"tunings": [("sweep", {"seed": []})]}, "a setting of the sweep has no value"),
        ({"tunings": [("tasks", ["lm"])]}, "`lm` needs a store"),
        ({"tunings": [("methods", ["wish"])]}, "wish"),
        ({"tunings": [("settings", {"train.speed": 1})]}, "train.speed"),
    ],
)
def test_mistakes_before_the_first_hour(changed: dict[str, Any], message: str):
    def plan() -> list[Step]:
        if "tunings" in changed:
            return steps(Study(arms=ARMS, tunings=[tuning(**dict(changed["tunings"]))]))
        return steps(Study(**{"arms": ARMS} | changed))

    with pytest.raises(UserError, match=re.escape(message)):
        plan()


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Study, list[Step]]:
    """Two steps that append to files, and a report that does."""
    def program(name: str) -> tuple[str, ...]:
        return ("-c", f"open({str(tmp_path / name)!r}, 'a').write('x')")

    monkeypatch.setattr("pmp_ds.study.plan.report_argv", lambda study: program("report"))
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


def test_launch_sets_the_environment(two: tuple[Study, list[Step]], tmp_path: Path):
    study, _ = two
    code = f"import os; open({str(tmp_path / 'seen')!r}, 'w').write(os.environ['COLOUR'])"
    run(study, [Step("s", ("-c", code), tmp_path / "seen", ranks=True)], "COLOUR=red python")
    assert (tmp_path / "seen").read_text() == "red"
