"""A warning where one sample decides the rotary frequencies of the others of its micro-batch."""

import pytest
from transformers import LlamaConfig, Phi3Config

from dist_qft.base_model.family import rope_warnings
from tests.support.families import GROUPED

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LENGTHS = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (Phi3Config(**GROUPED, **LENGTHS, rope_parameters=LONG, pad_token_id=0), 16),
        (LlamaConfig(**GROUPED, max_position_embeddings=32, rope_parameters=DYNAMIC), 32),
        (LlamaConfig(**GROUPED, max_position_embeddings=32), None),
    ],
    ids=["longrope", "dynamic", "default"],
)
def test_samples_longer_than_the_original_positions(config, limit):
    assert rope_warnings(config, limit or 32) == []
    found = rope_warnings(config, (limit or 32) + 1)
    start = f"data.max_length: {(limit or 32) + 1} is more than the {limit} original positions"
    assert [line.startswith(start) for line in found] == ([] if limit is None else [True])
