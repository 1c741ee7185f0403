"""Packing is refused for decoders that let a sample change the next one, whatever their dtype, and for no others."""

import pytest
import torch
from torch import Tensor
from transformers import FalconH1Config, Lfm2Config, LlamaConfig

from dist_qft.errors import UserError
from tests.support.families import FAMILIES, GROUPED, ONE_SAMPLE_A_ROW, open_base, save_random

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DENSE = {"linear": "dense", "embedding": "dense"}
CARRY_A_STATE = {
    "lfm2": Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "falcon_h1": FalconH1Config(
        **GROUPED, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=8
    ),
}


@pytest.mark.parametrize("family", ONE_SAMPLE_A_ROW)
def test_packing_is_refused_where_masks_know_no_samples(folder_of, family):
    with pytest.raises(UserError, match="cannot keep packed samples apart"):
        open_base(folder_of(family)).require_separate_samples(CPU)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("family", CARRY_A_STATE)
def test_packing_is_refused_where_layers_carry_a_state_along_the_row(tmp_path, family, dtype):
    """Little of it comes through in a model with small weights: less than 16 bits resolve of the largest state."""
    base = open_base(save_random(CARRY_A_STATE[family], tmp_path), DENSE, dtype)
    with torch.no_grad():
        for layer in base.layers:
            for parameter in layer.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(0.6)
    with pytest.raises(UserError) as raised:
        base.require_separate_samples(CPU)
    text = f"data.packing: model type '{family}' cannot keep packed samples apart; set it to false"
    assert (str(raised.value), raised.value.exit_code) == (text, 2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ONE_SAMPLE_A_ROW])
def test_packing_is_no_matter_of_the_dtype(folder_of, family, dtype):
    open_base(folder_of(family), DENSE, dtype).require_separate_samples(CPU, rows_at_once=1)


@pytest.mark.parametrize("kind", ["compressed_sparse_attention", "heavily_compressed_attention", "minimax_m3_sparse"])
def test_packing_is_refused_where_layers_attend_to_blocks_of_the_row(folder_of, kind):
    """They mix samples in rows of many blocks only, so their kind has to say it."""
    base = open_base(folder_of("llama"))
    base.config.layer_types = ["full_attention", kind]
    with pytest.raises(UserError, match="cannot keep packed samples apart"):
        base.require_separate_samples(CPU)


def test_noise_is_no_leak(tmp_path, monkeypatch):
    """A token may be rounded by the tokens before it in the batch, as grouped experts on GPUs do."""
    base = open_base(save_random(LlamaConfig(**GROUPED), tmp_path))
    inner = base.hidden_states

    def rounded_by_others(ids: Tensor, positions: Tensor, mixed: float = 0.0) -> Tensor:
        states = inner(ids, positions)
        before = (ids.flatten().cumsum(0) * 0.618).frac().view(*ids.shape, 1)
        leak = mixed * ids[:, :1, None] / base.vocab_size * (positions.diff(dim=1) < 0).any()
        return states * (1 + 1e-3 * before + leak)

    monkeypatch.setattr(base, "hidden_states", rounded_by_others)
    base.require_separate_samples(CPU)
    monkeypatch.setattr(base, "hidden_states", lambda ids, positions: rounded_by_others(ids, positions, 0.1))
    with pytest.raises(UserError, match="cannot keep packed samples apart"):
        base.require_separate_samples(CPU)


def test_states_that_are_not_finite_are_no_leak(tmp_path, monkeypatch):
    base = open_base(save_random(LlamaConfig(**GROUPED), tmp_path))
    inner = base.hidden_states
    monkeypatch.setattr(base, "hidden_states", lambda ids, positions: inner(ids, positions) * float("inf"))
    base.require_separate_samples(CPU)
