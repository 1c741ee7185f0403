"""The positional digest against its definition in Python's unbounded integers, and what it must notice."""

from itertools import pairwise

import pytest
import torch

from dist_qft.ranks import digest
from dist_qft.ranks.digest import positional_digest

DTYPES = [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.float64]
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_bits(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bit pattern, NaNs and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (count * size,), dtype=torch.uint8, generator=generator).view(dtype)


def flip_bit(tensor: torch.Tensor, bit: int) -> torch.Tensor:
    flipped = tensor.clone()
    flipped.view(torch.uint8)[bit // 8] ^= 1 << bit % 8
    return flipped


def defined(tensor: torch.Tensor, start: int = 0) -> int:
    multiplier = 0x9E3779B97F4A7C15
    words = tensor.view(WORDS[tensor.element_size()]).tolist()
    total = sum((word + 1) * (((start + i) * multiplier % 2**64) | 1) for i, word in enumerate(words)) % 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_definition_and_untouched_input(dtype):
    values = random_bits(50, dtype)
    before = values.clone()
    assert positional_digest(values).item() == defined(values)
    assert positional_digest(values, start=7).item() == defined(values, 7)
    assert torch.equal(values.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_parts_add_up_whatever_the_chunk(monkeypatch, dtype, chunk):
    monkeypatch.setattr(digest, "_CPU_CHUNK", chunk)
    values = random_bits(100, dtype)
    whole = positional_digest(values.view(4, 25))
    for cuts in ([0, 100], [0, 1, 40, 100], [0, 33, 33, 100]):
        parts = [positional_digest(values[a:b], start=a) for a, b in pairwise(cuts)]
        assert sum(parts, torch.zeros((), dtype=torch.int64)) == whole


def test_a_thousand_random_bit_flips_are_seen():
    values = random_bits(5000, torch.float32)
    reference = positional_digest(values)
    bits = torch.randint(0, values.numel() * 32, (1000,), generator=torch.Generator().manual_seed(1)).tolist()
    missed = [bit for bit in bits if positional_digest(flip_bit(values, bit)) == reference]
    assert missed == []


def test_order_length_and_the_sign_of_zero_count():
    values = torch.tensor([1.0, 2.0, 3.0])
    same = positional_digest(values)
    assert positional_digest(torch.tensor([2.0, 1.0, 3.0])) != same
    assert positional_digest(torch.tensor([0.0])) != positional_digest(torch.tensor([-0.0]))
    assert positional_digest(torch.zeros(3)) != positional_digest(torch.zeros(4))
    assert positional_digest(torch.arange(6).view(2, 3).T) == positional_digest(torch.tensor([[0, 3], [1, 4], [2, 5]]))
