"""The bytes of a merge depend neither on the number of ranks nor on the engine; and ranks stop together."""

from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest

from dist_qft.merge.certificate_file import certificate_path
from tests.support.merges import GGUF_RUN, digests, merge_run

# Blocks so tall that on four ranks some hold no zeros of the key and value layers (32 outputs).
TALL = {
    "quantization": {"linear": "affine4", "block": [16, 2]},
    "method": {"name": "qablora", "pool": 4, "repeat": 16, "rank": 4},
}
QALORA = {
    "quantization": {"linear": "affine4", "block": [1, 32]},
    "method": {"name": "qalora", "pool": 32, "rank": 4},
}
QLORA = {
    "quantization": {"linear": "nf4", "block": [64], "double_quant": True},
    "method": {"name": "qlora", "rank": 4},
}
CASES = {
    "gguf": (GGUF_RUN, "gguf", {}),
    "quantized": (TALL, "quantized", {}),
    "requantized": (QLORA, "quantized", {"requantize": "affine4"}),
    "dense": (QALORA, "dense", {"dtype": "bfloat16"}),
    "peft": (QALORA, "peft", {}),
}


# Engine and ranks of each case, the first the one to equal: every engine and every number of ranks once per case, every
# engine on every number of ranks once.
LAYOUTS = {
    "gguf": [("fsdp", 1), ("fsdp", 4), ("replicated", 2), ("zero", 4)],
    "quantized": [("fsdp", 1), ("fsdp", 4), ("replicated", 2), ("zero", 4)],
    "requantized": [("fsdp", 1), ("fsdp", 2), ("replicated", 4), ("zero", 2)],
    "dense": [("fsdp", 1), ("fsdp", 2), ("replicated", 1), ("zero", 4)],
    "peft": [("fsdp", 1), ("fsdp", 2), ("replicated", 4), ("zero", 1)],
}


def test_the_layouts_are_pairwise():
    engines, worlds = ("fsdp", "replicated", "zero"), (1, 2, 4)
    assert set().union(*LAYOUTS.values()) == set(product(engines, worlds))
    for layouts in LAYOUTS.values():
        assert {engine for engine, _ in layouts} == set(engines) and {world for _, world in layouts} == set(worlds)


@pytest.mark.parametrize("case", CASES)
def test_every_world_and_engine_writes_the_same_bytes(pools, make_run, tiny_llama, tiny_gguf, tmp_path, case):
    sections, target, options = CASES[case]
    model = tiny_gguf if target == "gguf" else tiny_llama
    found, certificates, runs = {}, {}, {}
    for engine, world in LAYOUTS[case]:
        if engine not in runs:
            runs[engine] = make_run(model, **sections, sharding={"engine": engine})
        path = tmp_path / f"{engine}-{world}" / ("result.gguf" if target == "gguf" else "result")  # cards have the name
        path.parent.mkdir()
        results = pools[world].run(merge_run, source=runs[engine], target=target, path=path, **options)
        certificates[engine, world] = results[0]
        found[engine, world] = digests(path)
        assert results[1:] == [None] * (world - 1)
        assert certificate_path(path).is_file()
    assert len(found["fsdp", 1]) >= (1 if target == "gguf" else 2)
    assert all(other == found["fsdp", 1] for other in found.values()), f"{case}: results differ"
    first = certificates["fsdp", 1]
    for other in certificates.values():
        assert asdict(other.weights) == pytest.approx(asdict(first.weights), rel=1e-9)
        assert other.logits.maximum == pytest.approx(first.logits.maximum, rel=1e-2)


def test_layers_left_gathered_are_merged_all_the_same(pools, make_run, tiny_gguf, gguf_run, tmp_path):
    """With reshard_after_forward off, the probe leaves every layer whole on every rank."""
    run = make_run(tiny_gguf, **GGUF_RUN, sharding={"reshard_after_forward": False})
    kept, freed = tmp_path / "kept.gguf", tmp_path / "freed.gguf"
    certificate = pools[2].run(merge_run, source=run, target="gguf", path=kept)[0]
    pools[2].run(merge_run, source=gguf_run, target="gguf", path=freed)
    assert kept.read_bytes() == freed.read_bytes()
    assert certificate.logits.maximum < 0.05


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_on_any_rank_stops_all_and_leaves_nothing(pools, gguf_run, tmp_path, rank):
    target = tmp_path / "merged.gguf"
    with pytest.raises(AssertionError) as failure:
        pools[2].run(merge_run, source=gguf_run, target="gguf", path=target, stop_on=rank)
    told = f"Preempted: stopped by a signal; '{target}' was not written, run the merge again"
    assert str(failure.value).count(told) == 2
    assert list(Path(tmp_path).iterdir()) == []
