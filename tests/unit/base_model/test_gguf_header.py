"""GGUF headers: what they say, and that whatever is wrong with one is said in a line before a tensor is read."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from dist_qft.base_model.gguf_config import check_sizes
from dist_qft.base_model.gguf_file import GgufSource
from dist_qft.base_model.gguf_header import GgufHeader, read_header
from dist_qft.errors import CorruptFileError, DistQFTError, UserError
from tests.support.tiny_gguf import save_tiny_gguf, split_gguf
from tests.support.tiny_model import tiny_llama_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf")


def test_it_is_what_the_gguf_library_reads(whole):
    header, reader = read_header(whole), gguf.GGUFReader(whole)
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        found = header.tensors[tensor.name]
        assert (found.type, found.shape) == (tensor.tensor_type.name, tuple(map(int, reversed(tensor.shape))))
        assert (found.offset, found.nbytes) == (tensor.data_offset, tensor.n_bytes)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata.keys() == fields.keys()
    for name, value in header.metadata.items():
        assert value is None or value == fields[name].contents()


# --- damage ----------------------------------------------------------------------------------------------------------


class Layout:
    """The places of the fields of a file's header, found without the reader that is tested."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.keys = {name: field.offset for name, field in reader.fields.items()}
        self.infos = {tensor.name: tensor.field for tensor in reader.tensors}

    def key_length(self, key: str) -> int:
        return self.keys[key]

    def value_type(self, key: str) -> int:
        return self.keys[key] + 8 + len(key)

    def value(self, key: str) -> int:
        return self.value_type(key) + 4

    def offset(self, tensor: str) -> int:
        field = self.infos[tensor]
        return field.offset + sum(part.nbytes for part in field.parts[:-1])

    def type(self, tensor: str) -> int:
        return self.offset(tensor) - 4


def put(code: str, at: Callable[[Layout], int], value: int | float) -> Callable[[bytearray, Layout], None]:
    def damage(data: bytearray, layout: Layout) -> None:
        struct.pack_into(f"<{code}", data, at(layout), value)

    return damage


