"""Ranks shared by the whole session; each pool starts when a test first uses it."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.helpers.distributed import RankPool
from tests.helpers.examples import examples
from tests.helpers.tiers import (  # noqa: F401  (hooks)
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_xdist_make_scheduler,
)

settings.register_profile("untimed", examples())
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks3() -> Iterator[RankPool]:
    with RankPool(3) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks4() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks1() -> Iterator[RankPool]:
    with RankPool(1) as pool:
        yield pool
