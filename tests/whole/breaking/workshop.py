"""The objects of the attempts: a small model in two forms, data, a config, and finished runs on them."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_qft.config.load import load_config, save_config
from tests.support.merges import GGUF_RUN
from tests.support.tiny_gguf import save_tiny_gguf
from tests.support.tiny_model import save_tiny_model, tiny_config, write_data
from tests.whole.breaking.children import command, forked

SAMPLES = 20
# One short step whatever else a config says, so that an accepted input is also used.
ONE_STEP = (
    "train.max_steps=1", "train.global_batch_size=2", "train.per_device_train_batch_size=2", "sharding.device=cpu",
)  # fmt: skip


@dataclass(frozen=True)
class Workshop:
    """Places below `folder`; `peak_bytes` is the memory that a good run held."""

    folder: Path
    peak_bytes: int

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def gguf(self) -> Path:
        return self.folder / "tiny.gguf"

    @property
    def data(self) -> Path:
        return self.folder / "data.jsonl"

    @property
    def config(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def run(self) -> Path:
        """A run with three checkpoints, held-out data and a dense merge at its end."""
        return self.folder / "run"

    @property
    def gguf_config(self) -> Path:
        return self.folder / "gguf.yaml"

    def tree(self) -> dict[str, Any]:
        """The config with every key."""
        return load_config(self.config, []).model_dump(mode="json")


def build(folder: Path) -> Workshop:
    """Make all of it. AssertionError if a good run does not end well."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shop = Workshop(folder, 0)
    made = forked(lambda: _make_inputs(shop), cpu_seconds=120)
    assert made.code == 0, made.output
    trained = command("train", shop.config, cpu_seconds=120)
    assert trained.code == 0, trained.output
    quantized = command("train", shop.gguf_config, *ONE_STEP, "output_dir=" + str(folder / "gguf-run"), cpu_seconds=120)
    assert quantized.code == 0, quantized.output
    return Workshop(folder, max(trained.peak_bytes, quantized.peak_bytes))


def _make_inputs(shop: Workshop) -> None:
    save_tiny_model(shop.model)
    (shop.model / "generation_config.json").write_text('{"eos_token_id": [2]}')
    save_tiny_gguf(shop.gguf)
    write_data(shop.data, SAMPLES)
    sections = {
        "data": {"eval_samples": 4, "train": {"path": str(shop.data)}, "cache_dir": None},
        "checkpoint": {"save_steps": 2, "save_total_limit": 3},
        "merge": {"at_end": "dense"},
        "train": {"max_steps": 6, "global_batch_size": 4},
        "sharding": {"engine": "replicated"},
    }
    save_config(tiny_config(shop.model, shop.run, **sections), shop.config)
    plain = {"data": sections["data"], "sharding": sections["sharding"]}
    save_config(tiny_config(shop.gguf, shop.folder / "gguf-run", **plain, **GGUF_RUN), shop.gguf_config)