HUGE = (1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
NORM, MATRIX = "blk.1.attn_norm.weight", "blk.1.ffn_down.weight"
BLOCKS, NAME, TOKENS = "llama.block_count", "general.name", "tokenizer.ggml.tokens"
DAMAGES = {
    **{f"tensor count {n}": put("Q", lambda layout: 8, n) for n in HUGE},
    **{f"key count {n}": put("Q", lambda layout: 16, n) for n in HUGE},
    **{f"key length {n}": put("Q", lambda layout: layout.key_length(NAME), n) for n in HUGE},
    **{f"string length {n}": put("Q", lambda layout: layout.value(NAME), n) for n in HUGE},
    **{f"array length {n}": put("Q", lambda layout: layout.value(TOKENS) + 4, n) for n in HUGE},
    **{f"length in an array {n}": put("Q", lambda layout: layout.value(TOKENS) + 12, n) for n in HUGE},
    **{f"value type {n}": put("I", lambda layout: layout.value_type(NAME), n) for n in (9, 13, 77, 1 << 31)},
    **{f"array type {n}": put("I", lambda layout: layout.value(TOKENS), n) for n in (9, 13, 1 << 31)},
    **{
        f"{tensor} offset {n}": put("Q", lambda layout, tensor=tensor: layout.offset(tensor), n)
        for tensor in (NORM, MATRIX)
        for n in (0, 1, 7, 32, 33, 1 << 20, (1 << 64) - 1, (1 << 64) - 32)
    },
    **{
        f"type of a norm {n}": put("I", lambda layout: layout.type(NORM), n) for n in (1, 2, 8, 26, 28, 30, 99, 1 << 31)
    },
    **{f"type of a matrix {n}": put("I", lambda layout: layout.type(MATRIX), n) for n in (0, 1, 2, 8, 12, 24, 26, 4)},
    "dimensions 0": put("I", lambda layout: layout.infos[NORM].offset + 8 + len(NORM), 0),
    "dimensions 5": put("I", lambda layout: layout.infos[NORM].offset + 8 + len(NORM), 5),
    **{
        f"size {n}": put("Q", lambda layout: layout.infos[MATRIX].offset + 8 + len(MATRIX) + 4, n)
        for n in (0, 1, 31, 64, 1 << 20, 1 << 40, (1 << 63) - 1)
    },
    **{
        f"blocks {n}": put("I", lambda layout: layout.value(BLOCKS), n)
        for n in (0, 1, 2, 4, 1000, 10**6, (1 << 32) - 1)
    },
    "blocks as a float": put("I", lambda layout: layout.value_type(BLOCKS), 6),
    **{
        f"heads {n}": put("I", lambda layout: layout.value("llama.attention.head_count"), n)
        for n in (0, 3, 1 << 20, (1 << 32) - 1)
    },
    "kv heads 3": put("I", lambda layout: layout.value("llama.attention.head_count_kv"), 3),
    "width 0": put("I", lambda layout: layout.value("llama.embedding_length"), 0),
    "epsilon nan": put("f", lambda layout: layout.value("llama.attention.layer_norm_rms_epsilon"), float("nan")),
    "magic": put("I", lambda layout: 0, 1),
    "version 1": put("I", lambda layout: 4, 1),
    "version 2^20": put("I", lambda layout: 4, 1 << 20),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_line_and_exit_code_2_or_5(whole, tmp_path, name):
    data = bytearray(whole.read_bytes())
    DAMAGES[name](data, Layout(whole))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    if data == whole.read_bytes():
        pytest.skip("that is the value already")
    with pytest.raises(DistQFTError) as refused:
        GgufSource(path)
    assert refused.value.exit_code in (2, 5)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.parametrize("where", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short(whole, tmp_path, where):
    data = whole.read_bytes()
    path = tmp_path / "short.gguf"
    path.write_bytes(data[: int(where * len(data))])
    with pytest.raises(CorruptFileError) as refused:
        GgufSource(path)
    assert str(refused.value).startswith(f"{path}: not a readable GGUF file: ")
    assert refused.value.exit_code == 5


def test_what_has_no_place_is_refused(tmp_path):
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((2, 32, 64), np.float32))

    with pytest.raises(UserError, match=r"tensor 'blk\.0\.ffn_gate_exps\.weight' has no place"):
        GgufSource(save_tiny_gguf(tmp_path / "extra.gguf", finish=extra))


@pytest.mark.parametrize("kind", ["Q8_1", "Q1_0"])
def test_a_type_that_cannot_be_read_is_refused(tmp_path, kind):
    def zeros(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        return np.zeros((len(values), values.shape[-1] // block * size), np.uint8)

    def quantize(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
        return zeros(values, kind) if kind.name.endswith(("8_1", "1_0")) else gguf.quants.quantize(values, kind)

    config = tiny_llama_config(intermediate_size=256)
    path = save_tiny_gguf(tmp_path / "odd.gguf", others={"down_proj": kind}, config=config, quantize=quantize)
    with pytest.raises(UserError, match=rf"tensor 'blk\.0\.ffn_down\.weight' is {kind}, which is not supported$"):
        GgufSource(path)


FLOAT, BOOL, NUMBER = gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.BOOL, gguf.GGUFValueType.UINT32


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("logit_scale", 2.0, FLOAT),
        ("embedding_scale", 12.0, FLOAT),
        ("final_logit_softcapping", 30.0, FLOAT),
        ("attention.causal", False, BOOL),
        ("attention.scale", 0.5, FLOAT),
        ("vocab_size", 1 << 31, NUMBER),
        ("vocab_size", 5, NUMBER),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(tmp_path, key, value, kind):
    def finish(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(f"llama.{key}", None)
        writer.add_key_value(f"llama.{key}", value, kind)

    with pytest.raises(DistQFTError, match=rf"'llama\.{key}': got .*, must be ") as refused:
        GgufSource(save_tiny_gguf(tmp_path / "odd.gguf", finish=finish))
    assert refused.value.exit_code in (2, 5)


def test_settings_that_change_nothing_are_taken(tmp_path):
    def finish(writer: gguf.GGUFWriter) -> None:
        writer.add_logit_scale(1.0)
        writer.add_key_value("llama.attention.causal", True, BOOL)
        writer.add_key_value("llama.attention.scale", tiny_llama_config().head_dim ** -0.5, FLOAT)

    assert GgufSource(save_tiny_gguf(tmp_path / "usual.gguf", finish=finish)).names()


# --- models in several files -----------------------------------------------------------------------------------------


def test_a_model_in_several_files_is_the_model(whole, tmp_path):
    paths = split_gguf(whole, tmp_path)
    one, several = GgufSource(whole), GgufSource(paths[0])
    assert several.names() == one.names() and several.files == paths
    for name in one.names():
        assert np.array_equal(several.read(name).numpy(), one.read(name).numpy())
    header = read_header(paths[0])
    check_sizes(header)
    assert header.metadata.keys() - read_header(whole).metadata.keys() == {
        "split.no",
        "split.count",
        "split.tensors.count",
    }


def test_parts_that_are_missing_exchanged_or_repeated(whole, tmp_path):
    paths = split_gguf(whole, tmp_path)
    shutil.copy(paths[0], tmp_path / "first.gguf")
    with pytest.raises(UserError, match="part of a model in 3 files"):
        GgufSource(tmp_path / "first.gguf")
    kept = paths[2].read_bytes()
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(CorruptFileError, match=r"'split\.no': got 1, must be 2"):
        GgufSource(paths[0])
    paths[2].unlink()
    with pytest.raises(UserError, match=r"no file '.*00003-of-00003\.gguf' \(1 of 3 missing\)"):
        GgufSource(paths[0])
    paths[2].write_bytes(kept)
    assert isinstance(read_header(paths[0]), GgufHeader)
