"""The meaning of `--sweep`."""

import pytest

from pmp_ds.errors import UserError
from pmp_ds.finetune.sweep import cells, grid

LR = {"train.lr": ["1e-5", "1e-4"]}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["train.lr=1e-5,1e-4"], LR),
        (["lr=1e-5, 1e-4"], LR),
        (["lr=1e-5,1e-4,epochs=1,3,seed=0"], LR | {"train.epochs": ["1", "3"], "seed": ["0"]}),
        (["lr=1e-5,1e-4; seed=0"], LR | {"seed": ["0"]}),
        (["method=full,lora", "lora.rank=4"], {"method": ["full", "lora"], "lora.rank": ["4"]}),
        (["nonsense=1"], {"nonsense": ["1"]}),
    ],
)
def test_grid(given: list[str], expected: dict[str, list[str]]):
    assert grid(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["lr"], "write SETTING=A,B"),
        (["lr=1e-5,"], "write SETTING=A,B"),
        (["lr=1e-5,1e-5"], "a setting or a value twice"),
        (["lr=1e-5", "train.lr=1e-4"], "a setting or a value twice"),
        (["run.name=a,b"], "it does not affect training"),
        (["val_every=1,2"], "it does not affect training"),
    ],
)
def test_mistakes(given: list[str], message: str):
    with pytest.raises(UserError, match=message):
        grid(given)


def test_cells_have_short_names_and_full_flags():
    found = cells(grid(["lr=1e-5,1e-4,seed=0,1"]))
    assert list(found) == ["lr=1e-5,seed=0", "lr=1e-5,seed=1", "lr=1e-4,seed=0", "lr=1e-4,seed=1"]
    assert found["lr=1e-4,seed=1"] == ["--train.lr", "1e-4", "--seed", "1"]


def test_cells_with_the_same_name_are_refused():
    found = cells(grid(["model=runs/a/release,runs/b"]))
    assert list(found) == ["model=runs_a_release", "model=runs_b"]
    with pytest.raises(UserError, match="runs/a_b/c and model=runs/a/b_c would both be the cell"):
        cells(grid(["model=runs/a_b/c,runs/a/b_c"]))
