"""Attention by the borders of samples: against transformers' masks, and what it never makes."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, MistralConfig, PhimoeConfig

from dist_qft.base_model import segment_attention
from dist_qft.base_model.segment_attention import segment_attention as attention
from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.data.segments import Segments
from dist_qft.errors import UserError
from tests.support.families import GROUPED, WITHOUT_SDPA, open_base, reference_model, save_random, tokens_of

LENGTHS = [5, 1, 9, 6]


@pytest.mark.parametrize("window", [None, 4])
def test_packed_rows_give_what_masks_give(tmp_path, window):
    """States and gradients, also where a sliding window cuts a sample into pieces."""
    config = LlamaConfig(**GROUPED) if window is None else MistralConfig(**GROUPED, sliding_window=window)
    base = open_base(save_random(config, tmp_path))
    assert base.segmented
    tokens, _ = tokens_of(2, sum(LENGTHS))
    packed = torch.cat([torch.arange(length) for length in LENGTHS])
    positions = torch.stack([packed, torch.arange(len(packed))])
    found = states_and_gradient(base, tokens, positions)
    base.segmented = False
    segment_attention.choose(base.model, segment_attention.SDPA)
    torch.testing.assert_close(found, states_and_gradient(base, tokens, positions), rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_a_window_that_only_the_mask_has_needs_the_mask(tmp_path):
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    for window, segmented in ((4, False), (None, True)):
        config = PhimoeConfig(**GROUPED, **sizes, sliding_window=window)
        folder = save_random(config, tmp_path / str(window))
        base = open_base(folder)
        assert base.segmented == segmented
        tokens, positions = tokens_of(1, 12)
        expected = reference_model(base, folder)(tokens).logits
        found = base.head(base.hidden_states(tokens, positions))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5)


def states_and_gradient(base: BaseModel, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    offset = torch.zeros(tokens.shape[1], 1, requires_grad=True)
    hook = base.layers[0].register_forward_pre_hook(lambda layer, args: (args[0] + offset, *args[1:]))
    states = base.hidden_states(tokens, positions)
    (gradient,) = torch.autograd.grad(states.sin().sum(), offset)
    hook.remove()
    return states.detach(), gradient


def test_families_whose_attention_is_not_in_the_call_keep_their_masks(tmp_path):
    assert WITHOUT_SDPA  # built for "eager"
    query = torch.randn(1, 2, 6, 8)
    segments = Segments.of(torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(ValueError, match="changed scores"):
        attention(torch.nn.Module(), query, query, query, None, segments=segments, softcap=30.0)
    with pytest.raises(ValueError, match="does not hand on"):
        attention(torch.nn.Module(), query, query, query, segment_attention.arguments(segments)["attention_mask"])


def test_segments_of_positions():
    found = Segments.of(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 1], [0, 1, 2, 3, 4]]))
    assert found.bounds == (0, 3, 5, 7, 8, 10, 15) and found.starts.tolist() == list(found.bounds)
    assert (found.starts.dtype, found.rows, found.longest, found.whole_rows) == (torch.int32, 3, 5, False)
    assert Segments.of(torch.arange(4).expand(2, -1)).whole_rows


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation returned, and the operations that make a host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.waits, self.names = 0, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        self.names.append(name)
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::equal"):
            self.waits.append(name)
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("window", [None, 4096])
def test_a_packed_row_of_32k_tokens_of_an_8b_shape_has_no_square_mask(tmp_path, monkeypatch, window):
    """On meta tensors: no tensor of L x L elements, flash attention in each layer, and nothing that asks for values."""
    monkeypatch.setattr(segment_attention, "_has_flash", lambda query, value: True)
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    shape |= {"num_hidden_layers": 2, "vocab_size": 1000, "head_dim": 128}
    config = LlamaConfig(**shape) if window is None else MistralConfig(**shape, sliding_window=window)
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(tmp_path)
    dense = QuantizationConfig(linear="dense", embedding="dense")
    base = build_skeleton(ModelConfig(path=str(tmp_path)), dense, torch.bfloat16)
    length = 32768
    borders = [0, 700, 6000, 20000, length]
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(borders)])[None]
    segments = Segments.of(positions)
    device = torch.device("meta")
    base.model.to(device)
    with torch.no_grad(), Largest() as seen:
        ids = torch.zeros(1, length, dtype=torch.int64, device=device)
        states = base.hidden_states(ids, positions.to(device), segments.to(device))
    assert (states.shape, states.device) == ((1, length, 4096), device)
    assert seen.waits == []
    assert sum("_varlen_attn" in name for name in seen.names) == 2
    assert seen.elements == length * 14336 < length * length / 2


def test_packing_is_tried_with_the_rows_of_a_micro_batch(tmp_path, monkeypatch):
    """Attention that looks at the positions of a single row alone, as transformers' flash attention does."""
    base = open_base(save_random(LlamaConfig(**GROUPED), tmp_path))
    inner = base.hidden_states

    def one_row_alone(ids: Tensor, positions: Tensor) -> Tensor:
        straight = torch.arange(positions.shape[1]).expand_as(positions)
        return inner(ids, positions if len(ids) == 1 else straight)

    monkeypatch.setattr(base, "hidden_states", one_row_alone)
    base.require_separate_samples(torch.device("cpu"), rows_at_once=1)
    with pytest.raises(UserError, match=r"data\.packing: "):
        base.require_separate_samples(torch.device("cpu"), rows_at_once=4)


def by_sample(q, k, v, starts, _, longest, __, *, scale, window_size, enable_gqa):
    """PyTorch's flash attention for different lengths, slowly: with the arguments that it has since 2.12."""
    assert q.shape[-1] % 8 == 0 and window_size == (-1, 0)
    pieces = []
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        part = (tensor[start:stop].transpose(0, 1)[None] for tensor in (q, k, v))
        found = F.scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=enable_gqa)
        pieces.append(found[0].transpose(0, 1))
    return torch.cat(pieces)


def of_2_11(q, k, v, starts, _, longest, __, *, return_aux=None, scale=None, window_size=(-1, -1)):
    """Fewer heads of keys than of queries need not be told of."""
    grouped = q.shape[1] != k.shape[1]
    return by_sample(q, k, v, starts, _, longest, __, scale=scale, window_size=window_size, enable_gqa=grouped)


def of_2_10(q, k, v, starts, _, longest, __, is_causal=False, return_aux=None):
    raise AssertionError("it has no scale")


@pytest.mark.parametrize("function", [by_sample, of_2_11])
@pytest.mark.parametrize("width", [4, 8, 12])
def test_flash_attention_is_given_heads_of_any_width(monkeypatch, width, function):
    """Its kernels take multiples of 8; heads of a side network may be as narrow as 4. The rest of a head is zeros."""

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    query, key, value = (torch.randn(2, heads, 9, width, dtype=torch.float64) for heads in (4, 2, 2))
    segments = Segments.of(torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5, 0, 1, 2]]))
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=True)
    expected = segment_attention._by_sample(module, query, key, value, segments, None, None)
    found = segment_attention._flash(query, key, value, segments, None, None)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("function", "there"), [(by_sample, True), (of_2_11, True), (of_2_10, False)])
def test_flash_attention_of_a_pytorch_that_has_no_scale_is_not_taken(monkeypatch, function, there):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    query = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 4, 9, 8))
    assert segment_attention._has_flash(query, query) is there
