"""Settings in a GGUF header that transformers does not read: rotary scaling, head size, tied head.

transformers maps a GGUF file's sizes to a configuration and drops everything about rotary scaling: a Llama 3.1 or a
YaRN model then runs with wrong frequencies, and nobody is told. Here all of it is read, or the file is refused.
"""

import math
from typing import Any

import numpy as np
from transformers import MixtralConfig, PretrainedConfig

from dist_qft.base_model.gguf_header import GgufHeader
from dist_qft.errors import CorruptFileError, UserError

ARCHITECTURES = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe")
ROPE_FACTORS = "rope_freqs.weight"
_SIZES = {
    "block_count": 1000,
    "embedding_length": 1 << 24,
    "feed_forward_length": 1 << 24,
    "attention.head_count": 1 << 16,
    "context_length": (1 << 31) - 1,
}
# Settings that change a model's results and that no supported architecture of transformers has: the values that change
# nothing. llama.cpp takes 0 for a factor that is not set.
_WITHOUT_EFFECT: dict[str, tuple[float, ...]] = {
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "expert_weights_scale": (0, 1),
    "attention.clamp_kqv": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "leading_dense_block_count": (0,),
}
# Settings of configurations, and the layers whose biases they stand for.
_BIASES = {
    "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
}
# YaRN's further settings. Other values than these are refused, because transformers computes with these.
_FIXED_SCALING = {"yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}


def architecture_of(header: GgufHeader) -> str:
    """The architecture of a model that can be read. Raises UserError for another one, CorruptFileError for none."""
    found = header.text("general.architecture")
    if found is None:
        raise CorruptFileError(f"{header.path}: a GGUF file without 'general.architecture'")
    if found not in ARCHITECTURES:
        allowed = ", ".join(ARCHITECTURES)
        raise UserError(f"{header.path}: GGUF architecture '{found}' is not supported (supported: {allowed})")
    return found


def experts_of(header: GgufHeader) -> int:
    """The number of experts in a layer; 0 for a dense model. CorruptFileError if it is out of bounds."""
    return header.number(f"{architecture_of(header)}.expert_count", 0, 1 << 16, default=0)


def check_sizes(header: GgufHeader) -> None:
    """Refuse sizes in the metadata that no model has, before anything is built from them.

    Raises:
        CorruptFileError: a size that is missing, no integer or out of bounds, or layers without tensors.
    """
    prefix = architecture_of(header)
    for key, high in _SIZES.items():
        header.number(f"{prefix}.{key}", 1, high)
    heads = header.metadata[f"{prefix}.attention.head_count"]
    kv_heads = header.number(f"{prefix}.attention.head_count_kv", 1, heads, default=heads)
    if heads % kv_heads:
        raise CorruptFileError(
            f"{header.path}: {heads} attention heads are not a multiple of {kv_heads} key-value heads"
        )
    header.real(f"{prefix}.rope.freq_base")
    if header.real(f"{prefix}.attention.layer_norm_rms_epsilon") is None:
        raise CorruptFileError(f"{header.path}: '{prefix}.attention.layer_norm_rms_epsilon' is missing")
    _require_known_computation(header, prefix)
    _require_whole_vocabulary(header, prefix)
    numbers = {
        int(parts[1]) for name in header.tensors if (parts := name.split("."))[0] == "blk" and parts[1].isdigit()
    }
    blocks = header.metadata[f"{prefix}.block_count"]
    if numbers != set(range(blocks)):
        wrong = min(numbers ^ set(range(blocks)))
        raise CorruptFileError(
            f"{header.path}: '{prefix}.block_count' is {blocks}, and there are "
            f"{'tensors' if wrong in numbers else 'no tensors'} of block {wrong}"
        )


def _require_known_computation(header: GgufHeader, prefix: str) -> None:
    """Refuse settings that would be ignored and change results: UserError."""
    for key, neutral in _WITHOUT_EFFECT.items():
        value = header.metadata.get(f"{prefix}.{key}", neutral[0])
        if value not in neutral:
            raise UserError(f"{header.path}: '{prefix}.{key}': got {value!r}, must be {neutral[-1]} or not set")
    usual = max(1, _head_width(header, prefix)) ** -0.5
    scale = header.metadata.get(f"{prefix}.attention.scale", 0)
    if scale and not (isinstance(scale, float) and math.isclose(scale, usual, rel_tol=1e-3)):
        raise UserError(f"{header.path}: '{prefix}.attention.scale': got {scale!r}, must be {usual:.4g} or not set")


def _head_width(header: GgufHeader, prefix: str) -> int:
    """Numbers in a head's key; 0 if there are more heads than numbers in a state."""
    width = header.metadata[f"{prefix}.embedding_length"] // header.metadata[f"{prefix}.attention.head_count"]
    return header.number(f"{prefix}.attention.key_length", 1, 1 << 16, default=width)


def _require_whole_vocabulary(header: GgufHeader, prefix: str) -> None:
    """Refuse a size of the vocabulary that the embedding has not, before a table of that size is made."""
    embedding = header.tensors.get("token_embd.weight")
    said = header.metadata.get(f"{prefix}.vocab_size")
    if embedding is not None and said is not None and said != embedding.shape[0]:
        raise CorruptFileError(
            f"{header.path}: '{prefix}.vocab_size': got {said!r}, must be {embedding.shape[0]}, the rows of "
            "'token_embd.weight'"
        )


def complete_config(config: PretrainedConfig, header: GgufHeader) -> PretrainedConfig:
    """The configuration that transformers made of the file, with the settings that it left out. Changes `config`."""
    prefix, experts = architecture_of(header), experts_of(header)
    if experts:
        config = _mixture(config, header, prefix, experts)
    config.tie_word_embeddings = "output.weight" not in header.tensors
    head_dim = _head_width(header, prefix)
    if header.number(f"{prefix}.attention.value_length", 1, 1 << 16, default=head_dim) != head_dim:
        raise UserError(f"{header.path}: keys and values of different sizes are not supported")
    if header.number(f"{prefix}.rope.dimension_count", 1, 1 << 16, default=head_dim) != head_dim:
        raise UserError(f"{header.path}: rotary embedding of a part of each head is not supported")
    config.head_dim = head_dim
    # llama.cpp adds the biases that it finds; a Llama's configuration has to say that there are any.
    for setting, biases in _BIASES.items():
        if hasattr(config, setting):
            setattr(config, setting, any(f"blk.0.{bias}.bias" in header.tensors for bias in biases))
    scaling = _scaling(header, prefix, head_dim, _theta(config))
    if scaling:
        config.rope_parameters = {"rope_theta": _theta(config), **scaling}
    return config


def _mixture(config: PretrainedConfig, header: GgufHeader, prefix: str, experts: int) -> PretrainedConfig:
    """The configuration of a mixture. Mixtral's architecture is `llama`, which transformers takes for dense."""
    used = header.number(f"{prefix}.expert_used_count", 1, experts)
    if prefix == "llama":
        known = MixtralConfig().to_dict()
        given = {key: value for key, value in config.to_dict().items() if key in known and key != "model_type"}
        return MixtralConfig(**given | {"num_local_experts": experts, "num_experts_per_tok": used})
    config.num_experts, config.num_experts_per_tok = experts, used
    width = header.metadata[f"{prefix}.feed_forward_length"]
    config.moe_intermediate_size = header.number(
        f"{prefix}.expert_feed_forward_length", 1, 1 << 24, default=max(1, width // used)
    )
    config.mlp_only_layers, config.decoder_sparse_step = [], 1
    config.norm_topk_prob = prefix == "qwen3moe"  # as llama.cpp computes them: no key says it
    if prefix == "qwen2moe":
        config.shared_expert_intermediate_size = header.number(
            f"{prefix}.expert_shared_feed_forward_length", 1, 1 << 24, default=width
        )
    return config


def _theta(config: PretrainedConfig) -> float:
    return float((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0))


def _scaling(header: GgufHeader, prefix: str, head_dim: int, theta: float) -> dict[str, Any]:
    """`rope_parameters` of transformers with the same frequencies as the file means; empty without scaling."""
    kind = header.text(f"{prefix}.rope.scaling.type")
    factor = header.real(f"{prefix}.rope.scaling.factor") or header.real(f"{prefix}.rope.scale_linear")
    for key, usual in _FIXED_SCALING.items():
        value = header.metadata.get(f"{prefix}.rope.scaling.{key}", usual)
        if value != usual:
            raise UserError(f"{header.path}: '{prefix}.rope.scaling.{key}' {value} is not supported, only {usual:g}")
    if ROPE_FACTORS in header.tensors:
        if kind not in (None, "none") and factor not in (None, 1.0):
            raise UserError(f"{header.path}: '{ROPE_FACTORS}' together with rope scaling '{kind}' is not supported")
        return _from_factors(header, prefix, head_dim, theta)
    if factor is None or kind == "none" or (factor == 1.0 and kind != "yarn"):
        return {}
    if kind in (None, "linear"):
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UserError(f"{header.path}: rope scaling '{kind}' is not supported (supported: none, linear, yarn)")
    return _yarn(header, prefix, factor)


def _yarn(header: GgufHeader, prefix: str, factor: float) -> dict[str, Any]:
    context = header.number(f"{prefix}.context_length", 1, (1 << 31) - 1)
    original = header.number(f"{prefix}.rope.scaling.original_context_length", 1, (1 << 31) - 1, default=context)
    parameters: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": header.real(f"{prefix}.rope.scaling.yarn_beta_fast") or 32.0,
        "beta_slow": header.real(f"{prefix}.rope.scaling.yarn_beta_slow") or 1.0,
    }
    if (attention := header.real(f"{prefix}.rope.scaling.attn_factor")) is not None:
        # llama.cpp multiplies by this and by the factor that both programs derive from the scaling.
        parameters["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return parameters


def _from_factors(header: GgufHeader, prefix: str, head_dim: int, theta: float) -> dict[str, Any]:
    """Llama 3.1's scaling comes as the factors by which each frequency is divided."""
    tensor = header.tensors[ROPE_FACTORS]
    if tensor.type != "F32" or tensor.shape != (head_dim // 2,):
        raise CorruptFileError(
            f"{header.path}: '{ROPE_FACTORS}' is {tensor.type} {list(tensor.shape)}, must be F32 [{head_dim // 2}]"
        )
    factors = np.fromfile(tensor.path, "<f4", head_dim // 2, offset=tensor.offset).astype(np.float64)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise CorruptFileError(f"{header.path}: '{ROPE_FACTORS}' holds a value that is not positive")
    if (factors == 1.0).all():
        return {}
    for original in (1 << power for power in range(10, 21)):
        candidate = {"factor": round(float(factors.max()), 4), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        if np.allclose(_llama3_factors(head_dim, theta, original, **candidate), factors, rtol=1e-5):
            return {"rope_type": "llama3", "original_max_position_embeddings": original, **candidate}
    # Any other factors, as they are: the same for short and long texts, and no change of the attention's scale.
    return {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": header.number(f"{prefix}.context_length", 1, (1 << 31) - 1),
    }


def _llama3_factors(
    head_dim: int, theta: float, original: int, factor: float, low_freq_factor: float, high_freq_factor: float
) -> np.ndarray:
    """The divisors of the frequencies that `rope_type: llama3` means (Llama 3.1's own `apply_scaling`)."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(
        wavelength < original / high_freq_factor,
        1.0,
        np.where(wavelength > original / low_freq_factor, factor, between),
    )
