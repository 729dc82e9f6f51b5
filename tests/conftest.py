"""Ranks that the whole session shares; each pool starts when a test first runs something on it."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.helpers.distributed import RankPool

# No test is a matter of time: a busy machine may take a second for what usually takes 1 ms.
settings.register_profile("untimed", deadline=None)
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
