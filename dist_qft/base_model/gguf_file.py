"""A GGUF file as a source of weights: its tensors renamed and reordered to Hugging Face's, read by rows."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_qft.base_model.gguf_config import ROPE_FACTORS, architecture_of, check_sizes, experts_of
from dist_qft.base_model.gguf_header import GgufTensor, read_header
from dist_qft.base_model.gguf_types import FLOATS, GGUF_TYPES, NEAREST
from dist_qft.base_model.sources import Rows, require_finite
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.quant.contract import Format

_EXPERT = "{expert}"  # in the name of a stack, the number of an expert
_SHARED_GATE = "shared_expert_gate.weight"


class GgufSource:
    """A GGUF model of a supported architecture, its tensors renamed and its rows reordered to Hugging Face's.

    Of a mixture's stacks each expert is a tensor of its own; older files hold one tensor for each already.

    Raises:
        UserError: another architecture, a tensor that has no place in it, or one of a type that is no weight's.
        CorruptFileError: a header that cannot be right.
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        header = read_header(path)
        check_sizes(header)
        self.files = header.files
        architecture = architecture_of(header)
        blocks = header.metadata[f"{architecture}.block_count"]
        heads = header.metadata[f"{architecture}.attention.head_count"]
        kv_heads = header.metadata.get(f"{architecture}.attention.head_count_kv", heads)
        names, experts = gguf_names(architecture, blocks), experts_of(header)
        if experts:
            names |= _mixture_names(architecture, blocks)
        self._tensors: dict[str, GgufTensor] = {}
        for name, stored in names.items():
            if stored in header.tensors:
                self._tensors |= _by_expert(name, header.tensors[stored], experts)
            elif _EXPERT in name:
                self._tensors |= _one_by_one(name, stored, header.tensors, experts)
        # llama.cpp stores the rotary halves of these rows interleaved (its converter's `permute`).
        self._heads = {"q_proj": heads, "k_proj": kv_heads} if architecture == "llama" else {}
        self._refuse_odd_tensors(header.tensors)

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def stored_name(self, name: str) -> str:
        """The tensor's name in the file."""
        return self._tensors[name].name

    def gguf_type(self, name: str) -> str:
        """The tensor's GGUF type, such as 'Q4_1'."""
        return self._tensors[name].type

    def stored_bytes(self, name: str) -> int:
        """The size of the tensor in the file."""
        return self._tensors[name].nbytes

    def is_float(self, name: str) -> bool:
        return True  # `__init__` refuses integers

    def kind(self, name: str) -> str | None:
        return None if self.gguf_type(name) in FLOATS else f"GGUF {self.gguf_type(name)}"

    def stored_format(self, name: str) -> Format | None:
        twin = GGUF_TYPES.get(self.gguf_type(name))
        return None if twin is None else twin.format

    def kept_format(self, name: str) -> Format | None:
        return None if self.kind(name) is None else self.stored_format(name) or NEAREST

    def read_packed(self, name: str, rows: Rows = None) -> dict[str, Tensor]:
        packed = GGUF_TYPES[self.gguf_type(name)].packed(torch.from_numpy(self._raw_rows(name, rows)))
        for key, tensor in packed.items():
            if tensor.is_floating_point():
                require_finite(self, f"{name}' ({key}) of '{self.stored_name(name)}", tensor)
        return packed

    def read(self, name: str, rows: Rows = None) -> Tensor:
        import gguf

        tensor = self._tensors[name]
        raw = self._raw_rows(name, rows)
        if not raw.size:  # a rank may own no row, which gguf's dequantize cannot take
            return torch.empty((0, *tensor.shape[1:]))
        own = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}.get(tensor.type)
        if own is not None:
            values = raw.view(own)
        else:
            values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[tensor.type])
        if len(tensor.shape) == 1:
            values = values.reshape(-1)
        return torch.from_numpy(values.copy())

    def row_order(self, name: str) -> np.ndarray | None:
        """The index in the file of each of Hugging Face's rows; None if they are the same."""
        heads = self._heads.get(name.split(".")[-2])
        if heads is None:
            return None
        rows = self.shape(name)[0]
        return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)

    def _raw_rows(self, name: str, rows: Rows) -> np.ndarray:
        """(rows, bytes) uint8; a vector is read as its elements, one per row."""
        tensor, order = self._tensors[name], self.row_order(name)
        count = tensor.shape[0]
        width = tensor.nbytes // count
        first, stop = rows or (0, count)
        wanted = np.arange(first, stop) if order is None else order[first:stop]
        # Rows are only reordered within a head, so the span of the wanted ones is hardly longer than they are.
        start, end = (int(wanted.min()), int(wanted.max()) + 1) if wanted.size else (0, 0)
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset + start * width)
            raw = np.fromfile(file, dtype=np.uint8, count=(end - start) * width)
        if raw.size != (end - start) * width:
            raise CorruptFileError(f"{tensor.path}: cut short inside tensor '{tensor.name}'")
        raw = raw.reshape(-1, width)
        return raw if order is None else raw[wanted - start]

    def _refuse_odd_tensors(self, stored: dict[str, GgufTensor]) -> None:
        known = {tensor.name for tensor in self._tensors.values()} | {ROPE_FACTORS}
        if others := sorted(stored.keys() - known):
            more = f" ({len(others) - 1} more)" if len(others) > 1 else ""
            raise UserError(f"{self.where}: tensor '{others[0]}' has no place in this architecture{more}")
        for name, tensor in self._tensors.items():
            if len(tensor.shape) > 2:
                raise CorruptFileError(f"{self.where}: tensor '{tensor.name}' has {len(tensor.shape)} dimensions")
            if len(tensor.shape) == 1 and tensor.type not in FLOATS:
                raise CorruptFileError(f"{self.where}: tensor '{tensor.name}' is {tensor.type}, must be of floats")
            if tensor.type.startswith("I") and tensor.type[1:].isdigit():
                raise CorruptFileError(f"{self.where}: tensor '{tensor.name}' holds integers ({tensor.type})")
            if not _is_readable(tensor.type):
                raise UserError(f"{self.where}: tensor '{tensor.name}' is {tensor.type}, which is not supported")
            heads = self._heads.get(name.split(".")[-2])
            if heads and tensor.shape[0] % (2 * heads):
                raise CorruptFileError(
                    f"{self.where}: tensor '{tensor.name}' has {tensor.shape[0]} rows, {heads} heads cannot share them"
                )


