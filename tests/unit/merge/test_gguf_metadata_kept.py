"""The metadata of a GGUF file that is written anew: each entry as it was stored, even what the library refuses."""

import struct

import gguf
import numpy as np

from dist_qft.merge.writers.gguf_files import BLOCK_BYTES, RewrittenFile
from tests.support.tiny_gguf import add_stored, save_tiny_gguf, stored_metadata, tensors_of

ARRAY, STRING, UINT32 = 9, 8, 4
LATIN = b"caf\xe9"  # not UTF-8
UNUSUAL = {
    "general.tags": struct.pack("<IIQ", ARRAY, STRING, 0),
    "tokenizer.ggml.added": struct.pack("<IIQ", ARRAY, UINT32, 0),
    "nested": struct.pack("<IIQIQIIQI", ARRAY, ARRAY, 2, UINT32, 1, 7, UINT32, 1, 9),
    "latin": struct.pack("<IQ", STRING, len(LATIN)) + LATIN,
}


def test_arrays_that_are_empty_or_nested_and_texts_of_any_bytes_are_kept(tmp_path):
    base, path, changed = tmp_path / "base.gguf", tmp_path / "merged.gguf", "blk.0.attn_q.weight"
    save_tiny_gguf(base, linears="F16")
    named = add_stored(base, UNUSUAL)
    before = stored_metadata(base)
    assert len(named) == 4 and named.items() <= before.items()
    file = RewrittenFile([base], path, [changed], {gguf.Keys.General.NAME: "another"})
    shape = tensors_of(base)[changed][1].shape
    blocks = np.zeros((shape[0], shape[1] // 2 // 32 * BLOCK_BYTES), np.uint8)
    file.write(changed, blocks)
    file.close()
    after = stored_metadata(path)
    told = {gguf.Keys.General.NAME: struct.pack("<IQ", STRING, 7) + b"another"}
    told[gguf.Keys.General.FILE_TYPE] = struct.pack("<II", UINT32, gguf.LlamaFileType.MOSTLY_Q4_1)
    assert after == before | told
    old, new = tensors_of(base), tensors_of(path)
    assert new.pop(changed)[0] == "Q4_1" and old.pop(changed)[0] == "F16"
    assert all(np.array_equal(old[name][1], new[name][1]) for name in old.keys() | new.keys())
