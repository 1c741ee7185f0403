"""Small mixtures of experts as GGUF files, as llama.cpp's converter writes them: one stack for each product.

Before there were stacks it wrote one tensor for each expert.
"""

from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, Qwen2MoeConfig, Qwen3MoeConfig

from tests.support.tiny_gguf import add_metadata, stored_name
from tests.support.tiny_model import VOCABULARY

_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_COMMON = {**_SIZES, "intermediate_size": 64, "vocab_size": VOCABULARY, "num_experts_per_tok": 2}
CONFIGS = {
    "llama": MixtralConfig(**_COMMON, num_local_experts=4, sliding_window=None),
    "qwen2moe": Qwen2MoeConfig(
        **{key: value for key, value in _COMMON.items() if key != "head_dim"},
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=96,
    ),
    "qwen3moe": Qwen3MoeConfig(**_COMMON, num_experts=4, moe_intermediate_size=64, norm_topk_prob=True),
}

_HEADS = {
    "llama": {"q_proj": 4, "k_proj": 2},
    "qwen2moe": {},
    "qwen3moe": {},
}  # rotary halves that the file interleaves


def save_mixture_gguf(
    path: Path, architecture: str, experts: str = "Q4_1", linears: str = "Q4_1", *, stacked: bool = True
) -> PreTrainedModel:
    """Write a model of random weights; returns it with the values that the file has."""
    config = CONFIGS[architecture]
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    writer = gguf.GGUFWriter(path, architecture)
    add_metadata(writer, config)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    if architecture != "llama":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if architecture == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    for name, tensor in model.state_dict().items():
        heads = _HEADS[architecture].get(name.split(".")[-2])
        parts = _parts(name, tensor, experts, linears)
        for stored, part, type_name in parts if stacked else _one_by_one(parts):
            kind = gguf.GGMLQuantizationType[type_name]
            raw = gguf.quants.quantize(_turned(part, heads, back=False).float().numpy(), kind)
            writer.add_tensor(stored, raw, raw_dtype=kind)
            values = torch.from_numpy(gguf.quants.dequantize(raw, kind).copy()).view(part.shape)
            part.copy_(_turned(values, heads, back=True))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _parts(name: str, tensor: Tensor, experts: str, linears: str) -> list[tuple[str, Tensor, str]]:
    """The file's tensors of one of the model's: name, view of the values, type."""
    if not name.startswith("model.layers."):
        return [(stored_name(name.removesuffix(".weight")), tensor, "F32" if tensor.dim() == 1 else "Q8_0")]
    block, part = f"blk.{name.split('.')[2]}", name.split(".", 3)[3]
    if part == "mlp.experts.gate_up_proj":
        gate, up = tensor.chunk(2, dim=1)
        return [(f"{block}.ffn_gate_exps.weight", gate, experts), (f"{block}.ffn_up_exps.weight", up, experts)]
    if part == "mlp.experts.down_proj":
        return [(f"{block}.ffn_down_exps.weight", tensor, experts)]
    if part == "mlp.gate.weight":
        return [(f"{block}.ffn_gate_inp.weight", tensor, "F32")]
    if part == "mlp.shared_expert_gate.weight":
        return [(f"{block}.ffn_gate_inp_shexp.weight", tensor.view(-1), "F32")]
    if part.startswith("mlp.shared_expert."):
        return [(f"{block}.ffn_{part.split('.')[2].removesuffix('_proj')}_shexp.weight", tensor, linears)]
    stored, suffix = stored_name(name.rpartition(".")[0]).removesuffix("weight"), part.rpartition(".")[2]
    return [(stored + suffix, tensor, "F32" if tensor.dim() == 1 else linears)]


def _one_by_one(parts: list[tuple[str, Tensor, str]]) -> list[tuple[str, Tensor, str]]:
    """The stacks among the parts as a tensor for each expert."""
    return [
        (name.replace("_exps.", f".{number}."), one, type_name) if "_exps." in name else (name, one, type_name)
        for name, tensor, type_name in parts
        for number, one in enumerate(tensor if "_exps." in name else [tensor])
    ]


def _turned(rows: Tensor, heads: int | None, *, back: bool) -> Tensor:
    """Rows of each head with its rotary halves interleaved, as in the file, or put back."""
    if heads is None:
        return rows
    half = len(rows) // heads // 2
    shape = (heads, half, 2, -1) if back else (heads, 2, half, -1)
    return rows.view(shape).transpose(1, 2).reshape(rows.shape)
