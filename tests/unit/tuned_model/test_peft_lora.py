"""PEFT folders as starting values: their scales are those of stock PEFT, and other adapters than LoRA are refused."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from dist_qft.config.methods.door import make_method
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.methods.adapters.adapter_spec import AdapterSpec
from dist_qft.methods.adapters.schedule import LinearShape, plan_adapters
from dist_qft.methods.adapters.token_rows import TrainedTokens
from dist_qft.tuned_model.peft_lora import read_peft_lora

FOLDER, SIZE, RANK = Path("lora"), 16, 4


class Model(nn.Module):
    """Linear layers under the names that a decoder has them."""

    def __init__(self) -> None:
        super().__init__()
        block = lambda: nn.ModuleDict({name: nn.Linear(SIZE, SIZE) for name in ("q_proj", "v_proj", "o_proj")})  # noqa: E731
        self.model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"self_attn": block()}) for _ in range(12))})


def stock(**settings: Any) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, float]]:
    """The config and tensors of a stock PEFT LoRA with random pairs, and PEFT's scale of each layer."""
    config = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["q_proj", "v_proj", "o_proj"], **settings)
    model = peft.get_peft_model(Model(), config)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    layers = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "scaling")}
    scales = {name: layer.scaling["default"] for name, layer in layers.items()}
    return config.to_dict(), peft.get_peft_model_state_dict(model), scales


def spec() -> AdapterSpec:
    names = [name for name, module in Model().named_modules() if isinstance(module, nn.Linear)]
    shapes = [LinearShape(name, SIZE, SIZE, int(name.split(".")[2]), None) for name in names]
    return AdapterSpec(plan_adapters(make_method(name="qlora", rank=RANK, alpha=10.0), shapes))


PATTERNS = {
    "a suffix": {"q_proj": 20},
    "a path": {"model.layers.3.self_attn.v_proj": 20},
    "several layers": {r"layers\.(0|1|10)\.self_attn\.[qv]_proj": 20, "q_proj": 3},
    "from the beginning": {"^model.layers.0.self_attn.k_proj|^model.layers.0.self_attn.q_proj": 20},
    "any letter": {"layers.1..self_attn.q_proj": 20},
    "part of a name": {"_proj": 20},
    "the first of two": {".*v_proj": 3, "v_proj": 20},
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_scales_of_patterns_are_those_of_peft(pattern, rslora):
    config, tensors, scales = stock(alpha_pattern=pattern, use_rslora=rslora)
    assert pattern == {"_proj": 20} or len(set(scales.values())) > 1, "the pattern is for no layer"
    ours = spec()
    found, _ = read_peft_lora(FOLDER, config, tensors, ours)
    for path, scale in scales.items():
        theirs = tensors[f"base_model.model.{path}.lora_B.weight"] * scale
        torch.testing.assert_close(found[f"{path}.B"] * ours.tiles[path].scale, theirs, rtol=1e-6, atol=0)
        assert torch.equal(found[f"{path}.A"], tensors[f"base_model.model.{path}.lora_A.weight"])


@pytest.mark.parametrize("pattern", [{"q_proj(": 20}, ["q_proj"], {"q_proj": "many"}], ids=str)
def test_patterns_that_make_no_sense(pattern):
    config, tensors, _ = stock()
    with pytest.raises(CorruptFileError, match=r"^adapter_config\.json: (alpha_pattern|lora_alpha) is "):
        read_peft_lora(FOLDER, {**config, "alpha_pattern": pattern}, tensors, spec())


@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new"])
def test_pairs_of_a_changed_base_are_refused(begun):
    config, tensors, _ = stock()
    with pytest.raises(UserError, match=rf"^method\.init_from: lora: init_lora_weights is '{begun}'"):
        read_peft_lora(FOLDER, {**config, "init_lora_weights": begun}, tensors, spec())


@pytest.mark.parametrize("begun", [True, False, "gaussian", "eva", "orthogonal"])
def test_pairs_of_the_base_as_it_is(begun):
    config, tensors, _ = stock()
    assert read_peft_lora(FOLDER, {**config, "init_lora_weights": begun}, tensors, spec())[0]


@pytest.mark.parametrize(
    ("key", "value"), [("alora_invocation_tokens", [1, 2]), ("lora_bias", True), ("use_dora", True), ("bias", "all")]
)
def test_features_that_our_lora_lacks(key, value):
    config, tensors, _ = stock()
    with pytest.raises(UserError, match=rf"^method\.init_from: lora: it uses {key}, which qlora has not"):
        read_peft_lora(FOLDER, {**config, key: value}, tensors, spec())


def test_weights_that_lie_the_other_way_round_have_the_same_pairs():
    """PEFT notes of GPT-2's layers that they do."""
    config, tensors, _ = stock()
    plain, turned = (
        read_peft_lora(FOLDER, {**config, "fan_in_fan_out": way}, tensors, spec())[0] for way in (False, True)
    )
    assert plain.keys() == turned.keys() and all(torch.equal(plain[name], turned[name]) for name in plain)


def test_a_list_of_tokens_is_of_the_embedding_whatever_its_name():
    config, tensors, _ = stock()
    table, ids = "transformer.wte", (3, 7)
    ours = AdapterSpec(spec().tiles, tokens=TrainedTokens(ids, (None, None), {table: SIZE}, tied=True))
    rows = {f"base_model.model.{table}.token_adapter.trainable_tokens_delta": torch.randn(2, SIZE)}
    found = read_peft_lora(FOLDER, {**config, "trainable_token_indices": [7, 3]}, {**tensors, **rows}, ours)[1]
    assert torch.equal(found[table], next(iter(rows.values()))[[1, 0]])
