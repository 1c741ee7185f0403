"""Sizes and counts of side networks, from shapes alone: the paper's percentages, head counts, what does not fit."""

import json
from functools import cache
from typing import Any

import pytest
from transformers import (
    DeepseekV3Config,
    GemmaConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLTextConfig,
)

from dist_qft.config.load import load_config
from dist_qft.errors import UserError
from dist_qft.methods.qst.sizes import dense_twin, shrunken_config
from dist_qft.plan import make_plan


def llama(hidden: int, ffn: int, layers: int, heads: int, key_value_heads: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
    )


def opt(hidden: int, layers: int) -> OPTConfig:
    sizes = {"hidden_size": hidden, "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden}
    return OPTConfig(num_hidden_layers=layers, num_attention_heads=32, **sizes)


LLAMA_7B = llama(4096, 11008, 32, 32, 32)
LLAMA_13B = llama(5120, 13824, 40, 40, 40)
LLAMA_70B = llama(8192, 28672, 80, 64, 8)
SMOLLM2 = llama(576, 1536, 30, 9, 3)
QWEN3 = Qwen3Config(hidden_size=1024, intermediate_size=3072, num_attention_heads=16, head_dim=128)
GEMMA = GemmaConfig(hidden_size=2048, intermediate_size=16384, num_attention_heads=8, num_key_value_heads=1)


def test_the_shares_of_rotary_pairs_shrink_with_the_head():
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "head_dim": 128}
    side = shrunken_config(Qwen3VLTextConfig(**sizes, rope_parameters=rope), 8)
    assert side.head_dim == 16
    assert side.rope_parameters["mrope_section"] == [2, 3, 3]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    @cache  # a plan of 80 layers takes seconds
    def plan_of(model: str, overrides: tuple[str, ...], world_size: int) -> dict[str, Any]:
        tmp_path = tmp_path_factory.mktemp("plan")
        (tmp_path / "config.json").write_text(model)
        path = tmp_path / "run.yaml"
        path.write_text(f"output_dir: {tmp_path}/out\nmodel: {{path: {tmp_path}}}\nmethod: {{name: qst}}\n")
        return make_plan(load_config(path, overrides), world_size).to_dict()

    def plan_with(model: PretrainedConfig, *overrides: str, world_size: int = 1) -> dict[str, Any]:
        return plan_of(json.dumps(model.to_dict()), overrides, world_size)

    return plan_with


def count_of(plan, model: PretrainedConfig, *overrides: str) -> int:
    """The trainable parameters of a model, from plans of its first two and three layers: many layers take seconds."""
    two, three = (
        plan(type(model).from_dict(model.to_dict() | {"num_hidden_layers": layers}), *overrides)["trainable_parameters"]
        for layers in (2, 3)
    )
    return two + (model.num_hidden_layers - 2) * (three - two)


@pytest.mark.parametrize(
    "model, downsample, millions",
    [
        (LLAMA_7B, "adapter", "28.62"),
        (LLAMA_7B, "linear", "59.9"),
        (LLAMA_7B, "maxpool", "26.4"),
        (LLAMA_13B, "adapter", "54.8"),
        (LLAMA_70B, "adapter", "282.9"),
    ],
)
def test_llama_counts(plan, model, downsample, millions):
    count = count_of(plan, model, f"method.downsample={downsample}")
    digits = len(millions.partition(".")[2])
    assert f"{count / 1e6:.{digits}f}" == millions


@pytest.mark.parametrize("hidden, layers, nominal, percent", [(2048, 24, 1.3e9, 0.45), (2560, 32, 2.7e9, 0.43)])
def test_opt_counts(plan, hidden, layers, nominal, percent):
    assert round(100 * count_of(plan, opt(hidden, layers)) / nominal, 2) == percent


def test_opt_6b7_is_within_the_papers_rounding(plan):
    assert 0.42 <= 100 * count_of(plan, opt(4096, 32)) / 6.7e9 <= 0.43


def test_every_layer_adds_the_same_count(plan):
    assert plan(LLAMA_7B)["trainable_parameters"] == count_of(plan, LLAMA_7B)


def test_downsample_share_of_table_6(plan):
    """Products of the downsample against all: 7.8 % for the adapter, 56.0 % for linear."""
    adapter = plan(LLAMA_7B)
    assert round(100 * 32 * 16 * (4096 + 256) / adapter["trainable_parameters"], 1) == 7.8
    linear = plan(LLAMA_7B, "method.downsample=linear")
    assert (
        round(100 * linear["trainable_parameters_by_layer_type"]["downsamples"] / linear["trainable_parameters"]) == 56
    )


