"""Fixtures that every test may use: pools of ranks, a small model with its tokenizer, the real SmolLM2."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DIST_QFT_CPU_PRECISION"] = "float32"  # the same bits on CPUs with bfloat16 units

from dist_qft.cli import main
from tests.support.merges import GGUF_RUN, write_random_adapters
from tests.support.rank_pool import RankPool
from tests.support.tiny_gguf import save_tiny_gguf
from tests.support.tiny_model import save_tiny_model, tiny_config

# A busy machine is slow, and slowness is no fault of the code under test. The same inputs on each run, so that a change
# is never refused for another one's fault; DIST_QFT_RANDOM=1 looks for new ones.
settings.register_profile(
    "busy",
    deadline=None,
    derandomize=not os.environ.get("DIST_QFT_RANDOM"),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("busy")

# A shell's background job ignores interrupts and one under nohup hangups, and so would the runs that tests stop.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def environment_of_its_own() -> Iterator[None]:
    """Undo what a test leaves in the environment: a run of one process chooses its network interface there."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, RankPool]]:
    """Pools of 1 to 4 ranks; each starts when it is first used."""
    pools = {size: RankPool(size) for size in (1, 2, 3, 4)}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 3 layers with random weights and a trained tokenizer, as a Hugging Face folder."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


def default_smollm2() -> Path:
    """The place of the real model: $DIST_QFT_SMOLLM2, or in the cache folder."""
    default = Path(os.environ.get("DIST_QFT_CACHE", "~/.cache/dist_qft")) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return Path(os.environ.get("DIST_QFT_SMOLLM2", default)).expanduser()


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 3 layers as GGUF: linears Q4_1, embedding and head Q8_0."""
    return save_tiny_gguf(tmp_path_factory.mktemp("tiny-gguf") / "tiny.Q4_1.gguf")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct; `tests/run.sh` fetches it."""
    path = default_smollm2()
    if not path.is_file():
        pytest.skip(f"{path} is not there; tests/run.sh fetches it")
    return path


@pytest.fixture
def shell(monkeypatch, capsys):
    """Run the command in this process: exit code, standard output, standard error."""

    def run_main(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dist-qft", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        output = capsys.readouterr()
        return stop.value.code, output.out, output.err

    return run_main


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
