"""Answers of a sharded base, gathered for each token or once."""

from contextlib import nullcontext

import torch

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.sharding.engine import Engine


def greedy_answer(base: BaseModel) -> list[int]:
    """The ids of a prompt and of three tokens behind it."""
    tokens = torch.tensor([[1, 2, 3]])
    found = base.model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False)
    return found[0].tolist()


def require_same_gathered_once(base: BaseModel, engine: Engine) -> None:
    """Assert that an answer is the same with the base gathered once for all tokens, and that it is freed behind it."""
    bytes_of: list[int] = []
    answers = []
    for context in (nullcontext(), engine.gathered_once(), nullcontext()):
        before = engine.traffic.gathered_bytes
        with context:
            answers.append(greedy_answer(base))
        bytes_of.append(engine.traffic.gathered_bytes - before)
    assert answers[0] == answers[1] == answers[2]
    assert bytes_of[0] == bytes_of[2] > 2 * bytes_of[1] > 0, bytes_of
