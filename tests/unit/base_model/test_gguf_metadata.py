"""The quick reader of GGUF metadata has the library's fields, bit for bit."""

from pathlib import Path

import gguf
import numpy as np
from transformers import AutoConfig

from dist_qft.base_model.gguf_metadata import MetadataReader, quick_metadata

# One of each kind of value, the empty ones included.
ARRAYS = {
    "words": ["", "a", "\N{LATIN SMALL LETTER E WITH ACUTE}", "x" * 300],
    "integers": [1, -2, 3],
    "reals": [0.5, -1.25],
    "truths": [True, False],
    "nested": [[1, 2], [3]],
}


def test_every_field_and_tensor_is_the_librarys(tmp_path: Path, tiny_gguf: Path):
    for path in (tiny_gguf, file_of_arrays(tmp_path / "arrays.gguf")):
        ours, library = MetadataReader(path), gguf.GGUFReader(path)
        assert list(ours.fields) == list(library.fields)
        for name, field in library.fields.items():
            mine = ours.fields[name]
            assert (mine.offset, mine.data, mine.types) == (field.offset, field.data, field.types), name
            assert [(part.dtype, part.tolist()) for part in mine.parts] == [
                (part.dtype, part.tolist()) for part in field.parts
            ], name
        for mine, theirs in zip(ours.tensors, library.tensors, strict=True):
            assert (mine.name, mine.data_offset, mine.n_bytes) == (theirs.name, theirs.data_offset, theirs.n_bytes)
            assert np.array_equal(mine.data, theirs.data)


def test_transformers_reads_the_same_configuration_with_it(tiny_gguf: Path):
    usual = AutoConfig.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
    with quick_metadata():
        quick = AutoConfig.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
    assert quick.to_dict() == usual.to_dict()
    assert gguf.GGUFReader is not MetadataReader


def file_of_arrays(path: Path) -> Path:
    """A GGUF file with a value of every kind and one tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, values in ARRAYS.items():
        writer.add_array(f"test.{name}", values)
    writer.add_float32("test.real", 0.25)
    writer.add_tensor("weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
