"""The side network beside the real SmolLM2, and what the command line says of one that does not fit."""

import pytest
import torch
import torch.distributed as dist

from tests.support.qst_models import load_whole, perturb, side_network


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_starts_at_the_base_and_generates_with_caches(process_group, smollm2):
    base = load_whole(smollm2, "affine4")
    ids = torch.tensor([[1, 4093, 198, 1780, 314, 253]])
    with torch.no_grad():
        expected = base.model(input_ids=ids).logits
        side = side_network(base, reduction=16, downsample_rank=16)
        assert torch.equal(base.model(input_ids=ids).logits, expected)
    perturb(side)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    cached = base.model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, base.model.generate(ids, use_cache=False, **settings))
    with side.disabled():
        assert not torch.equal(cached, base.model.generate(ids, **settings))


def test_a_reduction_that_does_not_fit_is_one_line_and_exit_code_2(shell, smollm2, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: {tmp_path}/run\nmodel: {{path: {smollm2}}}\nmethod: {{name: qst}}\n")
    line = "error: method.reduction: 20 does not fit hidden_size 576, intermediate_size 1536; nearest: 16 or 24\n"
    assert shell("validate", path, "method.reduction=20") == (2, "", line)
