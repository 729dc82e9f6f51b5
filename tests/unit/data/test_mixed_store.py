"""Values of `data.store`, and that a mixture does not depend on the place of its parts."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from pmp_ds.data.arrow_store import Store
from pmp_ds.data.blocks import Blocks
from pmp_ds.data.loader import order_key
from pmp_ds.data.mixed_store import MixedStore, open_data
from pmp_ds.data.mixture import InTurn
from pmp_ds.errors import UserError
from pmp_ds.state.run_record import DataFacts
from tests.helpers.stores import write_store

KEY = order_key("train", 0)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stores")
    write_store(root / "web", 0, 300, validation=20)
    write_store(root / "code", 1000, 50, validation=20, unigram_cross_entropy=2.0)
    return root


def mixed(root: Path, **weights: float) -> MixedStore:
    store = open_data({str(root / name): weight for name, weight in weights.items()})
    assert isinstance(store, MixedStore)
    return store


def ids(store: MixedStore, count: int) -> list[int]:
    return store.split("train").read(np.arange(count), KEY)[:, 0].tolist()


def test_one_folder_is_the_store_itself(root):
    assert isinstance(open_data(str(root / "web")), Store)


def test_shares_and_facts(root):
    store = mixed(root, web=3, code=1)
    found = ids(store, 4000)
    assert np.mean(np.array(found) < 300) == pytest.approx(0.75, abs=0.03)
    assert {Path(part.folder).name: part.share for part in store.parts} == {
        "web": 0.75,
        "code": 0.25,
    }
    assert store.unigram_cross_entropy == pytest.approx(0.75 * 6 + 0.25 * 2)
    facts = DataFacts.of(store)
    assert facts.tokens == (300 + 50 + 20 + 20) * 4
    assert sorted(facts.sources) == ["code", "web"]
    assert facts.parts == store.parts
    assert store.verify() == sum(part.verify() for part in store.stores)


def test_places_and_spelling_do_not_matter(root, tmp_path):
    store = mixed(root, web=0.75, code=0.25)
    moved = tmp_path / "elsewhere"
    shutil.copytree(root / "web", moved)
    other = MixedStore({str(root / "code"): 1, str(moved): 3})
    assert other.dataset_id == store.dataset_id
    assert ids(other, 500) == ids(store, 500)


def test_id_follows_parts_and_weights(root, tmp_path):
    write_store(tmp_path / "more", 5000, 9)
    stores = [mixed(root, web=3, code=1), mixed(root, web=1, code=3), mixed(root, web=1)]
    stores.append(MixedStore({str(root / "web"): 3, str(tmp_path / "more"): 1}))
    single = open_data(str(root / "web"))
    assert len({store.dataset_id for store in [*stores, single]}) == 5


def test_validation_has_the_proportions_in_every_prefix(root):
    store = mixed(root, web=3, code=1)
    blocks = store.split("validation")
    found = blocks.gather(np.arange(len(blocks)))[:, 0]
    web = [i for i in found if i < 1000]
    code = [i for i in found if i >= 1000]
    assert web == list(range(300, 320))  # all of it, in order: it ends first
    assert code == list(range(1050, 1050 + len(code)))
    for end in range(1, len(found)):
        assert abs(np.sum(found[:end] < 1000) - 0.75 * end) <= 1
    assert blocks.gather(np.array([5, 0]))[:, 0].tolist() == [found[5], found[0]]
    assert blocks.block_size == 4


def test_in_turn_by_hand():
    views = [np.arange(n * 2, dtype=np.uint16).reshape(n, 2) + 100 * n for n in (4, 3)]
    blocks = InTurn([Blocks([view]) for view in views], [3, 1])
    # times 1/6, 3/6, 5/6, 7/6 and 1/2, (3/2: behind the end, 4/3)
    assert blocks.gather(np.arange(len(blocks)))[:, 0].tolist() == [400, 402, 300, 404, 406]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"block_size": 4, "eos_id": 3}, "eos_id is 2 and 3|eos_id is 3 and 2"),
        ({"vocab_size": 90_000}, "vocab_size is (10|9)0000 and (10|9)0000"),
        ({"tokenizer": {"fingerprint": "e" * 64}}, "the tokenizer is [ef]{12} and [ef]{12}"),
    ],
)
def test_stores_that_do_not_go_together(root, tmp_path, manifest, message):
    other = write_store(tmp_path / "other", 0, 9, **manifest)
    with pytest.raises(UserError, match=f"cannot be mixed: ({message});") as error:
        open_data({str(root / "web"): 1, other: 1})
    assert other in str(error.value)
    assert str(root / "web") in str(error.value)


def test_the_same_data_twice(root, tmp_path):
    shutil.copytree(root / "web", tmp_path / "copy")
    with pytest.raises(UserError, match="contain the same blocks; name one of them"):
        open_data({str(root / "web"): 1, str(tmp_path / "copy"): 2})


def test_part_that_is_not_there(root):
    with pytest.raises(UserError, match="the data folder nowhere does not exist"):
        open_data({str(root / "web"): 1, "nowhere": 2})


def test_weight_too_small(root):
    with pytest.raises(UserError, match=r"the weight of .*code, 1e-09, is below 1/65536"):
        mixed(root, web=1, code=1e-9)
