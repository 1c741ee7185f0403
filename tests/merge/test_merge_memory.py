"""Rank 0 never holds much more than its shard and one layer while a result is written."""

import pytest
from merges import GGUF_RUN, measured_merge
from tiny_gguf import save_random_gguf

QALORA = {"name": "qalora", "pool": 32, "repeat": None, "rank": 4}


@pytest.mark.parametrize("target", ["gguf", "quantized"])
def test_rank_0_gathers_one_layer_at_a_time(pools, make_run, tmp_path, target):
    source = save_random_gguf(tmp_path / "random.gguf", layers=10, hidden=1024, intermediate=4096)
    run = make_run(source, **{**GGUF_RUN, "method": QALORA})
    path = tmp_path / ("merged.gguf" if target == "gguf" else "merged")
    found = pools[2].run(measured_merge, source=run, target=target, path=path)[0]
    assert found["layer"] == 10 * 2**20
    assert found["writing"] <= 3 * found["layer"] < found["base"], "the other rank's shard would show"
