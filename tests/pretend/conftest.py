"""Ranks on the pretend device, kept for the session."""

from collections.abc import Iterator

import pytest

from tests.helpers.distributed import RankPool
from tests.pretend.job import pool


@pytest.fixture(scope="session")
def pretend1() -> Iterator[RankPool]:
    with _pool(1) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def pretend2() -> Iterator[RankPool]:
    with _pool(2) as ranks:
        yield ranks


def _pool(ranks: int) -> RankPool:
    from tests.pretend.device.build import Unavailable

    try:
        return pool(ranks)
    except Unavailable as error:
        pytest.skip(str(error))
