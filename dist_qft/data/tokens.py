"""From a sample to token ids and, for each token, whether the model is trained to predict it.

A conversation is rendered as text by the tokenizer's own chat template and tokenized once. Which characters belong to
the assistant is found in the text, by rendering the conversation's prefixes, and carried over to tokens by their
character offsets: tokenizing the turns one by one would give other tokens at their borders.
"""

import re
import reprlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from dist_qft.config.schema import TaskConfig
from dist_qft.data.formats import Conversation, Labelled, PromptCompletion, Sample, Text, Tokenized
from dist_qft.data.labels import label_value
from dist_qft.errors import UserError

Span = tuple[int, int]  # characters [start, end) of the rendered text


@dataclass(frozen=True)
class TokenSequence:
    """One sample.

    input_ids: (n,) int32. targets: (n,) bool, whether token i is predicted from those before it; the first never is.
    label: of a labelled sample, what is predicted instead of tokens: a label's position, or a number.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    label: float | None = None


class SampleEncoder:
    """Encodes samples with one tokenizer for a model of `vocab_size` token ids.

    loss_on: "assistant" predicts the assistant's turns (content and end-of-turn token, not the header), or of a
    prompt and completion the completion; "all" predicts every token.
    task: what labelled samples are judged by.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        loss_on: Literal["assistant", "all"],
        task: TaskConfig | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            kind = type(tokenizer).__name__
            raise UserError(
                f"model.path: {kind} gives no character offsets; allowed: a tokenizer with a tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.loss_on = loss_on
        self.task = task or TaskConfig()
        self._end_markers = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())

    def encode(self, sample: Sample, where: str) -> TokenSequence:
        """Token ids and targets of `sample`; UserError naming `where` if the tokenizer or the model cannot take it."""
        match sample:
            case Conversation():
                input_ids, targets = self._encode_conversation(sample, where)
            case PromptCompletion(prompt, completion):
                start = len(prompt) if self.loss_on == "assistant" else 0
                input_ids, targets = self._encode_document(prompt + completion, start, where)
            case Text(text):
                input_ids, targets = self._encode_document(text, 0, where)
            case Tokenized(input_ids, target_list):
                targets = np.array(target_list, dtype=bool)
            case Labelled():
                return self._encode_labelled(sample, where)
        if input_ids and (min(input_ids) < 0 or max(input_ids) >= self.vocab_size):
            position = next(i for i, token in enumerate(input_ids) if not 0 <= token < self.vocab_size)
            raise UserError(
                f"{where}: token id {input_ids[position]} at position {position}; "
                f"allowed: 0 to {self.vocab_size - 1}, the model's vocabulary"
            )
        targets[:1] = False
        return TokenSequence(np.array(input_ids, dtype=np.int32), targets)

    def _encode_labelled(self, sample: Labelled, where: str) -> TokenSequence:
        """One text, or two with a line break between them, without an end token; no token is a target of its own."""
        text = sample.text if sample.text_pair is None else f"{sample.text}\n{sample.text_pair}"
        input_ids, _ = self._tokenize(text, where, add_special_tokens=True)
        label = label_value(self.task, sample.label, where)
        return TokenSequence(np.array(input_ids, dtype=np.int32), np.ones(len(input_ids), dtype=bool), label)

    def _encode_document(self, text: str, start: int, where: str) -> tuple[list[int], np.ndarray]:
        """Plain text, predicted from character `start` on, between BOS and EOS if the tokenizer defines them."""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token_id
        has_bos = bool(bos) and text.startswith(bos)
        input_ids, offsets = self._tokenize(text, where, add_special_tokens=not has_bos)
        targets = _in_spans(offsets, [(start, len(text))])
        if eos is not None:
            # Some tokenizers write EOS themselves; at offset 0, so it needs its mark in either case.
            if not input_ids or input_ids[-1] != eos:
                input_ids, targets = [*input_ids, eos], np.append(targets, True)
            targets[-1] = True
        return input_ids, targets

    def _encode_conversation(self, sample: Conversation, where: str) -> tuple[list[int], np.ndarray]:
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"{where}: a conversation, but the tokenizer has no chat template; "
                "put a chat_template.jinja beside the model, or use format prompt-completion or text"
            )
        text = self._render(sample, len(sample.messages), where)
        _check_tools_rendered(sample, text, where)
        # The template writes BOS itself if the model wants one.
        input_ids, offsets = self._tokenize(text, where, add_special_tokens=False)
        if self.loss_on == "all":
            return input_ids, np.ones(len(input_ids), dtype=bool)
        template = self.tokenizer.get_chat_template(tools=sample.tools)
        if re.search(r"\{%-?\s*generation\s*-?%\}", template):  # its author marked the assistant's part
            marked = self.tokenizer.apply_chat_template(
                sample.messages, tools=sample.tools, return_dict=True, return_assistant_tokens_mask=True
            )
            return marked["input_ids"], np.array(marked["assistant_masks"], dtype=bool)
        return input_ids, _in_spans(offsets, self._assistant_spans(sample, text, where))

    def _assistant_spans(self, sample: Conversation, text: str, where: str) -> list[Span]:
        """The characters of each assistant turn in `text`, from behind its header to its end-of-turn token."""
        spans = []
        for i, message in enumerate(sample.messages):
            if message["role"] != "assistant":
                continue
            if i == 0:
                raise UserError(f"{where}: the conversation starts with the assistant; allowed: system or user first")
            header = self._render(sample, i, where, add_generation_prompt=True)
            turn = self._render(sample, i + 1, where)
            if not (text.startswith(turn) and turn.startswith(header)):
                raise UserError(
                    f"{where}: the chat template does not render message {i} as a continuation of those before it, so "
                    "the assistant's tokens cannot be told; use a template with {% generation %}, or data.loss_on: all"
                )
            # Templates put a line break behind the end-of-turn token, where nobody generates any more.
            stripped = turn.rstrip()
            if len(stripped) > len(header) and stripped.endswith(self._end_markers):
                turn = stripped
            spans.append((len(header), len(turn)))
        return spans

    def _render(self, sample: Conversation, count: int, where: str, add_generation_prompt: bool = False) -> str:
        """The first `count` messages as text."""
        try:
            return self.tokenizer.apply_chat_template(
                sample.messages[:count],
                tools=sample.tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{where}: the chat template refuses the conversation: {reason}") from None

    def _tokenize(self, text: str, where: str, add_special_tokens: bool) -> tuple[list[int], np.ndarray]:
        """Token ids and their (n, 2) character offsets."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # JSON can write half of a surrogate pair.
            raise UserError(f"{where}: a lone surrogate {text[error.start]!a}, which is no text") from None
        encoding = self.tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,  # the length is our business, not model_max_length's
        )
        return encoding["input_ids"], np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)


def limit_length(
    sequence: TokenSequence,
    max_length: int,
    overlong: Literal["truncate", "drop", "error"],
    where: str,
    counts: Counter[str],
) -> TokenSequence | None:
    """`sequence`, cut from the right to `max_length` tokens; None if it is dropped, with the reason in `counts`."""
    length = len(sequence.input_ids)
    if not sequence.targets.any():
        counts["dropped_no_targets"] += 1
        return None
    if length <= max_length:
        return sequence
    if overlong == "error":
        raise UserError(
            f"{where}: {length} tokens; allowed: data.max_length {max_length}, or data.overlong: truncate or drop"
        )
    if overlong == "drop":
        counts["dropped_overlong"] += 1
        return None
    if not sequence.targets[:max_length].any():
        counts["dropped_targets_cut_off"] += 1
        return None
    counts["truncated"] += 1
    return replace(sequence, input_ids=sequence.input_ids[:max_length], targets=sequence.targets[:max_length])


def _in_spans(offsets: np.ndarray, spans: Iterable[Span]) -> np.ndarray:
    """(n,) bool: whether a token holds at least one character of a span.

    A token across a border counts as inside, so that no character of an answer goes untrained: BPE likes to merge the
    blank that ends a prompt with the first word of its completion.
    """
    inside = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        inside |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return inside


def _check_tools_rendered(sample: Conversation, text: str, where: str) -> None:
    """Templates without support for tools skip them silently; training on such a text would teach nonsense."""
    functions: list[dict[str, Any]] = [tool["function"] for tool in sample.tools or []]
    functions += [call["function"] for message in sample.messages for call in message.get("tool_calls") or []]
    for function in functions:
        if function["name"] not in text:
            raise UserError(
                f"{where}: the tokenizer's chat template leaves out the tool {reprlib.repr(function['name'])}"
            )
