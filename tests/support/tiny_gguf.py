"""A small Llama as a GGUF file, written with the gguf library alone: its weights, metadata and tokenizer."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.tiny_model import CHATML, tiny_llama_config, tiny_tokenizer

_MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def save_tiny_gguf(
    path: Path,
    linears: str = "Q4_1",
    tables: str = "Q8_0",
    *,
    others: Mapping[str, str] | None = None,
    config: LlamaConfig | None = None,
    quantize: Callable[[np.ndarray, gguf.GGMLQuantizationType], np.ndarray] = gguf.quants.quantize,
    finish: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """Random weights from a fixed seed.

    Args:
        linears, tables: GGUF types; `others` has those of single layer types, such as `{"down_proj": "Q6_K"}`.
        finish: adds metadata or tensors of its own.
    """
    config = config or tiny_llama_config()
    torch.manual_seed(1)
    weights = LlamaForCausalLM(config).state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer, config)
    for name, tensor in weights.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "bias":  # the library begins with zeros, which show nothing
            tensor = torch.randn(tensor.shape)
        kind = "F32" if tensor.dim() == 1 else tables if module in _OUTER else linears
        kind = (others or {}).get(module.split(".")[-1], kind)
        values = file_rows(module, tensor, config).float().numpy()
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(stored_name(module, suffix), quantize(values, kind), raw_dtype=kind)
    finish(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def split_gguf(whole: Path, folder: Path, count: int = 3) -> list[Path]:
    """The parts of a model as llama.cpp's llama-gguf-split writes them: all metadata in the first one."""
    reader = gguf.GGUFReader(whole)
    paths = [folder / f"model-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            copy_metadata(reader, writer)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def copy_metadata(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=element)
        if field.name == gguf.Keys.General.ALIGNMENT:
            writer.data_alignment = field.contents()


def quantized_again(source: Path, target: Path, type_of: Callable[[str, int], str]) -> Path:
    """The model of a GGUF file with matrices in other types, quantized by ggml; those of the same type are copied.

    Args:
        type_of: the GGUF type of a tensor, from its name and its number of columns.
    """
    from tests.support.llama_cpp import quantize

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama", use_temp_file=True)
    copy_metadata(reader, writer)
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        if len(tensor.shape) > 1:
            kind = gguf.GGMLQuantizationType[type_of(tensor.name, int(tensor.shape[0]))]
        data = tensor.data
        if kind != tensor.tensor_type:
            data = quantize(gguf.quants.dequantize(data, tensor.tensor_type), kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def llama_cpp_type(mixture: str, name: str, columns: int, *, layers: int) -> str:
    """The type that llama.cpp's `llama_tensor_get_type` gives a tensor of a Llama with fewer than 4 heads per group.

    Args:
        mixture: Q4_0, Q4_K_M, Q5_K_M, Q6_K, IQ4_NL or Q8_0.
    """
    kind = mixture.removesuffix("_M")
    if name in ("token_embd.weight", "output.weight"):
        kind = "Q8_0" if kind == "Q8_0" else "Q6_K"
    elif any(part in name for part in ("attn_v.", "ffn_down.")):
        layer, eighth = int(name.split(".")[1]), layers // 8
        more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
        if mixture.endswith("_M") and more:
            kind = "Q6_K"
        elif mixture == "IQ4_NL" and "ffn_down." in name and layer < eighth:
            kind = "Q5_K"
    if columns % 256:  # a row must be whole blocks
        kind = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}.get(kind, kind)
    return kind


def save_random_gguf(path: Path, layers: int, hidden: int, intermediate: int) -> Path:
    """Any number of bytes: Q4_1 linears of random codes, scales that keep activations finite, a small vocabulary."""
    config = tiny_llama_config(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=intermediate, num_key_value_heads=4
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    add_metadata(writer, config)
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) == 1:
            writer.add_tensor(stored_name(module), np.ones(shape, np.float32))
        elif module in _OUTER:
            values = generator.standard_normal(shape, np.float32)
            q8_0 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored_name(module), gguf.quants.quantize(values, q8_0), raw_dtype=q8_0)
        else:
            blocks = generator.integers(0, 256, (shape[0], shape[1] // 32, 20), np.uint8)
            scale = np.float16(0.1 / hidden**0.5)
            blocks[:, :, :4] = np.array([scale, -7.5 * scale], "<f2").view(np.uint8)
            raw = blocks.reshape(shape[0], -1)
            writer.add_tensor(stored_name(module), raw, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_metadata(writer: gguf.GGUFWriter, config) -> None:
    writer.add_name("tiny")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    tokenizer = tiny_tokenizer()
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(tokenizer.all_special_tokens)
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([control if token in special else normal for token, _ in tokens])
    writer.add_token_merges(_merges(tokenizer))
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(CHATML)


def _merges(tokenizer) -> list[str]:
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def stored_name(module: str, suffix: str = "weight") -> str:
    if module in _OUTER:
        return f"{_OUTER[module]}.{suffix}"
    _, _, block, part = module.split(".", 3)
    return f"blk.{block}.{_MODULES[part]}.{suffix}"


def file_rows(module: str, weight: torch.Tensor, config) -> torch.Tensor:
    """Rows of q and k as llama.cpp's converter stores them, biases too: the two rotary halves of a head alternate."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module.split(".")[-1])
    if heads is None:
        return weight
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def tensors_of(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """GGUF type and raw bytes of every tensor, by the independent reader."""
    reader = gguf.GGUFReader(path)
    return {t.name: (t.tensor_type.name, np.array(t.data).view(np.uint8).copy()) for t in reader.tensors}


def metadata_of(path: Path) -> dict[str, object]:
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def add_stored(path: Path, values: Mapping[str, bytes]) -> dict[str, bytes]:
    """Put metadata that the gguf library does not write in front of a file's own; each is a type and a value.

    Returns them under their names in the file, which are lengthened so that tensors stay where they are aligned.
    """
    named = {}
    for key, value in values.items():
        filler = -(8 + len(key) + len(value)) % 32
        named[key + "_" * filler] = value
    added = b"".join(struct.pack("<Q", len(key)) + key.encode() + value for key, value in named.items())
    content = path.read_bytes()
    head = content[:16] + struct.pack("<Q", struct.unpack("<Q", content[16:24])[0] + len(named))
    path.write_bytes(head + added + content[24:])
    return named


def stored_metadata(path: Path) -> dict[str, bytes]:
    """Type and value of each entry as they are in the file."""
    fields = gguf.GGUFReader(path).fields
    stored = {name: b"".join(part.tobytes() for part in field.parts[2:]) for name, field in fields.items()}
    return {name: value for name, value in stored.items() if not name.startswith("GGUF.")}
