"""LoRA folders as stock PEFT reads them, on the same base as ours."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dist_qft
from dist_qft.errors import UserError
from dist_qft.merge.verify import run_verify
from dist_qft.merge.writers.lora_twin import equal_lora
from dist_qft.merge.writers.peft_support import lora_rank, require_low_rank
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.methods.adapters.tile_adapter import TileAdapter, exact_dW
from tests.support.merges import merge_run

IDS = torch.tensor([[5, 40, 77, 120, 33, 9, 201, 60, 12, 300]])
NF4 = {"linear": "nf4", "block": [64]}
UNTILED = {"rank": 4, "alpha": 6.0}
SCHEDULE = [{"layers": "mlp", "rank": 8}, {"layers": "q_proj", "depth": [1, 2], "rank": 2, "alpha": 3.0}]
RUNS = {
    "qlora": {"method": {"name": "qlora", **UNTILED}, "quantization": NF4},
    "qbara": {"method": {"name": "qbara", **UNTILED}, "quantization": NF4},
    "qalora": {"method": {"name": "qalora", "rank": 4, "pool": 32, "pool_mode": "sum"}},
    "qahira": {"method": {"name": "qahira", "rank": 4, "pool": 32, "repeat": 1}},
    "qablora": {"method": {"name": "qablora", "rank": 4, "pool": 4, "repeat": 8, "use_rslora": True}},
    "qlora, scheduled": {"method": {"name": "qlora", **UNTILED, "schedule": SCHEDULE}, "quantization": NF4},
}


def stock_model(base: torch.nn.Module, model_path, adapter_path) -> torch.nn.Module:
    """Stock PEFT on a stock model that is given the base's dequantized weights."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    weights = {f"{path}.weight": layer.dequantize() for path, layer in {**base.linears, **base.tables()}.items()}
    unknown = set(weights) - set(model.state_dict())
    assert not unknown
    model.load_state_dict(weights, strict=False)
    return peft.PeftModel.from_pretrained(model, adapter_path).eval()


@pytest.mark.parametrize("case", RUNS)
def test_stock_peft_gives_our_logits(pools, make_run, tiny_llama, tmp_path, case):
    run = make_run(tiny_llama, size=0.1, **RUNS[case])
    certificate = pools[2].run(merge_run, source=run, target="peft", path=tmp_path / "lora")[0]
    tuned = dist_qft.load(run)
    stock = stock_model(tuned.base, tiny_llama, tmp_path / "lora")
    with torch.no_grad():
        logits, bare = stock(IDS).logits, stock.get_base_model()
        stock.disable_adapter_layers()
        without = bare(IDS).logits
    live = tuned.logits(IDS)
    assert (logits - live).abs().max() <= 1e-5 * live.abs().max()
    assert (without - live).abs().max() > 1e-2 * live.abs().max(), "the adapters change nothing"
    assert certificate.lossless and certificate.weights.max_difference < 1e-7


def test_layers_of_other_rank_or_alpha_get_one_of_each(pools, make_run, tiny_llama, tmp_path):
    """vLLM reads one r and one alpha, llama.cpp one alpha and each tensor's rank: all must give the same dW."""
    run = make_run(tiny_llama, **RUNS["qlora, scheduled"])
    pools[1].run(merge_run, source=run, target="peft", path=tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["base_model_name_or_path"] == str(tiny_llama)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for path, adapter in dist_qft.load(run).adapters.by_path.items():
        left, right = (tensors[f"base_model.model.{path}.lora_{name}.weight"].double() for name in "AB")
        assert left.shape[0] == right.shape[1] == config["r"] == 8
        scale = config["lora_alpha"] / left.shape[0]
        torch.testing.assert_close(scale * right @ left, exact_dW(adapter), rtol=1e-6, atol=1e-9)
    assert isinstance(peft.PeftConfig.from_pretrained(tmp_path / "lora"), peft.LoraConfig)


@pytest.mark.parametrize("world", [1, 2])
def test_a_certificate_of_a_merge_aware_run_has_the_difference_that_stock_peft_has(
    pools, make_run, tiny_llama, tmp_path, world
):
    """The live model computes with rounded zeros, PEFT adds dW as it is."""
    method = {"name": "qahira", "rank": 4, "pool": 32, "repeat": 1, "merge_aware": True}
    run = make_run(tiny_llama, quantization={"block": [1, 32]}, method=method)
    certificate = pools[world].run(merge_run, source=run, target="peft", path=tmp_path / "lora")[0]
    tuned, ids = dist_qft.load(run), torch.tensor([certificate.probe])
    with torch.no_grad(), tuned.adapters.disabled():
        stock = stock_model(tuned.base, tiny_llama, tmp_path / "lora")(ids).logits
    difference = float((stock - tuned.logits(ids)).abs().max())
    assert difference > 1e-3 and certificate.logits.maximum == pytest.approx(difference, rel=1e-2)
    assert certificate.weights.rounding_share_of_update > 1e-3
    run_verify(tmp_path / "lora")


@pytest.mark.parametrize(
    ("pool", "repeat", "inner", "rank"), [(1, 1, 4, 4), (2, 2, 8, 8), (32, 1, 4, 4), (32, 1, None, 3), (2, 16, None, 4)]
)
@pytest.mark.parametrize("pool_mode", ["mean", "sum"])
def test_every_adapter_has_an_equal_lora(pool, repeat, inner, rank, pool_mode):
    settings = TileSettings(
        in_features=96, out_features=64, pool=pool, repeat=repeat, inner=inner, rank=4, alpha=7.0, pool_mode=pool_mode
    )
    adapter = TileAdapter(settings)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    lora = equal_lora(adapter)
    assert lora_rank(settings) == rank == lora.A.shape[0] == lora.B.shape[1]
    assert lora.A.shape[1] == 96 and lora.B.shape[0] == 64
    product = lora.settings.alpha / lora.settings.rank * (lora.B.double() @ lora.A.double())
    torch.testing.assert_close(product, exact_dW(adapter), rtol=1e-6, atol=1e-9)


def test_a_rank_that_saves_nothing_is_refused():
    tiles = {"in_features": 96, "out_features": 64, "rank": 4, "alpha": 7.0, "inner": None}
    require_low_rank("q", TileSettings(pool=4, repeat=4, **tiles))
    with pytest.raises(UserError, match=r"^--to peft: dW of q has rank 48, .* 64 x 96 .*method.targets"):
        require_low_rank("q", TileSettings(pool=2, repeat=1, **tiles))
