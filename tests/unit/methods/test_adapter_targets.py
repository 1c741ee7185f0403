"""Target selection on the real model classes of several families, built on meta from small configs."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dist_qft.config.methods.door import make_method
from dist_qft.methods.adapters.schedule import LinearShape, layer_group, plan_adapters

FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
}
SMALL = dict.fromkeys(("hidden_size", "vocab_size", "max_position_embeddings"), 64) | {
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def linears_of(family: str) -> list[LinearShape]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **FAMILIES[family]))
    return [
        LinearShape(path, module.in_features, module.out_features, next(int(p) for p in path.split(".") if p.isdigit()))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in path.split("."))
    ]


def targets(layers: list[LinearShape], selection: str | list[str]) -> list[str]:
    return list(plan_adapters(make_method(rank=4, targets=selection), layers))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_decoder_linear_of_a_real_model_is_attention_or_mlp(family):
    layers = linears_of(family)
    attention = targets(layers, "attention")
    mlp = targets(layers, ["mlp"])
    everything = targets(layers, "all-linear")
    assert everything == [layer.path for layer in layers]
    assert sorted(attention + mlp) == sorted(everything)
    per_layer = {"gpt_neox": (2, 2), "opt": (4, 2)}.get(family, (4, 3))
    assert (len(attention), len(mlp)) == (2 * per_layer[0], 2 * per_layer[1])


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("transformer.h.0.self_attention.dense", "attention"),
        ("transformer.h.0.mlp.dense_h_to_4h", "mlp"),
        ("model.decoder.layers.0.fc2", "mlp"),
        ("model.layers.1.mlp.experts.7.up_proj", "mlp"),
        ("q_proj", "attention"),
        ("model.layers.0.projector", None),
    ],
)
def test_layer_group(path, group):
    assert layer_group(path) == group
