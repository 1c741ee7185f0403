"""Small models of many families with random weights, frozen, and beside them transformers' own."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma4TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    Llama4TextConfig,
    LlamaConfig,
    MiniCPM3Config,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PhimoeConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
)

from dist_qft.base_model.load import load_base
from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.base_model.sources import SafetensorsSource
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.errors import UserError
from dist_qft.sharding.replicated import ReplicatedEngine

VOCABULARY = 131
COMMON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
GROUPED = {**COMMON, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
WINDOW = 4

FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "mistral": MistralConfig(**GROUPED, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**GROUPED),
    "opt": OPTConfig(**COMMON, ffn_dim=96, max_position_embeddings=64, word_embed_proj_dim=64, dropout=0.1),
    "opt-projected": OPTConfig(
        **COMMON, ffn_dim=96, max_position_embeddings=64, word_embed_proj_dim=32, do_layer_norm_before=False
    ),
    "gemma": GemmaConfig(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, sliding_window=WINDOW, final_logit_softcapping=2.0, query_pre_attn_scalar=16),
    "cohere": CohereConfig(**COMMON, intermediate_size=96, logit_scale=0.25),
    "granite": GraniteConfig(**COMMON, intermediate_size=96, logits_scaling=8.0, embedding_multiplier=3.0),
    "hyperclovax": HyperCLOVAXConfig(**GROUPED, logits_scaling=0.25, embedding_multiplier=3.0),
    "gpt_neox": GPTNeoXConfig(**COMMON, intermediate_size=96, max_position_embeddings=64),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.2),
    "qwen3_moe": Qwen3MoeConfig(**GROUPED, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": DeepseekV3Config(
        **COMMON,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    "gpt_oss": GptOssConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW),
    "gemma4_text": Gemma4TextConfig(
        **GROUPED, sliding_window=WINDOW, hidden_size_per_layer_input=0, num_kv_shared_layers=0
    ),
    "falcon": FalconConfig(**COMMON, alibi=False, new_decoder_architecture=True, num_kv_heads=2),
    "seed_oss": SeedOssConfig(**GROUPED, residual_dropout=0.1),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, n_inner=96, n_positions=64, vocab_size=VOCABULARY),
    "phi": PhiConfig(**COMMON, intermediate_size=96, max_position_embeddings=64),
    # Its router's noise is a threshold in evaluation, too.
    "phimoe": PhimoeConfig(
        **GROUPED, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.1, sliding_window=None
    ),
    "llama4_text": Llama4TextConfig(
        **GROUPED, intermediate_size_mlp=96, num_local_experts=4, num_experts_per_tok=2, interleave_moe_layer_step=2
    ),
    "minicpm3": MiniCPM3Config(
        **COMMON,
        intermediate_size=96,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        dim_model_base=16,
        scale_emb=3,
    ),
}
# Families whose attention transformers has not in SDPA: capped logits, sinks.
WITHOUT_SDPA = ("gemma2", "gpt_oss")
ONE_SAMPLE_A_ROW = ("falcon", "gpt_oss")  # their attention masks do not look at positions
QUANTIZED = {
    "dense": {"linear": "dense", "embedding": "dense"},
    "nf4": {"linear": "nf4", "block": [32], "embedding": "dense"},
    "nf4 twice": {"linear": "nf4", "block": [32], "double_quant": True, "embedding": "q8_0"},
    "affine4": {"linear": "affine4", "block": [8, 4], "embedding": "q8_0"},
}


def save_random(config: PretrainedConfig, folder: Path) -> Path:
    """Every weight and stored buffer random, so that a norm, a bias or a router's correction left out shows."""
    # Attention's implementation is chosen per model and stays in the config: a copy keeps the family's own clean.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
        for name in model.state_dict().keys() & dict(model.named_buffers()).keys():
            buffer = model.get_buffer(name)
            buffer.copy_(torch.randn(buffer.shape, generator=generator).abs() + 0.5)
    model.save_pretrained(folder)
    return folder


def open_base(folder: Path, quantization: dict | None = None, dtype: torch.dtype = torch.float32) -> BaseModel:
    settings = QuantizationConfig(**(quantization or QUANTIZED["dense"]))
    attention = "eager" if folder.name.startswith(WITHOUT_SDPA) else "sdpa"
    base = build_skeleton(ModelConfig(path=str(folder), attention=attention), settings, dtype)
    engine = ReplicatedEngine()
    engine.shard(base.units, torch.device("cpu"))
    load_base(base, SafetensorsSource(folder), engine, torch.device("cpu"))
    return base


def open_packed(folder: Path) -> BaseModel:
    """A folder with weights in other programs' formats, every one held as the floats that it stands for."""
    model = ModelConfig(path=str(folder))
    base = build_skeleton(model, QuantizationConfig(**QUANTIZED["dense"]), torch.float32)
    engine = ReplicatedEngine()
    engine.shard(base.units, torch.device("cpu"))
    load_base(base, open_source(model), engine, torch.device("cpu"))
    return base


def reference_model(base: BaseModel, folder: Path):
    """transformers' own model on the weights that the base's packed tensors stand for."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    state = model.state_dict()
    for path, weight in base.weights().items():
        state[base.library_shape(path)[0]].copy_(base.as_library(path, weight.dequantize()))
    return model


def tokens_of(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    # Away from the families' padding ids, which their attention masks would guess from.
    tokens = torch.randint(3, VOCABULARY - 3, (batch, length), generator=torch.Generator().manual_seed(seed))
    return tokens, torch.arange(length).expand(batch, -1)


@torch.no_grad()
def states_of(folder: Path) -> Tensor:
    return open_base(folder).hidden_states(*tokens_of(1, 8))


def copied(folder: Path, to: Path, tensors: dict[str, Tensor]) -> Path:
    to.mkdir(exist_ok=True)
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, to / "model.safetensors")
    return to


def refused(folder: Path, quantization: dict | None = None) -> str:
    with pytest.raises(UserError) as raised:
        open_base(folder, quantization)
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)
    return str(raised.value)
