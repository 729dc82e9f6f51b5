"""theta(0) as ``export --checkpoint init`` reads it: in the dtype that training starts from."""

from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from pmp_ds import formats
from pmp_ds.config import Config, InitConfig, RunConfig, TrainConfig
from pmp_ds.config.precision import PRECISIONS
from pmp_ds.release.source import open_source
from pmp_ds.run_dir import RunDir, write_json
from pmp_ds.state import plain_weights, run_record, theta0
from tests.helpers import tiny

DATA = run_record.DataFacts(
    dataset_id="d",
    vocab_size=tiny.VOCAB,
    eos_id=2,
    block_size=tiny.BLOCK,
    unigram_cross_entropy=1.0,
    documents=1,
    tokens=1,
    sources=(),
)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_init_is_in_the_precision_of_the_run(tmp_path, precision):
    config = Config(
        run=RunConfig(root=str(tmp_path), name="run"),
        init=InitConfig(seed=3),
        model=tiny.LLAMA,
        train=TrainConfig(precision=precision),
    )
    run = RunDir(tmp_path / "run")
    run_record.record_start(run, config)
    write_json(run.data, asdict(DATA) | {"format_version": formats.current("data")})
    theta0.remember(run, theta0.check_together(run, theta0.initial_of(run, 3)), 3)
    model = tiny.at_theta0(run)
    weights = plain_weights.of_init(run, tmp_path / "weights")
    dtype = PRECISIONS[precision].dtype
    assert open_source(weights.folder).dtype == dtype
    stored = load_file(weights.folder / "model.safetensors")
    for name, param in model.named_parameters():
        assert torch.equal(stored[name], param.detach().to(dtype)), name
