"""A GGUF file as a source of weights: its tensors renamed and reordered to Hugging Face's, read by rows."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_qft.base_model.sources import Rows
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.quant.affine4 import Affine4, affine4_from_q4_1
from dist_qft.quant.contract import Format
from dist_qft.quant.q8_0 import Q8_0, q8_0_from_gguf

# GGUF types whose tensors are those of a format, rearranged.
GGUF_TWINS: dict[str, tuple[Format, Callable[[Tensor], dict[str, Tensor]]]] = {
    "Q4_1": (Affine4((1, 32)), affine4_from_q4_1),
    "Q8_0": (Q8_0(), q8_0_from_gguf),
}
_FLOATS = ("F32", "F16", "BF16", "F64")


class GgufSource:
    """A GGUF file of a supported architecture, its tensors renamed and its rows reordered to Hugging Face's."""

    ARCHITECTURES = ("llama", "qwen2", "qwen3")

    def __init__(self, path: Path) -> None:
        import gguf

        self.where = str(path)
        try:
            reader = gguf.GGUFReader(str(path))
        except (ValueError, OSError, IndexError) as error:
            raise CorruptFileError(f"{path}: not a readable GGUF file: {error}") from error
        field = reader.get_field("general.architecture")
        if field is None:
            raise CorruptFileError(f"{path}: a GGUF file without 'general.architecture'")
        architecture = field.contents()
        if architecture not in self.ARCHITECTURES:
            allowed = ", ".join(self.ARCHITECTURES)
            raise UserError(f"{path}: GGUF architecture '{architecture}' is not supported (supported: {allowed})")
        blocks = reader.get_field(f"{architecture}.block_count").contents()
        heads = reader.get_field(f"{architecture}.attention.head_count").contents()
        kv_field = reader.get_field(f"{architecture}.attention.head_count_kv")
        kv_heads = kv_field.contents() if kv_field else heads
        stored = {tensor.name: tensor for tensor in reader.tensors}
        self._tensors = {name: stored[g] for name, g in gguf_names(architecture, blocks).items() if g in stored}
        # llama.cpp stores the rotary halves of these rows interleaved (its converter's `permute`).
        self._heads = {"q_proj": heads, "k_proj": kv_heads} if architecture == "llama" else {}

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def stored_name(self, name: str) -> str:
        """What the file calls the tensor."""
        return self._tensors[name].name

    def gguf_type(self, name: str) -> str:
        """The tensor's GGUF type, such as 'Q4_1'."""
        return self._tensors[name].tensor_type.name

    def kind(self, name: str) -> str | None:
        return None if self.gguf_type(name) in _FLOATS else f"GGUF {self.gguf_type(name)}"

    def read(self, name: str, rows: Rows = None) -> Tensor:
        import gguf

        tensor = self._tensors[name]
        raw = self._raw_rows(name, rows)
        if not raw.size:  # a rank may own no row, which gguf's dequantize cannot take
            return torch.empty((0, *self.shape(name)[1:]))
        if self.gguf_type(name) in ("F32", "F16"):
            values = raw.view(np.float32 if self.gguf_type(name) == "F32" else np.float16)
        else:
            values = gguf.quants.dequantize(raw, tensor.tensor_type)
        if len(tensor.shape) == 1:
            values = values.reshape(-1)
        return torch.from_numpy(values.copy())

    def stored_format(self, name: str) -> Format | None:
        twin = GGUF_TWINS.get(self.gguf_type(name))
        return None if twin is None or len(self.shape(name)) != 2 else twin[0]

    def kept_format(self, name: str) -> Format | None:
        return self.stored_format(name)

    def read_packed(self, name: str, rows: Rows = None) -> dict[str, Tensor]:
        _, convert = GGUF_TWINS[self.gguf_type(name)]
        return convert(torch.from_numpy(self._raw_rows(name, rows)))

    def row_order(self, name: str) -> np.ndarray | None:
        """For Hugging Face's row i the index of the row in the file; None if they are the same."""
        heads = self._heads.get(name.split(".")[-2])
        if heads is None:
            return None
        rows = self.shape(name)[0]
        return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)

    def _raw_rows(self, name: str, rows: Rows) -> np.ndarray:
        """(rows, bytes) uint8; a vector is read as its elements, one per row."""
        tensor, order = self._tensors[name], self.row_order(name)
        count = self.shape(name)[0]
        width = tensor.n_bytes // count
        first, stop = rows or (0, count)
        wanted = np.arange(first, stop) if order is None else order[first:stop]
        # Rows are only reordered within a head, so the span of the wanted ones is hardly longer than they are.
        start, end = (int(wanted.min()), int(wanted.max()) + 1) if wanted.size else (0, 0)
        with open(self.where, "rb") as file:
            file.seek(tensor.data_offset + start * width)
            raw = np.fromfile(file, dtype=np.uint8, count=(end - start) * width)
        if raw.size != (end - start) * width:
            raise CorruptFileError(f"{self.where}: cut short inside tensor '{tensor.name}'")
        raw = raw.reshape(-1, width)
        return raw if order is None else raw[wanted - start]


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
