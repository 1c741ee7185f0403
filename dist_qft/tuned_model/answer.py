"""Answers to prompts, through Hugging Face's `generate`: greedy or sampled, several prompts at a time."""

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from dist_qft.base_model.eval_mode import eval_mode
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.schema import EvaluationConfig
from dist_qft.errors import Preempted, UserError
from dist_qft.ranks.preemption import StopSignal
from dist_qft.tuned_model.prompts import Messages, prompt_ids, stop_ids

_BATCH = 16  # prompts that are answered together
_PADDING_COUNTS = ("minimax", "rwkv")  # model types whose states padding on the left changes
_CHANNEL, _SAID = "<|channel|>", "<|message|>"  # of gpt-oss: the header of each part of an answer, up to its text


@dataclass(frozen=True)
class Sampling:
    """The settings by which the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; higher values flatten the distribution.
        top_p: smallest set of tokens with this probability; 1 is all.
        top_k: number of likeliest tokens; 0 is all.
        seed: of the random choices; the same seed gives the same text.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more, and finite"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "seed": (0 <= self.seed < 2**63, "0 or more, and below 2^63"),
        }
        for name, (good, allowed) in ranges.items():
            if not good:
                raise UserError(f"{name}: got {getattr(self, name)}, must be {allowed}")
        if self.temperature == 0 and (self.top_p != 1 or self.top_k != 0):
            raise UserError("top_p, top_k: no effect with temperature 0; give a temperature above 0")

    def arguments(self) -> dict[str, Any]:
        """The choice in the words of `generate`."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            chosen |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return chosen


def longest_sequence(base: BaseModel) -> int | None:
    """The tokens of prompt and answer together for which the model has positions; None if it names no limit."""
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def require_room(
    base: BaseModel, lengths: Sequence[int], max_new_tokens: int, keys: tuple[str, str] = ("prompt", "max_new_tokens")
) -> None:
    """Refuse empty prompts, and answers for which the model has no positions left.

    Beyond them learned positions end with an error, others with nonsense.

    Args:
        lengths: tokens of each prompt.
        keys: the settings that give the prompts and `max_new_tokens`.

    Raises:
        UserError: a prompt has no token, or the longest prompt and its answer are longer than `longest_sequence`.
    """
    if 0 in lengths:
        raise UserError(f"{keys[0]}: got '', 0 tokens as this tokenizer writes no BOS, must have at least 1 token")
    limit = longest_sequence(base)
    if limit is None or not lengths or max(lengths) + max_new_tokens <= limit:
        return
    prompt = max(lengths)
    if prompt >= limit:
        raise UserError(f"{keys[0]}: got {prompt} tokens, must be fewer than the model's {limit}")
    raise UserError(
        f"{keys[1]}: got {max_new_tokens}, must be at most {limit - prompt}: "
        f"the longest prompt has {prompt} of the model's {limit} tokens"
    )


def require_room_for_answers(
    evaluation: EvaluationConfig, base: BaseModel, tokenizer: PreTrainedTokenizerBase, today: datetime.date | None
) -> None:
    """`require_room` for the prompts that a run answers."""
    lengths = [len(prompt_ids(tokenizer, prompt, today)) for prompt in evaluation.prompts]
    keys = ("evaluation.prompts", "evaluation.max_new_tokens")
    require_room(base, lengths, evaluation.max_new_tokens, keys)


@torch.no_grad()
def answers(
    base: BaseModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    sampling: Sampling,
    device: torch.device,
    today: datetime.date | None = None,
    streamer: Any = None,
    stop: StopSignal | None = None,
) -> list[str]:
    """One answer for each prompt: text (a user's turn if the tokenizer has a chat template), or a conversation.

    Prompts are answered in left-padded batches, whose greedy answers in float32 are those of the prompts alone. Of an
    answer in channels (gpt-oss) the text is that of the last one, which is the user's.
    Adapters should be in eval mode. Collective: every rank must call it with the same arguments, since a sharded base
    is gathered for each token.

    Args:
        today: the date for chat templates that print it (`data.date`); None takes the day of this call.
        streamer: of transformers, for a single prompt; gets tokens as they come.
        stop: asked after each token.

    Raises:
        UserError: see `require_room`.
        Preempted: some rank was asked to `stop`.
    """
    ids = [prompt_ids(tokenizer, prompt, today) for prompt in prompts]
    require_room(base, [len(row) for row in ids], sampling.max_new_tokens)
    found: list[str] = []
    size = 1 if base.config.get_text_config().model_type in _PADDING_COUNTS else _BATCH
    with eval_mode(base.model):
        for start in range(0, len(prompts), size):
            found += _answer_batch(base, tokenizer, ids[start : start + size], sampling, device, streamer, stop)
    return found


def _answer_batch(
    base: BaseModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    sampling: Sampling,
    device: torch.device,
    streamer: Any,
    stop: StopSignal | None,
) -> list[str]:
    stops = stop_ids(base.model.generation_config.eos_token_id, tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    ids, mask = _left_padded(encoded, padding)
    several = dist.is_initialized() and dist.get_world_size() > 1
    generate: Any = base.model.generate
    with _seeded(sampling, device):
        output = generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            eos_token_id=stops or None,
            pad_token_id=padding,
            synced_gpus=several,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([] if stop is None else [_Asked(stop)]),
            **sampling.arguments(),
        )
    return [_text(tokenizer, row) for row in output[:, ids.shape[1] :].tolist()]


def _text(tokenizer: PreTrainedTokenizerBase, answer: list[int]) -> str:
    known = tokenizer.get_added_vocab()
    if _CHANNEL in known and known.get(_SAID) in answer:
        answer = answer[len(answer) - answer[::-1].index(known[_SAID]) :]
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


class _Asked(StoppingCriteria):
    """The end of all answers as soon as some rank was asked to stop."""

    def __init__(self, stop: StopSignal) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        if self._stop.any_rank():
            raise Preempted("stopped by a signal during an answer")
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _left_padded(rows: list[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (rows, longest): every row ends at the right."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[padding] * (longest - len(row)) + row for row in rows], dtype=torch.int64)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=torch.int64)
    return ids, mask


@contextmanager
def _seeded(sampling: Sampling, device: torch.device) -> Iterator[None]:
    """Context in which random choices depend on the seed alone; the generators are put back afterwards."""
    if sampling.temperature == 0:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        yield
