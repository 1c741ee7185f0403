"""Where weights come from: safetensors folders and GGUF files, read tensor by tensor, rows by rows.

A source knows names, shapes and how to read some rows; it keeps no weight in memory. Names are those of the
Hugging Face model. What `read` returns may be a mapping of the file: as long as nobody keeps it, a rank's resident
memory shows what it keeps.
"""

import json
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_qft.errors import CorruptFileError, UserError
from dist_qft.quant.affine4 import Affine4, affine4_from_q4_1
from dist_qft.quant.contract import Format
from dist_qft.quant.q8_0 import Q8_0, q8_0_from_gguf

# Formats whose packed tensors are those of a GGUF type, rearranged.
GGUF_TWINS = {Affine4((1, 32)): ("Q4_1", affine4_from_q4_1), Q8_0(): ("Q8_0", q8_0_from_gguf)}

Rows = tuple[int, int] | None  # first and one-past-last row; None is all


class TensorSource(Protocol):
    """Named tensors in files."""

    where: str

    def names(self) -> set[str]:
        """Names of all tensors, as the Hugging Face model calls them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""

    def read(self, name: str, rows: Rows = None) -> Tensor:
        """Rows of one tensor as floats, in the file's own float type; to be read, not written to nor kept.

        Raises UserError for a tensor that must not be quantized once more than it is (`holds` says in which format).
        """

    def holds(self, name: str, format: Format) -> bool:
        """Whether the file has the tensor in this very format, to be had by `read_packed`, or it must be quantized."""

    def read_packed(self, name: str, format: Format, rows: Rows = None) -> dict[str, Tensor]:
        """The packed tensors of some rows (multiples of the format's `row_alignment`; all if not `row_local`)."""


class SafetensorsSource:
    """A Hugging Face folder: one safetensors file or several with an index."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in self._list_files(folder):
            try:
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a mapping
                        if name in self._files:
                            raise CorruptFileError(f"{path}: tensor '{name}' is also in {self._files[name].name}")
                        self._files[name] = path
                        self._shapes[name] = tuple(file.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise CorruptFileError(f"{path}: not a readable safetensors file: {error}") from error

    @staticmethod
    def _list_files(folder: Path) -> list[Path]:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CorruptFileError(f"{index}: not a safetensors index: {error}") from error
            unsafe = [name for name in names if Path(name).name != name]
            if unsafe:
                raise CorruptFileError(f"{index}: file name '{unsafe[0]}' leaves the folder")
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise UserError(f"{index}: names {missing[0]}, which is not in the folder ({len(missing)} missing)")
            return [folder / name for name in names]
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"model.path: '{folder}' has no *.safetensors file (pickled .bin weights are not read)")
        return files

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, rows: Rows = None) -> Tensor:
        # The file is opened for each read: the mapped pages leave this process together with the tensor.
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name) if rows is None else file.get_slice(name)[rows[0] : rows[1]]

    def holds(self, name: str, format: Format) -> bool:
        return False

    def read_packed(self, name: str, format: Format, rows: Rows = None) -> dict[str, Tensor]:
        raise NotImplementedError("a plain folder holds nothing packed")


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

    def kind(self, name: str) -> str:
        """The tensor's GGUF type, such as 'Q4_1'."""
        return self._tensors[name].tensor_type.name

    def read(self, name: str, rows: Rows = None) -> Tensor:
        import gguf

        tensor = self._tensors[name]
        raw = self._raw_rows(name, rows)
        if not raw.size:  # a rank may own no row, which gguf's dequantize cannot take
            return torch.empty((0, *self.shape(name)[1:]))
        if self.kind(name) in ("F32", "F16"):
            values = raw.view(np.float32 if self.kind(name) == "F32" else np.float16)
        else:
            values = gguf.quants.dequantize(raw, tensor.tensor_type)
        if len(tensor.shape) == 1:
            values = values.reshape(-1)
        return torch.from_numpy(values.copy())

    def holds(self, name: str, format: Format) -> bool:
        return format in GGUF_TWINS and GGUF_TWINS[format][0] == self.kind(name)

    def read_packed(self, name: str, format: Format, rows: Rows = None) -> dict[str, Tensor]:
        _, convert = GGUF_TWINS[format]
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


def require_finite(source: TensorSource, name: str, values: Tensor) -> None:
    """Raise UserError if the values that were read of a tensor are not all finite."""
    if not torch.isfinite(values).all():
        raise UserError(f"{source.where}: tensor '{name}' holds a value that is not finite")


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
