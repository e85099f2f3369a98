"""Rank processes and saved tiny models, made once per test session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.rank_pool import RankPool
from tests.support.tiny_models import tiny_model

DEMO_MODEL = Path(__file__).resolve().parents[2] / "examples" / "demo-moe"


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[[int], RankPool]]:
    """A pool of so many ranks, started when first asked for."""
    pools: dict[int, RankPool] = {}

    def get(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Directory of a tiny model of a family, or of the bundled demo model (``demo``)."""
    folders: dict[str, str] = {"demo": str(DEMO_MODEL)}

    def get(family: str) -> str:
        if family not in folders:
            folder = tmp_path_factory.mktemp(family)
            tiny_model(family).save_pretrained(folder)
            folders[family] = str(folder)
        return folders[family]

    return get
