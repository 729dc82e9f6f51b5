"""The release does not depend on how the run was sharded."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pmp_ds.config import MaskConfig
from pmp_ds.discover.discover import random_ticket
from pmp_ds.engine.engine import Engine
from pmp_ds.model.parameters import parameter_table
from pmp_ds.release.export import export
from pmp_ds.run_dir import RunDir
from pmp_ds.state import checkpoint, shelf, weight_files
from tests.distributed.test_checkpoint import TRAIN, segment
from tests.helpers import tiny
from tests.unit.release.conftest import CARD, tokenizer_dir  # noqa: F401  (a fixture)

pytestmark = pytest.mark.distributed


def resume_and_save(root: str, other: str) -> int:
    """Load the newest checkpoint of ``root`` at this world size, in ZeRO 1 with plain masters,
    and save it into ``other`` without a step in between."""
    found = shelf.find(RunDir(Path(root)))
    assert found is not None
    folder, position = found
    mask = random_ticket(b"m" * 32, MaskConfig(), parameter_table(tiny.model())).mask
    model, run = tiny.model(), RunDir(Path(other))
    run.create()
    weight_files.load_weights(folder / "weights", model)
    engine = Engine(model, replace(TRAIN, precision="bf16"), tiny.ds_json(1))
    engine.arm(mask)
    checkpoint.load_state(folder, engine, position)
    checkpoint.save(run, engine, position)
    engine.close()
    return position.step


def test_the_same_bytes_after_an_elastic_resume(
    ranks2,
    ranks1,
    tmp_path,
    tokenizer_dir,  # noqa: F811
    monkeypatch,
):
    roots = [str(tmp_path / "two"), str(tmp_path / "one")]
    ranks2.run(segment, roots[0], 3, "bf16", "compact", False, 3, [3])
    assert ranks1.run(resume_and_save, *roots) == [3]
    monkeypatch.setattr("pmp_ds.release.export.verify_reload", lambda *_: 0.0)
    outs = []
    for root in roots:
        folder, _ = shelf.find(RunDir(Path(root)), part="weights/") or pytest.fail("none")
        outs.append(Path(root) / "release")
        export(folder / "weights", outs[-1], tokenizer_dir=tokenizer_dir, card=CARD)
    contents = [{path.name: path.read_bytes() for path in out.iterdir()} for out in outs]
    assert "model.safetensors" in contents[0]
    assert contents[0] == contents[1]
    trained = weight_files.read_weights(folder / "weights")
    initial = dict(tiny.model().named_parameters())
    assert any(not torch.equal(trained(name), initial[name].bfloat16()) for name in initial)
