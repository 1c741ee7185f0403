"""Small trained-looking runs to merge: a GGUF base and a Hugging Face one, with random adapters."""

from collections.abc import Callable
from pathlib import Path

import pytest
from merges import GGUF_RUN, write_random_adapters
from ranks import RankPool
from tiny_model import tiny_config


@pytest.fixture(scope="session")
def make_run(pools: dict[int, RankPool], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_run(model, **sections)`: the folder of a run whose only checkpoint holds random adapters."""

    def make(model: Path, size: float = 0.05, **sections: dict) -> Path:
        folder = tmp_path_factory.mktemp("merge") / "run"
        pools[1].run(write_random_adapters, config=tiny_config(model, folder, **sections), size=size)
        return folder

    return make


@pytest.fixture(scope="session")
def gguf_run(make_run: Callable[..., Path], tiny_gguf: Path) -> Path:
    return make_run(tiny_gguf, **GGUF_RUN)
