"""Rank 0 holds little more than its shard and a layer, while layers are folded and run and while they are written."""

from contextlib import closing

import pytest

from tests.support.merges import GGUF_RUN, measured_merge
from tests.support.rank_pool import RankPool
from tests.support.tiny_gguf import save_random_gguf

QALORA = {"name": "qalora", "pool": 32, "rank": 4}


@pytest.mark.parametrize("target", ["gguf", "quantized"])
def test_rank_0_gathers_one_layer_at_a_time(make_run, tmp_path, target):
    source = save_random_gguf(tmp_path / "random.gguf", layers=8, hidden=2048, intermediate=8192)
    run = make_run(source, **{**GGUF_RUN, "method": QALORA})
    path = tmp_path / ("merged.gguf" if target == "gguf" else "merged")
    # Ranks of their own: how a heap grows depends on what other tests have left in it.
    with closing(RankPool(2)) as pool:
        found = pool.run(measured_merge, source=run, target=target, path=path)[0]
    assert found["layer"] == 40 * 2**20
    # One layer while it is gathered takes two and a half: its shards, the layer, and the layer as parameters. On a busy
    # machine gloo's thread lets go of the gathered one only while the layer computes.
    assert max(found["probing"], found["writing"]) < 4 * found["layer"] <= found["base"], "another's shard would show"
