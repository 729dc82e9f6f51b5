"""The commands of a recipe, and its mistakes."""

import importlib.util
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pmp_ds.cli import parse
from pmp_ds.errors import UserError
from pmp_ds.study.plan import Step, describe, report_argv, steps
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
    assert len({step.name for step in planned}) == len(planned) == 54
    text = describe(study, planned)
    assert "  to do finetune-0-base-sst2                    48 cells" in text
    assert text.splitlines()[-1] == (
        "54 steps, 54 to do; 9 models, 870 fine-tunings; then the report, s/report/"
    )
    kinds = [step.name.partition("-")[0] for step in planned]
    assert list(dict.fromkeys(kinds)) == [
        "prepare",
        "pretrain",
        "export",
        "finetune",
        "evaluate",
        "audit",
    ]


def test_commands(small: tuple[Study, list[Step]]):
    commands = {step.name: shlex.join(step.argv) for step in small[1]}
    for name, rest in {
        "export-pmp": "export --run s/runs/pmp",
        "pretrain-pmp-0.5": "pretrain --config demo --mask.density 0.5 "
        "--run.root s/runs --run.name pmp-0.5",
        "finetune-1-pmp-sst2": "finetune --model s/runs/pmp/release --task sst2 --arm pmp "
        "--results s/results.jsonl --run.root s/finetune --run.name 1-pmp-sst2 --ticket "
        "s/runs/pmp/private/ticket --density 0.7 --data.max_train 4000 --sweep "
        "method=ticket,random,complement --sweep train.lr=1e-05,0.0001,0.001,0.003 --sweep "
        "train.epochs=1,3 --sweep seed=0,1,2",
        "evaluate-1-pmp": "evaluate landscape gradients --model s/runs/pmp/release --arm pmp "
        "--results s/results.jsonl --ticket s/runs/pmp/private/ticket --store tokenized_data/demo",
        "audit-pmp": "audit --release s/runs/pmp/release --ticket s/runs/pmp/private/ticket "
        "--config s/runs/pmp/config.yaml --out s/audit/pmp --text tokenized_data/demo --shadow "
        "s/runs/pmp-2",
    }.items():
        assert commands[name] == f"-m pmp_ds.commands.{rest}"
    assert "--ticket s/runs/pmp-2/private/ticket" in commands["finetune-4-pmp-sst2"]
    assert "--scratch true" in commands["finetune-2-base-sst2"]
    assert shlex.join(report_argv(small[0])).endswith("--audit s/audit/pmp/audit.json")


def test_a_study_needs_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From an empty folder; each command is a module, which an installed wheel has too."""
    monkeypatch.chdir(tmp_path)
    study, _ = parse(Study, ["--config", "study-small"])
    for argv in (*(step.argv for step in steps(study)), report_argv(study)):
        assert argv[0] == "-m"
        assert importlib.util.find_spec(argv[1]) is not None
        assert [word for word in argv if "launcher" in word or str(REPO) in word] == []


def test_attackers_of_base_and_pmp_have_the_same_tries(small: tuple[Study, list[Step]]):
    grids = {
        step.name: [
            word for flag, word in zip(step.argv, step.argv[1:], strict=False) if flag == "--sweep"
        ]
        for step in small[1]
        if step.name.startswith("finetune-0")
    }
    assert grids["finetune-0-base-sst2"] == grids["finetune-0-pmp-sst2"]


def tuning(**changed: object) -> Tuning:
    fields = {"arms": ["pmp"], "tasks": ["rte"], "methods": ["full"], "sweep": {"seed": [0]}}
    return Tuning(**fields | changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arms": {"pmp": Arm()}}, "arms has no `base`: the study compares it"),
        ({"arms": ARMS | {"x": Arm(seed_of="gone")}}, "x has seed_of=gone: name an arm"),
        ({"arms": ARMS | {"x": Arm(seed_of="pmp"), "y": Arm(seed_of="x")}}, "y has seed_of=x"),
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


def test_pretraining_seeds_share_their_arms_name():
    study = Study(
        arms=ARMS | {"pmp-2": Arm(settings={"data.seed": 1}, seed_of="pmp")},
        tunings=[tuning(arms=["pmp", "pmp-2"])],
    )
    tunings = [shlex.join(step.argv) for step in steps(study) if step.independent]
    for name, argv in zip(("pmp", "pmp-2"), tunings, strict=True):
        assert f"--model study/runs/{name}/release" in argv
        assert "--arm pmp " in argv
    assert "pmp=study/runs/pmp pmp=study/runs/pmp-2" in shlex.join(report_argv(study))
