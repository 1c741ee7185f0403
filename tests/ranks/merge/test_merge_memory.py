"""Rank 0 holds little more than its shard and a layer, while layers are folded and run and while they are written."""

from contextlib import closing

from tests.support.merges import GGUF_RUN, measured_merge
from tests.support.rank_pool import RankPool
from tests.support.tiny_gguf import save_random_gguf

QALORA = {"name": "qalora", "pool": 32, "rank": 4}


def test_rank_0_gathers_one_layer_at_a_time(make_run, tmp_path):
    source = save_random_gguf(tmp_path / "random.gguf", layers=8, hidden=2048, intermediate=8192)
    run = make_run(source, **{**GGUF_RUN, "method": QALORA})
    for target, name in (("gguf", "merged.gguf"), ("quantized", "merged")):
        # Ranks of their own: how a heap grows depends on what has run before.
        with closing(RankPool(2)) as pool:
            found = pool.run(measured_merge, source=run, target=target, path=tmp_path / name)[0]
        assert found["layer"] == 40 * 2**20
        # One layer while it is gathered takes two and a half: its shards, the layer, and the layer as parameters. On a
        # busy machine gloo's thread lets go of the gathered one only while the layer computes.
        assert max(found["probing"], found["writing"]) < 4 * found["layer"] <= found["base"], target
