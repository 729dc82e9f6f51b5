"""`init.weights`: theta(0) from a folder, by slices, at every stage; a run from it, up to the
release and its audit; a run whose folder was moved, changed or lost."""

import contextlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pmp_ds import dist
from pmp_ds.config import MaskConfig, TrainConfig
from pmp_ds.config.precision import PRECISIONS
from pmp_ds.discover.discover import random_ticket
from pmp_ds.engine.engine import Engine
from pmp_ds.model.base import open_base
from pmp_ds.model.folder import read_config
from pmp_ds.model.initial import Initial
from pmp_ds.model.keys import Secret
from pmp_ds.run_dir import RunDir
from pmp_ds.state.weight_files import read_weights
from pmp_ds.summary import summarize
from pmp_ds.ticket.ticket import load_ticket
from tests.helpers import families, tiny
from tests.helpers.bases import write_base
from tests.helpers.commands import call, error_of, files_of, ok
from tests.helpers.faults import seen
from tests.helpers.lives import Life, act, checkpoints, live, raise_signal, same_end
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

Tensors = dict[str, torch.Tensor]
Start = Callable[..., Life]
MODELS = {"llama": tiny.LLAMA, "gpt2, tied": tiny.GPT2}
GLOBAL = 8
DISCOVER = (
    *("--mask.source", "earlybird", "--mask.iou_threshold", "1.0"),
    *("--mask.max_steps", "3", "--mask.on_unstable", "last"),
)


def engine_of(folder: str, stage: int, precision: str) -> dict[str, Any]:
    """Three masked updates of an engine that starts from ``folder``."""
    config = read_config(Path(folder))
    theta0 = Initial(config, Secret(b"k" * 32), open_base(Path(folder), config))
    elements = 0

    def fill(name: str, start: int, count: int) -> torch.Tensor:
        nonlocal elements
        elements += count
        return theta0.read(name, start, count)

    train = TrainConfig(precision=precision, global_batch_size=GLOBAL, micro_batch_size=4)
    engine = Engine(theta0.model(), train, tiny.ds_json(stage), fill=fill)
    first = dict(engine.parameters())
    ticket = random_ticket(b"m" * 32, MaskConfig(source="random"), theta0.table)
    engine.arm(ticket.mask)
    for step in (1, 2, 3):
        engine.backward(tiny.batch(step, GLOBAL).chunk(dist.world_size())[dist.rank()])
        engine.step(1e-2)
    last = dict(engine.parameters())
    engine.close()
    masks = {name: ticket.mask.full(name) for name in ticket.mask.shapes}
    return {"first": first, "last": last, "masks": masks, "elements": elements}


