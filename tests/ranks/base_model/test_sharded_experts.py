"""Stacks of quantized experts on several ranks: what each expert has for itself is sharded with its rows."""

import pytest

from tests.support.loading import loaded_fingerprint
from tests.support.quantized_experts import save_act_order, save_bitsandbytes, save_nvfp4, save_one_small_scale


@pytest.mark.parametrize(("world", "engine"), [(2, "zero"), (3, "fsdp")])
@pytest.mark.parametrize("save", [save_nvfp4, save_bitsandbytes, save_one_small_scale, save_act_order])
def test_the_same_base_on_any_number_of_ranks(pools, tmp_path, save, world, engine):
    save(tmp_path)
    alone = pools[1].run(loaded_fingerprint, path=tmp_path, engine_name="replicated", quantization={})
    found = pools[world].run(loaded_fingerprint, path=tmp_path, engine_name=engine, quantization={})
    assert found == alone * world
