"""Memory, traffic and time of large models on many GPUs, as the Markdown table of `docs/scaling.md`.

    PYTHONPATH=. python benchmarks/hardware.py

Nothing is loaded: a plan needs a model's config.json. H100s in nodes of 8, `sharding.group: auto`, rows of 2,048
tokens, one per micro-batch, gradient checkpointing, 128 rows a step.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.schema import RunConfig
from dist_qft.plan import make_plan, planned_base
from dist_qft.training.machine import find_machine
from dist_qft.training.run_plan import RunPlan

_LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN = {"vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960}
SHAPES: dict[str, PretrainedConfig] = {
    "8B (Llama 3.1)": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **_LLAMA
    ),
    "30B-A3B (Qwen3)": Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        **_QWEN,
    ),
    "32B (Qwen3)": Qwen3Config(
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        **_QWEN,
    ),
    "70B (Llama 3.1)": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **_LLAMA
    ),
    "405B (Llama 3.1)": LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128, **_LLAMA
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
GPUS = (1, 2, 8, 16, 128)
GPUS_PER_NODE = 8
FAST = find_machine("H100")
SLOW = replace(FAST, name="H100, 100 Gb/s", between_gb_per_s=12.5)


def main() -> None:
    columns = [
        "model",
        "method",
        "GPUs",
        "`group`",
        "GiB per GPU",
        "fits",
        "GB between nodes",
        "s, 3.2 Tb/s",
        "s, 100 Gb/s",
    ]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    with tempfile.TemporaryDirectory() as scratch:
        for index, (model, config) in enumerate(SHAPES.items()):
            folder = Path(scratch) / str(index)
            config.save_pretrained(folder)
            bases: dict[str, BaseModel] = {}
            for method, sections in METHODS.items():
                linear = sections["quantization"]["linear"]
                for ranks in GPUS:
                    run = config_of(folder, sections)
                    bases[linear] = bases.get(linear) or planned_base(run)
                    print(row(model, method, ranks, planned(run, bases[linear], ranks)), flush=True)


def config_of(folder: Path, sections: dict[str, Any]) -> RunConfig:
    """The run whose plan is a line of the table."""
    return RunConfig.model_validate(
        {
            "output_dir": "unused",
            "model": {"path": str(folder)},
            "data": {"train": {"path": "stdlib-docs"}, "max_length": 2048},
            "sharding": {"device": "cuda", "group": "auto"},
            "train": {
                "max_steps": 1,
                "global_batch_size": 128,
                "per_device_train_batch_size": 1,
                "gradient_checkpointing": sections["method"]["name"] != "qst",
            },
            **sections,
        }
    )


def planned(run: RunConfig, base: BaseModel, ranks: int) -> list[RunPlan]:
    """The plans of one run with the fast and the slow link between nodes."""
    machines = [FAST, SLOW] if ranks > GPUS_PER_NODE else [FAST]
    place = (ranks, min(ranks, GPUS_PER_NODE))
    return [make_plan(run, *place, memory=each.memory, machine=each, base=base) for each in machines]


def row(model: str, method: str, ranks: int, plans: list[RunPlan]) -> str:
    """One line of the table."""
    plan, link = plans[0], plans[0].between_nodes
    across = (link["gather_bytes_per_step"] + link["reduce_bytes_per_step"]) / 1e9
    seconds = [each.seconds_per_step for each in plans]
    figures = [
        str(ranks),
        str(plan.shard_group),
        f"{plan.peak_bytes / 2**30:.1f}",
        "yes" if plan.fits else "no",
        f"{across:.1f}" if plan.nodes > 1 else "",
        *(f"{each['step']:.1f}" for each in seconds if each is not None),
    ]
    return f"| {model} | {method} | {' | '.join(figures)} |{' |' if len(plans) == 1 else ''}"


if __name__ == "__main__":
    main()
