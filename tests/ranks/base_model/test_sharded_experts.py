"""Stacks of quantized experts on several ranks: what each expert has for itself is sharded with its rows."""

import pytest

from tests.support.loading import loaded_fingerprint
from tests.support.quantized_experts import save_act_order, save_bitsandbytes, save_nvfp4, save_one_small_scale
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import train_losses


@pytest.mark.parametrize(("world", "engine"), [(2, "zero"), (3, "fsdp")])
@pytest.mark.parametrize("save", [save_nvfp4, save_bitsandbytes, save_one_small_scale, save_act_order])
def test_the_same_base_on_any_number_of_ranks(pools, tmp_path, save, world, engine):
    save(tmp_path)
    alone = pools[1].run(loaded_fingerprint, path=tmp_path, engine_name="replicated", quantization={})
    found = pools[world].run(loaded_fingerprint, path=tmp_path, engine_name=engine, quantization={})
    assert found == alone * world


@pytest.mark.parametrize(("save", "engines"), [(save_nvfp4, ["fsdp", "zero"]), (save_act_order, ["fsdp", "zero"])])
def test_adapters_on_such_experts_train_and_merge_alike_on_any_ranks(pools, tmp_path, save, engines):
    """NVFP4 kept with a tensor scale in each row, and act-order quantized again to nf4."""
    save(tmp_path / "base")
    losses = []
    for world, engine in [(1, "replicated"), *((2, engine) for engine in engines)]:
        config = tiny_config(
            tmp_path / "base",
            tmp_path / f"{world}-{engine}",
            quantization={"linear": "auto", "block": None},
            method={"name": "qlora", "rank": 4, "targets": ["all", "experts"]},
            sharding={"engine": engine},
            merge={"at_end": "dense"},
        )
        losses.append(pools[world].run(train_losses, config=config)[0])
        assert (tmp_path / f"{world}-{engine}/merged-dense/model.safetensors").is_file()
    assert losses[0][-1] < losses[0][0]
    assert all(found == pytest.approx(losses[0], rel=1e-4) for found in losses[1:])
