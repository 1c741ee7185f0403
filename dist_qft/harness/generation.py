"""Text that continues a prompt up to a stop string, as tasks of the harness that generate ask for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.errors import UserError
from dist_qft.ranks.collectives import everywhere
from dist_qft.tuned_model.prompts import stop_ids

_NEW_TOKENS = 256  # of a task that sets none, as in the harness
# Settings of transformers' `generate`; those of sampling have no effect where the likeliest token is taken.
_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
_OF_BEAMS = ("num_beams", "length_penalty", "early_stopping")
_OF_CHOICE = ("do_sample", *_OF_SAMPLING, *_OF_BEAMS, "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens")


@dataclass(frozen=True)
class Continuing:
    """A task's `generation_kwargs` in the harness's reading of them.

    Attributes:
        most: new tokens at most.
        stops: texts that end a generation and are no part of it.
        choice: how tokens are chosen, in the words of `generate`; greedy by default.
    """

    most: int
    stops: tuple[str, ...] = ()
    choice: Mapping[str, Any] = field(default_factory=lambda: {"do_sample": False})

    @classmethod
    def of(cls, asked: Mapping[str, Any]) -> "Continuing":
        """The settings that a task asks for.

        Raises:
            UserError: on all ranks, for a value that cannot be meant or a setting that has no effect here.
        """
        try:
            choice: dict[str, Any] = dict(normalize_gen_kwargs(dict(asked), _NEW_TOKENS))
        except (TypeError, ValueError) as error:
            raise _fault(f"got {dict(asked)}: {error}") from error
        most, stops = choice.pop("max_gen_toks"), choice.pop("until")
        if most < 1:
            raise _fault(f"max_gen_toks: got {most}, must be at least 1")
        if unknown := sorted(choice.keys() - set(_OF_CHOICE)):
            raise _fault(f"got '{unknown[0]}', must be until, max_gen_toks, {', '.join(_OF_CHOICE)}")
        if not choice["do_sample"] or choice.get("temperature") == 0:
            choice = {name: value for name, value in choice.items() if name not in _OF_SAMPLING} | {"do_sample": False}
        return cls(most, tuple(stop for stop in stops if stop), choice)

    def room(self, longest: int) -> int:
        """Tokens that a prompt may have before a model of at most `longest` tokens; UserError if there are none."""
        if self.most >= longest:
            raise _fault(f"max_gen_toks: got {self.most}, must be less than the model's {longest} tokens")
        return longest - self.most


def _fault(text: str) -> UserError:
    error = UserError(f"generation_kwargs: {text}")
    everywhere(error)
    return error


class NewTextStops(StoppingCriteria):
    """The end of a generation whose new text has a stop string; the prompt's own text does not count.

    Args:
        prompt: its number of tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], prompt: int) -> None:
        self._tokenizer, self._stops, self._prompt = tokenizer, stops, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """One boolean for each row of ids (rows, length)."""
        # With special tokens: a task may stop at one that does not end this model's answers.
        texts = self._tokenizer.batch_decode(input_ids[:, self._prompt :], skip_special_tokens=False)
        found = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(found, device=input_ids.device)


@torch.no_grad()
def continuation(
    base: BaseModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    asked: Continuing,
    device: torch.device,
) -> str:
    """The text behind a prompt of token ids, without the stop string that ended it. Collective."""
    ends = stop_ids(base.model.generation_config.eos_token_id, tokenizer)
    criteria = [NewTextStops(tokenizer, asked.stops, len(ids))] if asked.stops else []
    generate: Any = base.model.generate
    prompt = torch.tensor([ids], device=device)
    output = generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=asked.most,
        eos_token_id=ends or None,
        pad_token_id=(ends or [0])[0],
        stopping_criteria=StoppingCriteriaList(criteria),
        synced_gpus=dist.is_initialized() and dist.get_world_size() > 1,
        **asked.choice,
    )
    text = str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
    for stop in asked.stops:
        text = text.split(stop)[0]
    return text