@pytest.mark.parametrize(
    ("stage", "precision", "model"),
    daily(
        product(range(4), ["fp32", "bf16"], MODELS),
        [(0, "bf16", "llama"), (2, "bf16", "gpt2, tied"), (3, "bf16", "llama")],
    ),
)
def test_it_starts_with_the_bits_of_the_folder(ranks2, work, tmp_path, stage, precision, model):
    given = write_base(tmp_path / "base", work / "store", MODELS[model], dtype=torch.float32)
    found = ranks2.run(engine_of, str(tmp_path / "base"), stage, precision)
    dtype = PRECISIONS[precision].dtype
    total = sum(tensor.numel() for tensor in given.values())
    for rank in found:
        assert rank["elements"] <= (total if stage < 3 else total // 2 + len(given))
    first, last, masks = (found[0][what] for what in ("first", "last", "masks"))
    moved = {name: first[name] != last[name] for name in given}
    for name, tensor in given.items():
        assert first[name].dtype == dtype
        assert torch.equal(first[name], tensor.to(dtype)), name
        assert not (moved[name] & ~masks[name]).any(), name
    assert sum(int(moved[n].sum()) for n in given) > sum(int(masks[n].sum()) for n in given) // 2


@pytest.fixture
def base(work: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "given"
    write_base(folder, work / "store")
    shutil.copytree(work / "store" / "tokenizer", folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def start(lives, base: Path) -> Start:
    """Return a function that starts the run from the folder, and its first rank."""

    def begin(*flags: str, weights: Path | str = base, **fault: Any) -> Life:
        settings = ("--init.seed", "null", "--init.weights", str(weights))
        life: Life = lives(*settings, *flags, **fault)[0]
        return life

    return begin


def complement_is(run: RunDir, folder: Path, step: int = 12) -> bool:
    """Whether the weights outside the ticket are the folder's, to the bit; those in it moved."""
    before = {
        n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()
    }
    after = read_weights(run.checkpoints / f"update-{step:08d}" / "weights")
    mask = load_ticket(run.ticket).mask
    kept = {name: mask.full(name) for name in mask.shapes}
    assert before.keys() == kept.keys()
    moved = {name: after(name) != before[name].to(after(name).dtype) for name in kept}
    assert sum(int((moved[n] & kept[n]).sum()) for n in kept) > mask.num_kept // 2
    return not any((moved[name] & ~kept[name]).any() for name in kept)


@pytest.mark.parametrize("stage", daily(range(4), [3]))
def test_discovery_rewind_and_masked_training(start, run, base, stage):
    one = start(*DISCOVER, stage=stage)
    assert one.code == 0, one.err
    assert "secrecy    theta(0) from init.weights: whoever else has these weights" in one.out
    assert complement_is(run, base)
    assert json.loads((run.init / "theta0.json").read_text())["source"] == "given"
    assert "complement  0 of " in summarize(run, "ka")


def test_only_a_private_base_lets_a_release_leave(start, run, base, work, tmp_path):
    """The release names no base, and its difference from the base is the mask."""
    assert start().code == 0
    export = ("export.py", "--run", run.root)
    refused = error_of(call(*export, cwd=work))
    assert "whoever has them computes the mask" in refused
    assert "--base-is-private" in refused
    assert not run.release.exists()
    settings = run.config.read_text()
    run.config.write_text(settings.replace(f"weights: {base}", "weights: null"))
    assert run.config.read_text() != settings
    assert "--base-is-private" in error_of(call(*export, cwd=work))  # by its theta0.json
    path = run.init / "theta0.json"
    written = path.read_text()
    path.write_text(written.replace('"given"', '"drawn"'))
    assert "was altered" in error_of(call(*export, cwd=work))
    path.write_text(written)
    run.config.write_text(settings)
    with families.in_this_process():
        ok(call(*export, "--private", "--out", tmp_path / "kept", cwd=work))
        ok(call(*export, "--base-is-private", cwd=work))
    assert len(run.ledger.read_text().splitlines()) == 1
    for path in run.release.iterdir():
        content = path.read_bytes()
        assert not any(word in content for word in (b"given", b"init.weights", base.name.encode()))
    assert "keep their initial values" in (run.release / "README.md").read_text().replace("\n", " ")

    audit = ("audit.py", "--release", run.release, "--ticket", run.ticket, "--seeds", "0:2")
    done = call(*audit, "--base", base, "--out", tmp_path / "known", cwd=work)
    assert done.returncode == 1
    assert "leak that can be prevented: difference with a known base" in done.stderr
    found = attacks(tmp_path / "known")["difference with a known base"]
    assert (found["verdict"], found["auc"] > 0.99, found["iou"] > 0.98) == ("leak", True, True)
    ok(call(*audit, "--out", tmp_path / "unknown", cwd=work))
    rows = attacks(tmp_path / "unknown")
    assert rows["difference with a known base"]["note"] == "needs --base"
    assert rows["seed replay"]["verdict"] == "chance"


def attacks(folder: Path) -> dict[str, Any]:
    rows = json.loads((folder / "audit.json").read_text())["attacks"]
    return {row["attack"]: row for row in rows}


@pytest.fixture
def derived(work: Path, tmp_path: Path) -> Path:
    """Return a place like ``work`` whose recipe leaves the model to the folder's config.json."""
    place = tmp_path / "derived"
    shutil.copytree(work, place, ignore=shutil.ignore_patterns("calm"))
    text = (place / "tiny.yaml").read_text()
    first, last = text.index("model:"), text.index("data:")
    (place / "tiny.yaml").write_text(text[:first] + "model: {family: auto}\n" + text[last:])
    return place


def test_it_resumes_without_the_folder(ranks2, derived, base, tmp_path):
    """To the bits of a run that kept it. Only the count at the end waits for its return."""
    settings = ["--init.weights", str(base), "--run.root"]
    calm, run = RunDir(tmp_path / "calm/main"), RunDir(tmp_path / "runs/main")

    def go(root: RunDir, *more: str, given: str | None = None, **fault: Any) -> Life:
        flags = [*settings, str(root.root.parent), *more]
        if given is not None:
            flags[1] = given
        arguments = (fault.get("fault"), fault.get("what", ()), 3)
        life: Life = ranks2.run(live, str(derived), flags, *arguments)[0]
        return life

    assert go(calm).code == 0
    run.create()
    shutil.copy(calm.init / "key", run.init / "key")
    stopped = go(run, fault=act, what=(6, 1, raise_signal, signal.SIGTERM))
    assert (stopped.code, checkpoints(run)) == (75, [4, 7])
    moved = base.rename(tmp_path / "elsewhere")
    one = go(run, "--train.micro_batch_size", "auto")  # its trials need no initial weights
    assert "micro-batch 4: states" in one.out
    assert "does not exist: the run resumes from a checkpoint alone" in one.out
    assert "resuming after update 7 of 12" in one.out
    seen("base gone at the end", one.code, one.err)
    assert "all 12 updates are saved" in one.err
    assert "does not exist: not counted" in summarize(run, "ka")
    assert "does not exist" in error_of(
        call("export.py", "--run", run.root, "--checkpoint", "init", "--out", "t", cwd=tmp_path)
    )
    last = go(run, given=str(moved))
    assert (last.code, "already finished" in last.out) == (0, True)
    assert str(moved) in run.config.read_text()
    same_end(calm, run)
    assert complement_is(run, moved)


def test_a_folder_that_is_needed_again(start, run, base, tmp_path):
    """Before the first checkpoint of masked training, and whenever it changed; nothing is written
    by a refused start."""
    stop = {"fault": act, "given": (3, 0, raise_signal, signal.SIGTERM)}
    assert start(*DISCOVER, "--mask.max_steps", "9", **stop).code == 75  # in discovery
    before, moved = files_of(run.root), base.rename(tmp_path / "elsewhere")
    one = start(*DISCOVER, "--mask.max_steps", "9")
    seen("base gone", one.code, one.err)
    assert files_of(run.root) == before
    assert start(*DISCOVER, "--mask.max_steps", "9", weights=moved).code == 0
    before, file = files_of(run.root), sorted(moved.glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # the sign or the exponent of one weight
    file.write_bytes(content)
    one = start(*DISCOVER, "--mask.max_steps", "9", weights=moved)
    seen("base changed", one.code, one.err)
    assert files_of(run.root) == before
    assert "init.weights: " in start(*DISCOVER, "--mask.max_steps", "9", weights="null").err


@contextlib.contextmanager
def in_own_folder(root: str) -> Iterator[None]:
    """Give each rank a working folder of its own, as if it were on a host of its own."""
    with contextlib.chdir(Path(root) / str(dist.rank())):
        yield


def test_a_host_that_lacks_the_folder_is_named(start, run, base, tmp_path):
    for rank in ("0", "1"):
        shutil.copytree(base, tmp_path / rank / "copy")
    hosts = {"fault": in_own_folder, "given": (str(tmp_path),)}
    assert start(weights="copy", **hosts).code == 0
    shutil.rmtree(tmp_path / "1" / "copy")
    one = start(weights="copy", **hosts)
    assert one.code == 1
    assert one.err.startswith("error: rank 1 ")
    assert "init.weights=copy does not exist, and other ranks have it" in one.err
