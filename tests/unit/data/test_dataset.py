"""The flat arrays and their file: rows come back whole, and no damage to the file goes unseen."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from dist_qft.data.dataset import TokenDataset
from dist_qft.data.tokens import TokenSequence
from dist_qft.errors import CorruptFileError, SetupError


def sequences(lengths):
    """Sample i has the tokens 100 i, 100 i + 1, ...; every second one, and (wrongly) the first, is a target."""
    return [TokenSequence(100 * i + np.arange(n, dtype=np.int32), np.arange(n) % 2 == 0) for i, n in enumerate(lengths)]


@pytest.fixture
def packed():
    return TokenDataset.from_sequences(sequences([6, 5, 4, 3]), pad_id=7, packed_length=10, counts={"read": 4})


def test_packed_rows(packed):
    assert len(packed) == 2
    assert packed.lengths.tolist() == [10, 8]
    tokens, targets, starts = packed.row(0)
    assert tokens.tolist() == [0, 1, 2, 3, 4, 5, 200, 201, 202, 203]
    assert starts.tolist() == [0, 6]
    # A segment's first token has nothing before it: no target, whatever the sample said.
    assert np.flatnonzero(targets).tolist() == [2, 4, 8]
    assert packed.row(1).segment_starts.tolist() == [0, 5]
    assert packed.counts == {"read": 4, "rows": 2, "tokens": 18, "target_tokens": 6}


def test_unpacked_rows_are_the_samples():
    samples = sequences([6, 1, 4])
    dataset = TokenDataset.from_sequences(samples, pad_id=0, packed_length=None, counts={})
    assert [dataset.row(i).tokens.tolist() for i in range(3)] == [sample.input_ids.tolist() for sample in samples]
    assert [dataset.row(i).segment_starts.tolist() for i in range(3)] == [[0], [0], [0]]


def test_saved_and_loaded(packed, tmp_path):
    path = tmp_path / "a.safetensors"
    packed.save(path)
    loaded = TokenDataset.load(path)
    for name in ("tokens", "targets", "row_offsets", "segment_starts"):
        expected, found = getattr(packed, name), getattr(loaded, name)
        assert found.dtype == expected.dtype
        assert found.tolist() == expected.tolist()
    assert (loaded.pad_id, loaded.packed_length, loaded.counts) == (7, 10, packed.counts)
    assert loaded.digest == packed.digest
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_digest_covers_what_decides_a_batch(packed):
    changes = {
        "tokens": packed.tokens + 1,
        "targets": ~packed.targets,
        "row_offsets": np.array([0, 6, 18]),
        "segment_starts": np.array([0, 5, 10, 15]),
        "pad_id": 0,
        "packed_length": 12,
    }
    digests = {replace(packed, **{name: value}).digest for name, value in changes.items()}
    assert len(digests | {packed.digest}) == len(changes) + 1
    assert replace(packed, counts={}).digest == packed.digest


def test_digest_of_equal_rows_is_that_of_earlier_versions(packed):
    # Checkpoints hold it: a run must go on with another version of the cache.
    assert packed.digest == "08d84a126196ce6e7d59fc4178373345b0f97a7d1a8dbc40f5e4119b241087e4"


def test_every_flipped_byte_of_the_arrays_is_seen(packed, tmp_path):
    path = tmp_path / "a.safetensors"
    packed.save(path)
    content = path.read_bytes()
    arrays = 8 + int.from_bytes(content[:8], "little")  # behind the safetensors header
    for position in range(arrays, len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(CorruptFileError):
            TokenDataset.load(path)


def test_every_flipped_byte_of_what_is_told_is_seen(packed, tmp_path):
    path = tmp_path / "a.safetensors"
    replace(packed, notes=("one is cut",)).save(path)
    content = path.read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    first = content.index(b'"token_dataset')
    for position in range(first, 8 + len(header)):
        for bit in (1, 2, 16):
            changed = content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :]
            path.write_bytes(changed)
            try:
                loaded = TokenDataset.load(path)
            except CorruptFileError:
                continue
            assert (loaded.counts, loaded.notes, loaded.digest) == (packed.counts, ("one is cut",), packed.digest)


def test_a_file_of_an_earlier_version_has_no_digest_of_its_report(packed, tmp_path):
    path = tmp_path / "a.safetensors"
    packed.save(path)
    with safe_open(path, "np") as file:
        metadata = json.loads(file.metadata()["token_dataset"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    del metadata["told"]
    save_file(arrays, path, metadata={"token_dataset": json.dumps(metadata)})
    assert TokenDataset.load(path).counts == packed.counts


@pytest.mark.parametrize("damage", ["empty", "cut", "header", "foreign"])
def test_other_damage(packed, tmp_path, damage):
    path = tmp_path / "a.safetensors"
    packed.save(path)
    content = path.read_bytes()
    if damage == "foreign":
        save_file({"weight": np.zeros(3)}, path)
    else:
        damaged = {"empty": b"", "cut": content[:-1], "header": content.replace(b"pad_id", b"dap_id")}
        path.write_bytes(damaged[damage])
    with pytest.raises(CorruptFileError, match=r"a\.safetensors: not a token data file") as caught:
        TokenDataset.load(path)
    assert caught.value.exit_code == 5


def test_failed_save_leaves_nothing(packed, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="cannot write: File exists"):
        packed.save(tmp_path / "file" / "a.safetensors")
    target = tmp_path / "a.safetensors"
    target.mkdir()
    with pytest.raises(SetupError, match="Is a directory"):
        packed.save(target)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "file"]