@cache
def _is_readable(type_name: str) -> bool:
    """True if tensors of this type can be read as floats."""
    import gguf

    kind = gguf.GGMLQuantizationType[type_name]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return type_name in FLOATS
    return True


def _by_expert(name: str, tensor: GgufTensor, experts: int) -> dict[str, GgufTensor]:
    """A tensor under its name; a stack of experts as one tensor for each, under the names that models publish.

    Raises:
        CorruptFileError: a stack of another number of experts than the metadata says.
    """
    if _EXPERT not in name:
        # A gate of shared experts has one output, and the file holds its inputs as a vector.
        is_row = name.endswith(_SHARED_GATE) and len(tensor.shape) == 1
        return {name: replace(tensor, shape=(1, *tensor.shape)) if is_row else tensor}
    if len(tensor.shape) != 3 or tensor.shape[0] != experts:
        raise CorruptFileError(
            f"{tensor.path}: tensor '{tensor.name}' is {list(tensor.shape)}, must be a stack of {experts} experts"
        )
    size = tensor.nbytes // experts
    return {
        name.replace(_EXPERT, str(number)): replace(
            tensor, shape=tensor.shape[1:], offset=tensor.offset + number * size, nbytes=size
        )
        for number in range(experts)
    }


def _one_by_one(name: str, stack: str, stored: dict[str, GgufTensor], experts: int) -> dict[str, GgufTensor]:
    """The experts of files from before there were stacks, as far as they are there: `blk.0.ffn_gate.3.weight`."""
    names = {number: stack.replace("_exps.", f".{number}.") for number in range(experts)}
    return {name.replace(_EXPERT, str(number)): stored[each] for number, each in names.items() if each in stored}


def _mixture_names(architecture: str, blocks: int) -> dict[str, str]:
    """Hugging Face tensor name -> GGUF tensor name of routers and experts, whose numbers are `_EXPERT`."""
    if architecture == "llama":  # Mixtral
        block, products = "block_sparse_moe", {"w1": "gate", "w2": "down", "w3": "up"}
    else:
        block, products = "mlp", {f"{product}_proj": product for product in ("gate", "down", "up")}
    names = {}
    for i in range(blocks):
        names[f"model.layers.{i}.{block}.gate.weight"] = f"blk.{i}.ffn_gate_inp.weight"
        for product, stored in products.items():
            names[f"model.layers.{i}.{block}.experts.{_EXPERT}.{product}.weight"] = f"blk.{i}.ffn_{stored}_exps.weight"
            if architecture == "qwen2moe":
                names[f"model.layers.{i}.mlp.shared_expert.{product}.weight"] = f"blk.{i}.ffn_{stored}_shexp.weight"
        if architecture == "qwen2moe":
            names[f"model.layers.{i}.mlp.{_SHARED_GATE}"] = f"blk.{i}.ffn_gate_inp_shexp.weight"
    return names


def gguf_names(architecture: str, blocks: int) -> dict[str, str]:
    """Hugging Face tensor name -> GGUF tensor name for a decoder of `blocks` layers."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], blocks)
    attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    attention += ["self_attn.q_norm", "self_attn.k_norm"]
    mlp = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    norms = ["input_layernorm", "post_attention_layernorm"]
    modules = ["model.embed_tokens", "model.norm", "lm_head"]
    modules += [f"model.layers.{i}.{part}" for i in range(blocks) for part in attention + mlp + norms]
    names = {}
    for module in modules:
        base = table.get_name(module)
        if base is not None:
            names.update({f"{module}.{suffix}": f"{base}.{suffix}" for suffix in ("weight", "bias")})
    return names
