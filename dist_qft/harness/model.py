"""A model of ours as lm-evaluation-harness sees it. Importing this registers it there under the name `dist_qft`.

Log-likelihoods come from the same forward pass and head as held-out losses, so live adapters, side networks, merged
models and sharded bases all work. The harness sees one rank. Inside, the ranks share the batches of a request list,
each as many as the others, because a sharded base is gathered for every batch.
"""

import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from dist_qft.base_model.eval_mode import eval_mode
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.data.batches import MicroBatch
from dist_qft.data.samples import IGNORED
from dist_qft.data.text_ends import open_text_ids
from dist_qft.harness.generation import Continuing, continuation
from dist_qft.ranks.collectives import gather_table
from dist_qft.tuned_model.answer import longest_sequence
from dist_qft.tuned_model.loaded_model import load
from dist_qft.tuned_model.prompts import conversation_text

Scored = tuple[float, bool]
# A request of the harness: its text, the ids of its context and those of its continuation.
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]

_LONGEST = 2048  # tokens, for a model that names no limit


@register_model("dist_qft")
class TunedLM(TemplateLM):
    """A loaded base with whatever is attached to it.

    Args:
        pretrained: path of a run, checkpoint or model, which is loaded whole; or a base that is loaded already.
        tokenizer: that of a loaded base.
        batch_size: rows of a forward pass.
        max_length: tokens of a row at most; default is the model's own limit.
        today: the date for chat templates that print it; None takes the day of each call.

    Attributes:
        asked: True once the harness has come with requests, before which it makes all of them.
    """

    def __init__(
        self,
        pretrained: str | BaseModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        device: str | torch.device | None = None,
        today: datetime.date | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, BaseModel):
            if tokenizer is None:
                raise ValueError("tokenizer: needed with a loaded base")
            self.base, self._device = pretrained, torch.device(device or "cpu")
        else:
            loaded = load(pretrained, device or "cpu")
            self.base, tokenizer, self._device = loaded.base, loaded.tokenizer, loaded.device
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.batch_size = int(batch_size) if str(batch_size).isdecimal() else 8
        limit = longest_sequence(self.base) or _LONGEST
        self.max_length = min(max_length or limit, limit)
        self.today = today
        self.asked = False

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; by default with one BOS, also where a chat template has begun the text with it, and no EOS."""
        if add_special_tokens is None:
            return open_text_ids(self.tokenizer, string)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as it was trained, up to an answer to come, or up to where the last message ends so far."""
        text = conversation_text(self.tokenizer, [*chat_history], self.today, prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"]
        said = begun if begun in text else begun.strip()  # templates may trim
        return text[: text.rindex(said) + len(said)]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Scored]:
        """(log-likelihood, whether greedy decoding gives it) of every continuation. Collective."""
        self.asked = True
        found: list[Scored] = super().loglikelihood(requests, disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's length that overlap by one token."""
        self.asked = True
        windows: list[TokenRequest] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            if tokens[:1] == [self.prefix_token_id]:  # each text gets it as the context of its first window
                tokens = tokens[1:]
            parts = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            for context, targets in map(make_disjoint_window, parts):
                windows.append((None, context, targets))
                owners.append(index)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += value
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string, one request after another. Collective: every rank generates all of them.

        A prompt that is too long loses its beginning.

        Raises:
            UserError: on all ranks, before anything is generated: no prompt has room before so many new tokens, or a
                setting is unknown.
        """
        self.asked = True
        settings = [Continuing.of(request.args[1]) for request in requests]
        rooms = [asked.room(self.max_length) for asked in settings]
        found = []
        with eval_mode(self.base.model):
            for request, asked, room in zip(requests, settings, rooms, strict=True):
                ids = self.tok_encode(request.args[0])[-room:] or [self.prefix_token_id]
                found.append(continuation(self.base, self.tokenizer, ids, asked, self._device))
        return found

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[TokenRequest], **_: Any) -> list[Scored]:
        """(log-likelihood, whether greedy decoding gives it) of every continuation. Collective."""
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        own: dict[int, Scored] = {}
        with eval_mode(self.base.model):
            for turn in range(-(-len(batches) // ranks)):
                number = turn * ranks + rank
                # A rank that has no batch left takes the last one with the others, and leaves the result.
                chosen = batches[min(number, len(batches) - 1)]
                scores = self._scored([requests[index] for index in chosen])
                if number < len(batches):
                    own |= dict(zip(chosen, scores, strict=True))
        if ranks > 1:
            everyone = gather_table(own, 2, self._device)
            own = {index: (likelihood, bool(greedy)) for index, (likelihood, greedy) in everyone.items()}
        return [own[index] for index in range(len(requests))]

    def _scored(self, requests: Sequence[TokenRequest]) -> list[Scored]:
        """The scores of one batch; a row that is too long loses the beginning of its context."""
        rows = [(context + targets)[-(self.max_length + 1) :] for _, context, targets in requests]
        sizes = [min(len(targets), len(row) - 1) for (_, _, targets), row in zip(requests, rows, strict=True)]
        length = max(len(row) - 1 for row in rows)
        ids = torch.zeros((len(rows), length), dtype=torch.int64)
        targets = torch.full_like(ids, IGNORED)
        for index, (row, size) in enumerate(zip(rows, sizes, strict=True)):
            ids[index, : len(row) - 1] = torch.tensor(row[:-1])
            targets[index, len(row) - 1 - size : len(row) - 1] = torch.tensor(row[len(row) - size :])
        positions = torch.arange(length).expand(len(rows), -1)
        batch = MicroBatch.of(ids, targets, positions, 0).to(self._device)
        hidden = self.base.hidden_states(batch.input_ids, batch.position_ids, batch.segments)
        chosen = hidden.flatten(0, 1)[batch.target_positions]
        likelihoods, greedy = self.base.head.likelihoods(chosen, batch.target_ids)
        parts = zip(likelihoods.split(sizes), greedy.split(sizes), strict=True)
        return [(float(values.sum()), bool(right.all())) for values, right in parts]
