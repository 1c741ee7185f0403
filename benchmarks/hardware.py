"""Bytes per rank and bytes moved, for models that do not fit here, as the Markdown table of `docs/scaling.md`.

    PYTHONPATH=. python benchmarks/hardware.py

A plan reads headers and no weights. So the weight files of these shapes are sparse: a header, and a length of which no
byte is written.
"""

import json
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from dist_qft.config.schema import RunConfig
from dist_qft.plan import make_plan
from tests.support.tiny_model import tiny_tokenizer

_LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SHAPES: dict[str, PretrainedConfig] = {
    "8B (Llama 3.1)": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **_LLAMA
    ),
    "32B (Qwen3)": Qwen3Config(
        vocab_size=151936,
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
    ),
    "70B (Llama 3.1)": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **_LLAMA
    ),
}
NF4 = {"linear": "nf4", "block": [64], "double_quant": True, "embedding": "q8_0"}
METHODS: dict[str, dict[str, Any]] = {
    "qlora, r = 16": {"method": {"name": "qlora", "rank": 16, "alpha": 16}, "quantization": NF4},
    "qahira, 8 x 32": {
        "method": {"name": "qahira", "pool": 32, "repeat": 8, "alpha": 16, "rank": 64},
        "quantization": {"linear": "affine4", "block": [1, 32], "embedding": "q8_0"},
    },
    "qst": {"method": {"name": "qst"}, "quantization": NF4},
}
GPUS = [(1, 1), (2, 1), (8, 1), (16, 2)]  # ranks, nodes


def save_sparse(folder: Path, config: PretrainedConfig) -> Path:
    """A folder in Hugging Face's format whose weights are a hole."""
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    entries, end = {}, 0
    for name, tensor in tensors.items():
        size = 2 * prod(tensor.shape)
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def main() -> None:
    columns = ["model", "method", "GPUs", "base", "trained", "gathered", "reduced, MiB"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    with tempfile.TemporaryDirectory() as scratch:
        for index, (model, config) in enumerate(SHAPES.items()):
            folder = save_sparse(Path(scratch) / str(index), config)
            for method, sections in METHODS.items():
                for ranks, nodes in GPUS:
                    print(row(model, method, folder, sections, ranks, nodes), flush=True)


def row(model: str, method: str, folder: Path, sections: dict[str, Any], ranks: int, nodes: int) -> str:
    """One line of the table: a plan on `ranks` GPUs of `nodes` nodes, one row per GPU and micro-batch."""
    run = RunConfig.model_validate(
        {
            "output_dir": "unused",
            "model": {"path": str(folder)},
            "data": {"train": {"path": "stdlib-docs"}},
            "train": {
                "max_steps": 1,
                "global_batch_size": ranks,
                "per_device_train_batch_size": 1,
                "precision": "bfloat16",
            },
            **sections,
        }
    )
    plan = make_plan(run, ranks, ranks // nodes)
    trained = plan["optimizer_bytes"] + 2 * plan["reduce_bytes_per_step"]
    figures = [
        f"{plan['base_bytes_per_rank'] / 2**30:.1f}",
        f"{trained / 2**30:.2f}",
        f"{plan['gather_bytes_per_micro_batch'] / 2**30:.1f}",
        f"{plan['reduce_bytes_per_step'] / 2**20 if ranks > 1 else 0:.0f}",
    ]
    return f"| {model} | {method} | {' | '.join([str(ranks), *figures])} |"


if __name__ == "__main__":
    main()
