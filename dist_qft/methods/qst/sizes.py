"""The side network's configuration: the base's own, every width divided by the reduction factor r.

Hidden and feed-forward widths become width / r, and the attention's inner width (heads x head size) inner / r. The
number of heads is kept, as in the released code, while inner / r divides into that many heads of an even size (any
size, if the family has no rotary embedding); otherwise it is the largest number below that does. Key-value heads
are kept with the heads, or become the largest divisor of the new number. Beside a mixture of experts the layers are
dense. Pure arithmetic: no weights, no modules.
"""

import copy
import itertools

from transformers import LlamaConfig, PretrainedConfig

from dist_qft.errors import UserError

_WIDTHS = ("hidden_size", "intermediate_size", "ffn_dim")
_SPREADS = ("initializer_range", "init_std")


def dense_twin(mixture: PretrainedConfig) -> PretrainedConfig:
    """A Llama of the sizes of a mixture of experts, whose feed-forward layers are as wide as what one token passes.

    A small copy of every expert would make the side network as large as the mixture is sparse.
    """
    text = mixture.get_text_config()
    expert_width = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    if isinstance(expert_width, list):
        expert_width = max(expert_width)
    latent = hasattr(text, "kv_lora_rank")  # its head size is that of a part of each head
    return LlamaConfig(
        hidden_size=text.hidden_size,
        intermediate_size=expert_width * (getattr(text, "num_experts_per_tok", None) or 1),
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=None if latent else getattr(text, "num_key_value_heads", None),
        head_dim=None if latent else getattr(text, "head_dim", None),
        max_position_embeddings=text.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": _theta(text)},
        rms_norm_eps=getattr(text, "rms_norm_eps", 1e-6),
        initializer_range=getattr(text, "initializer_range", 0.02),
    )


def _theta(config: PretrainedConfig) -> float:
    rope = getattr(config, "rope_parameters", None) or {}
    by_kind = [part.get("rope_theta") for part in rope.values() if isinstance(part, dict)]  # of attention layers
    return float(rope.get("rope_theta") or next(filter(None, by_kind), 10000.0))


def shrunken_config(base: PretrainedConfig, reduction: int) -> PretrainedConfig:
    """The configuration of a decoder r times narrower than that of `base`, with as many layers.

    Its vocabulary is one token: a side network is given hidden states, never ids. The spread of random weights grows
    by sqrt(r), so that a product over r times fewer inputs keeps its size.

    Raises:
        UserError: r does not fit the base's widths; names the nearest that do.
    """
    text = base.get_text_config()
    attention = _attention(text, reduction)
    if attention is None:
        widths = ", ".join(f"{name} {size}" for name, size in _widths(text).items())
        raise UserError(f"method.reduction: {reduction} does not fit {widths}; nearest: {_nearest(text, reduction)}")
    side = copy.deepcopy(text)
    for key in _WIDTHS:
        if key in vars(side):
            setattr(side, key, getattr(side, key) // reduction)
    heads, key_value_heads, head_dim = attention
    if "query_pre_attn_scalar" in vars(side):  # Gemma2 scales scores by it instead of the head size
        side.query_pre_attn_scalar = max(1, side.query_pre_attn_scalar * head_dim // _head_dim(text))
    side.num_attention_heads = heads
    for key, value in (
        ("num_key_value_heads", key_value_heads),
        ("head_dim", head_dim),
        ("word_embed_proj_dim", side.hidden_size),  # OPT: no projections around the layers
    ):
        if key in vars(side):
            setattr(side, key, value)
    rope = getattr(side, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("mrope_section"):
        side.rope_parameters = rope | {"mrope_section": _sections(rope["mrope_section"], head_dim, _head_dim(text))}
    for key in _SPREADS:
        if key in vars(side):
            setattr(side, key, getattr(side, key) * reduction**0.5)
    side.vocab_size = 1
    side.pad_token_id = side.bos_token_id = side.eos_token_id = None
    side.tie_word_embeddings = True
    return side


def _sections(wide: list[int], head_dim: int, wide_head_dim: int) -> list[int]:
    """The shares of a head's rotary pairs that turn with a token's time, height and width (Qwen2-VL).

    For text the three positions are one number, so only their sum counts.
    """
    ends = [end * head_dim // wide_head_dim for end in itertools.accumulate(wide)]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _widths(config: PretrainedConfig) -> dict[str, int]:
    """Every width that r must divide; attention's inner width is named only where it is not the hidden size."""
    widths = {key: getattr(config, key) for key in _WIDTHS if key in vars(config)}
    inner = config.num_attention_heads * _head_dim(config)
    return widths if inner == config.hidden_size else widths | {"heads x head_dim": inner}


def _attention(config: PretrainedConfig, reduction: int) -> tuple[int, int, int] | None:
    """Heads, key-value heads and head size of the side network; None if r does not divide a width, or no heads fit."""
    if any(size % reduction for size in _widths(config).values()):
        return None
    inner = config.num_attention_heads * _head_dim(config) // reduction
    step = 2 if hasattr(config, "rope_parameters") else 1  # rotary embeddings turn pairs of channels
    for heads in range(config.num_attention_heads, 0, -1):
        if inner % (heads * step) == 0:
            wanted = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            key_value_heads = next(count for count in range(min(wanted, heads), 0, -1) if heads % count == 0)
            return heads, key_value_heads, inner // heads
    return None


def _nearest(config: PretrainedConfig, reduction: int) -> str:
    legal = [r for r in range(2, config.hidden_size // 2 + 1) if _attention(config, r) is not None]
    below = [r for r in legal if r < reduction][-1:]
    above = [r for r in legal if r > reduction][:1]
    return " or ".join(map(str, below + above)) or "none; this base cannot have a side network"