def test_the_plan_adds_up(plan):
    result = plan(SMOLLM2, world_size=2)
    parts = result["trainable_parameters_by_layer_type"]
    assert list(parts) == ["gates", "downsamples", "layers", "norm", "upsample", "alpha"]
    assert sum(parts.values()) == result["trainable_parameters"]
    by_depth = result["trainable_parameters_by_depth"]
    assert len(by_depth) == 30
    assert len(set(by_depth)) == 1
    assert sum(by_depth) == parts["downsamples"] + parts["layers"]
    assert [row["part"] for row in result["adapters"]] == list(parts)
    assert result["reduce_bytes_per_step"] == 4 * result["trainable_parameters"]


@pytest.mark.parametrize(
    "base, reduction, heads, key_value_heads, head_dim",
    [
        (LLAMA_7B, 16, 32, 32, 8),
        (LLAMA_70B, 16, 64, 8, 8),
        (SMOLLM2, 16, 9, 3, 4),
        (SMOLLM2, 64 // 2, 9, 3, 2),
        (SMOLLM2, 48, 6, 3, 2),  # 12 channels: 9 heads do not divide them, 6 of 2 do
        (Qwen3Config(hidden_size=1024, intermediate_size=3072, num_attention_heads=16, head_dim=128), 16, 16, 16, 8),
        (
            GemmaConfig(hidden_size=2048, intermediate_size=16384, num_attention_heads=8, num_key_value_heads=1),
            16,
            8,
            1,
            16,
        ),
    ],
)
def test_heads_are_kept_where_they_divide(base, reduction, heads, key_value_heads, head_dim):
    side = shrunken_config(base, reduction)
    assert side.hidden_size == base.hidden_size // reduction
    assert (side.num_attention_heads, side.num_key_value_heads, side.head_dim) == (heads, key_value_heads, head_dim)


def test_opt_needs_no_even_heads():
    assert shrunken_config(opt(2560, 32), 16).num_attention_heads == 32  # of 5 channels each


@pytest.mark.parametrize(
    "base, reduction, message",
    [
        (SMOLLM2, 7, "7 does not fit hidden_size 576, intermediate_size 1536; nearest: 6 or 8"),
        (SMOLLM2, 500, "500 does not fit hidden_size 576, intermediate_size 1536; nearest: 96"),
        (LLAMA_7B, 32 * 43, "1376 does not fit hidden_size 4096, intermediate_size 11008; nearest: 256"),
        (LlamaConfig(hidden_size=1024, head_dim=96), 3, "heads x head_dim 3072; nearest: 2 or 4"),
    ],
)
def test_reductions_that_do_not_fit(base, reduction, message):
    with pytest.raises(UserError) as refusal:
        shrunken_config(base, reduction)
    assert str(refusal.value).startswith("method.reduction: ")
    assert message in str(refusal.value)
    assert refusal.value.exit_code == 2


@pytest.mark.parametrize(
    ("mixture", "feed_forward", "heads", "theta"),
    [
        (MixtralConfig(), 2 * 14336, (32, 8, 128), 1e6),
        (
            Qwen3MoeConfig(moe_intermediate_size=768, head_dim=128),
            8 * 768,
            (32, 4, 128),
            10000.0,
        ),
        (DeepseekV3Config(), 8 * 2048, (128, 128, 56), 10000.0),  # latent attention: heads share the hidden size
        (GptOssConfig(), 4 * 2880, (64, 8, 64), 150000.0),
    ],
    ids=lambda part: part.model_type if isinstance(part, PretrainedConfig) else "",
)
def test_side_layers_of_a_mixture_are_dense_and_as_wide_as_a_token_passes(mixture, feed_forward, heads, theta):
    twin = dense_twin(mixture)
    assert (twin.num_hidden_layers, twin.hidden_size) == (mixture.num_hidden_layers, mixture.hidden_size)
    assert twin.intermediate_size == feed_forward
    assert (twin.num_attention_heads, twin.num_key_value_heads, twin.head_dim) == heads
    assert twin.rope_parameters["rope_theta"] == theta
    side = shrunken_config(twin, 16)
    assert (side.hidden_size, side.intermediate_size) == (mixture.hidden_size // 16, feed_forward // 16)
