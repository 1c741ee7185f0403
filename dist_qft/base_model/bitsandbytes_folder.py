"""A Hugging Face folder whose linear layers bitsandbytes has quantized to nf4, read byte for byte.

Beside each such `<name>.weight` lie (bitsandbytes' `QuantState.as_dict(packed=True)`)

    .quant_state.bitsandbytes__nf4      JSON as uint8: shape, blocksize; with double quantization nested_offset, ...
    .absmax, .quant_map                 float32: a constant per block; the 16 values of the codes
    .nested_absmax, .nested_quant_map   with double quantization: the same for the constants, which then are uint8

and the weight itself is a column of codes, in whatever dtype (`bnb_4bit_quant_storage`) their bytes were dressed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_qft.base_model.sources import Rows, SafetensorsSource, dequantized_rows, require_finite
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.quant.contract import Format
from dist_qft.quant.nf4 import BLOCKS, CONSTANT_BLOCK, NF4, codebook, dynamic_map

METHOD = "bitsandbytes"
_SAME = 1e-6  # relative: the last bits of a map are those of the CPU on which the folder was made
_STATE = ".quant_state.bitsandbytes__nf4"


def is_nf4(quantization: Mapping[str, Any]) -> bool:
    """True if a config.json's `quantization_config` describes weights in nf4."""
    kind = quantization.get("bnb_4bit_quant_type")
    return quantization.get("quant_method") == METHOD and bool(quantization.get("load_in_4bit")) and kind == "nf4"


@dataclass(frozen=True)
class _Stored:
    """A quantized weight: its format, its shape, and with double quantization the mean of its constants."""

    format: NF4
    shape: tuple[int, int]
    offset: float


class BitsAndBytesSource:
    """The weights of a folder with nf4 weights; weights that bitsandbytes left as floats are read as floats."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._files = SafetensorsSource(folder)
        self._known_codes: set[str] = set()  # weights whose maps were compared; they are read in many pieces
        states = [name for name in self._files.names() if name.endswith(_STATE)]
        self._stored = {name.removesuffix(_STATE): self._state(name) for name in sorted(states)}
        if not self._stored:
            raise UserError(f"{folder}: config.json promises {METHOD}' nf4, but no tensor is stored in it")

    def names(self) -> set[str]:
        """Names of weights and other tensors, without the parts of a quantized weight."""
        return {name for name in self._files.names() if name.rpartition(".weight.")[0] + ".weight" not in self._stored}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape if name in self._stored else self._files.shape(name)

    def is_float(self, name: str) -> bool:
        return name in self._stored or self._files.is_float(name)

    def kind(self, name: str) -> str | None:
        stored = self._stored.get(name)
        return None if stored is None else f"{METHOD} {stored.format.words}"

    def stored_format(self, name: str) -> Format | None:
        stored = self._stored.get(name)
        return None if stored is None else stored.format

    def read(self, name: str, rows: Rows = None) -> Tensor:
        return dequantized_rows(self, name, rows) if name in self._stored else self._files.read(name, rows)

    def kept_format(self, name: str) -> Format | None:
        return self.stored_format(name)

    def read_packed(self, name: str, rows: Rows = None) -> dict[str, Tensor]:
        stored = self._stored[name]
        self._require_known_codes(name)
        out_features, in_features = stored.shape
        rows = rows or (0, out_features)
        packed = {"codes": self._rows_of(name, out_features, rows, in_features // 2)}
        constants = self._rows_of(f"{name}.absmax", out_features, rows, in_features // stored.format.block)
        if not stored.format.double_quant:
            require_finite(self, name, constants)
            return packed | {"absmax": constants}
        scales = self._files.read(f"{name}.nested_absmax")
        offset = torch.tensor([stored.offset], dtype=torch.float32)
        require_finite(self, name, torch.cat([scales, offset]))
        return packed | {"absmax_codes": constants.flatten(), "absmax_absmax": scales, "absmax_offset": offset}

    def _state(self, name: str) -> _Stored:
        where = f"{self.where}: '{name}'"
        try:
            state = json.loads(bytes(self._files.read(name).tolist()))
            rows, columns = state["shape"]
            block, twice = state["blocksize"], "nested_blocksize" in state
            if block not in BLOCKS:
                raise UserError(f"{where}: got blocks of {block!r}, must be one of {', '.join(map(str, BLOCKS))}")
            if twice and state["nested_blocksize"] != CONSTANT_BLOCK:
                raise UserError(
                    f"{where}: got constants in blocks of {state['nested_blocksize']}, must be {CONSTANT_BLOCK}"
                )
            stored = _Stored(NF4(block, twice), (rows, columns), float(state["nested_offset"]) if twice else 0.0)
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(f"{where}: not a description of a quantized weight: {error!r}") from error
        stored.format.check(stored.shape, where)
        return stored

    def _rows_of(self, name: str, height: int, rows: tuple[int, int], width: int) -> Tensor:
        """Some rows of a tensor that holds `height` rows of `width` bytes, or constants, one after another."""
        length = next(iter(self._files.shape(name)), 0)
        # Codes may be stored as wider numbers (`bnb_4bit_quant_storage`), several codes to an element of the file.
        per_element, rest = divmod(height * width, length) if length else (0, 1)
        if rest or width % per_element:
            raise CorruptFileError(
                f"{self.where}: tensor '{name}': got {length} elements, must be a multiple of {height}"
            )
        elements = self._files.read(name, (rows[0] * width // per_element, rows[1] * width // per_element))
        elements = elements if per_element == 1 else elements.flatten().view(torch.uint8)
        return elements.reshape(rows[1] - rows[0], width)

    def _require_known_codes(self, name: str) -> None:
        """Refuse a weight whose codes, or whose constants' codes, stand for other values than here."""
        if name in self._known_codes:
            return
        maps = {"quant_map": codebook()}
        if self._stored[name].format.double_quant:
            maps["nested_quant_map"] = dynamic_map(torch.device("cpu"))
        for suffix, values in maps.items():
            stored = self._files.read(f"{name}.{suffix}")
            if stored.shape != values.shape or not torch.allclose(stored.float(), values, rtol=_SAME, atol=0.0):
                raise UserError(f"{self.where}: '{name}.{suffix}' is not the code of this version of {METHOD}")
        self._known_codes.add(name)
