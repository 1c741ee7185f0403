"""Encode a sample as token ids and, for each token, whether the model is trained to predict it.

A conversation is rendered as text and tokenized once. The characters that the assistant writes are found in that text
(`spans`) and carried over to tokens by their character offsets: tokenizing the turns one by one would give other
tokens at their borders.
"""

import datetime
import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from dist_qft.config.data_schema import TaskConfig
from dist_qft.data.chat_template import ChatTemplate, TemplateStopped, template_source
from dist_qft.data.forms import locate
from dist_qft.data.labels import label_value
from dist_qft.data.long_texts import most_characters, ordinary_characters, tokens_of_beginning
from dist_qft.data.records import RowError
from dist_qft.data.samples import (
    REASONING,
    WEIGHT,
    Conversation,
    Labelled,
    Message,
    PromptCompletion,
    Sample,
    Text,
    Tokenized,
)
from dist_qft.data.spans import Located, Span, SpanFinder, TemplateRefusal
from dist_qft.data.standins import Piece
from dist_qft.data.templates import with_inputs
from dist_qft.data.text_ends import begins_with_bos
from dist_qft.errors import UserError

_MOST_STOPS = 3  # rows in a row that a template cannot render within its limits: it has no end, whatever the row
_EMPTY = "an answer is empty, so that the model learns to end its turn at once"
_ENDLESS = "the tokenizer has no end token, so that texts have no end and the model learns no place to stop"


@dataclass(frozen=True)
class TokenSequence:
    """One sample.

    input_ids: (n,) int32. targets: (n,) bool, whether token i is predicted from those before it; the first never is.
    label: the target of a labelled sample, predicted instead of tokens: a label's position, or a number. Of a rated
    answer 1 or 0. second: of a pair, the token at which the other answer begins, with its prompt. cut: these are the
    first tokens of a very long sample, more than `data.max_length`; if none of them is a target the last counts as one.
    follows: of the same record as the sequence before, and never apart from it.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    label: float | None = None
    second: int | None = None
    cut: bool = False
    follows: bool = False


@dataclass
class Remarks:
    """Remarks on encoded samples for the user: how many samples had each, and the first of them."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, remark: str, where: str) -> None:
        self.counts[remark] += 1
        self.first.setdefault(remark, where)


class SampleEncoder:
    """An encoder of samples, with one tokenizer, for a model of `vocab_size` token ids.

    loss_on: "assistant" predicts the assistant's turns (content and end-of-turn token, not the header), or of a
    prompt and completion the completion; "all" predicts every token.
    task: the task, with the labels that samples may have. train_on: the assistant's turns that are predicted.
    on_missing: the reaction to a template that leaves out a part of a conversation.
    today: the date that templates with a clock are told. template: the `data.template` that the tokenizer has been
    given. max_length: tokens that a row keeps at most; of texts many times longer the beginning alone is encoded.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        loss_on: Literal["assistant", "all"] = "assistant",
        task: TaskConfig | None = None,
        *,
        train_on: Literal["all-turns", "last-turn"] = "all-turns",
        on_missing: Literal["error", "warn"] = "error",
        today: datetime.date | None = None,
        template: str = "chat",
        max_length: int | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            kind = type(tokenizer).__name__
            raise UserError(f"model.path: got {kind}, which gives no character offsets; must have a tokenizer.json")
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.loss_on = loss_on
        self.task = task or TaskConfig()
        self.train_on = train_on
        self.on_missing = on_missing
        self.remarks = Remarks()
        self.encoded: set[type] = set()  # kinds of samples, so far
        self._today = today or datetime.date.today()
        self._template = template
        self._max_length = max_length
        self._end_markers = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
        self._finders: dict[str, SpanFinder] = {}
        self._stops = 0  # rows in a row that hit a limit of their template

    def encode(self, sample: Sample, where: str) -> TokenSequence:
        """Token ids and targets of `sample`.

        Raises:
            RowError: naming `where`, if the tokenizer, its template or the model cannot take the sample.
            UserError: if they cannot take any such sample.
        """
        cut = False
        self.encoded.add(type(sample))
        match sample:
            case Conversation():
                input_ids, targets, cut = self._encode_conversation(sample, where)
            case PromptCompletion(prompt, completion):
                if not completion:
                    self.remarks.add(_EMPTY, where)
                start = len(prompt) if self.loss_on == "assistant" else 0
                input_ids, targets, cut = self._encode_document((prompt, completion), start, where)
            case Text(text):
                input_ids, targets, cut = self._encode_document((text,), 0, where)
            case Tokenized(input_ids, target_list):
                targets = np.array(target_list, dtype=bool)
            case Labelled():
                return self._encode_labelled(sample, where)
        if input_ids and (min(input_ids) < 0 or max(input_ids) >= self.vocab_size):
            position = next(i for i, token in enumerate(input_ids) if not 0 <= token < self.vocab_size)
            raise RowError(
                f"{where}: got token id {input_ids[position]} at position {position}, must be 0 to "
                f"{self.vocab_size - 1}, the model's vocabulary"
            )
        targets[:1] = False
        if cut and not targets.any():
            targets[-1] = True
        return TokenSequence(np.array(input_ids, dtype=np.int32), targets, cut=cut)

    def _encode_labelled(self, sample: Labelled, where: str) -> TokenSequence:
        """One text, or two with a line break between them, without an end token; no token is a target of its own."""
        texts = [sample.text] if sample.text_pair is None else [sample.text, "\n", sample.text_pair]
        input_ids, _, cut = self._tokenize(texts, where, add_special_tokens=True)
        label = label_value(self.task, sample.label, where)
        targets = np.ones(len(input_ids), dtype=bool)
        return TokenSequence(np.array(input_ids, dtype=np.int32), targets, label, cut=cut)

    def _encode_document(self, texts: Sequence[str], start: int, where: str) -> tuple[list[int], np.ndarray, bool]:
        """Plain text, predicted from character `start` on, between BOS and EOS if the tokenizer defines them."""
        eos, has_bos = self.tokenizer.eos_token_id, begins_with_bos(self.tokenizer, texts)
        input_ids, offsets, cut = self._tokenize(texts, where, add_special_tokens=not has_bos)
        targets = _in_spans(offsets, [(start, sum(map(len, texts)))])
        if eos is None:
            self.remarks.add(_ENDLESS, where)
        elif not cut:
            # Some tokenizers write EOS themselves; at offset 0, so it needs its mark in either case.
            if not input_ids or input_ids[-1] != eos:
                input_ids, targets = [*input_ids, eos], np.append(targets, True)
            targets[-1] = True
        return input_ids, targets, cut

    def _encode_conversation(self, sample: Conversation, where: str) -> tuple[list[int], np.ndarray, bool]:
        if self._template == "alpaca":
            sample = with_inputs(sample)
        if self._template != "chat" and self.tokenizer.eos_token_id is None:
            self.remarks.add(_ENDLESS, where)
        finder = self._finder(sample)
        answers = {i for i, message in enumerate(sample.messages) if message["role"] == "assistant"}
        trained = {i for i in answers if sample.messages[i].get(WEIGHT, 1) != 0}
        if self.loss_on == "all":
            wanted = answers - trained
        else:
            trained = wanted = self._trained_turns(sample, trained, answers)
            if 0 in trained:
                raise RowError(f"{where}: message 0 is the assistant's; must be a system or user message")
        checked = {i for i in range(len(sample.messages)) if i in trained or i not in answers}
        try:
            located = locate(sample, finder, wanted, checked)
        except TemplateRefusal as refusal:
            raise RowError(f"{where}: {refusal}") from None
        except TemplateStopped as stopped:
            self._stops += 1
            if self._stops >= _MOST_STOPS:
                raise
            raise RowError(f"{where}: {stopped}") from None
        self._stops = 0
        if any(not _says_anything(sample.messages[i]) for i in trained):
            self.remarks.add(_EMPTY, where)
        if located.missing:
            self._tell_missing(located.missing, sample, where)
        for note in located.notes:
            self.remarks.add(note, where)
        # The template writes BOS itself if the model wants one.
        input_ids, offsets, cut = self._tokenize([located.text], where, add_special_tokens=False)
        inside = _in_spans(offsets, _all_spans(located))
        return input_ids, ~inside if self.loss_on == "all" else inside, cut

    def _trained_turns(self, sample: Conversation, trained: set[int], answers: set[int]) -> set[int]:
        """The messages whose tokens are predicted: not those of a prompt, and of the last turn only if so asked."""
        trained = {i for i in trained if i >= sample.prompt_length}
        if self.train_on == "all-turns" or not trained:
            return trained
        # The last turn is the last one that was answered, though it be context only.
        asked = [i for i, message in enumerate(sample.messages[: max(answers)]) if message["role"] == "user"]
        return {i for i in trained if not asked or i > asked[-1]}

    def _finder(self, sample: Conversation) -> SpanFinder:
        source = template_source(self.tokenizer, sample.tools)
        if source is None:
            raise UserError(
                "data.template: got chat, but the model's tokenizer has no chat template and the data are "
                "conversations; must be alpaca or none, or put a chat_template.jinja beside the model"
            )
        if source not in self._finders:
            variables = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
            template = ChatTemplate(source, variables, self._today)
            self._finders[source] = SpanFinder(template, self._end_markers)
        return self._finders[source]

    def _tell_missing(self, missing: Sequence[Piece], sample: Conversation, where: str) -> None:
        piece, key = missing[0], "tools"
        if piece.message >= 0:
            key = f"message {piece.message} ({sample.messages[piece.message]['role']}), {piece.kind}"
        if self.on_missing == "error":
            raise RowError(
                f"{where}: {key}: {reprlib.repr(piece.text)} is not in the rendered conversation; must be a template "
                "that writes it, other data, or data.on_missing: warn"
            )
        for kind in sorted({"tool call" if piece.kind == "function" else piece.kind for piece in missing}):
            self.remarks.add(f"the chat template leaves out {kind}", where)

    def _tokenize(
        self, texts: Sequence[str], where: str, add_special_tokens: bool
    ) -> tuple[list[int], np.ndarray, bool]:
        """Token ids of texts that stand one behind the other, their (n, 2) character offsets, and True if they are
        the first ones only, more than `max_length`, of a text many times longer.
        """
        characters = sum(map(len, texts))
        if self._max_length is None or characters <= ordinary_characters(self._max_length):
            return *self._tokenize_whole("".join(texts), where, add_special_tokens), False
        tokens = tokens_of_beginning(
            texts, self._max_length, lambda text: self._tokenize_whole(text, where, add_special_tokens)
        )
        if tokens is None and characters <= (most := most_characters(self._max_length)):
            return *self._tokenize_whole("".join(texts), where, add_special_tokens), False
        if tokens is None:
            raise RowError(
                f"{where}: got at least {characters:,} characters, of which the first {most:,} do not tell the "
                f"{self._max_length} tokens of data.max_length; must be at most {most:,}"
            )
        return *tokens, True

    def _tokenize_whole(self, text: str, where: str, add_special_tokens: bool) -> tuple[list[int], np.ndarray]:
        """Token ids and their (n, 2) character offsets."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # JSON can write half of a surrogate pair.
            raise RowError(f"{where}: got a lone surrogate {text[error.start]!a}, must be text") from None
        encoding = self.tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,  # the length is limited later, and not to model_max_length
        )
        return encoding["input_ids"], np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)


def _says_anything(message: Message) -> bool:
    return any(message.get(key) for key in ("content", "tool_calls", REASONING))


def _all_spans(located: Located) -> list[Span]:
    return [span for spans in located.spans.values() for span in spans]


def _in_spans(offsets: np.ndarray, spans: Iterable[Span]) -> np.ndarray:
    """(n,) bool: whether a token holds at least one character of a span.

    A token across a border counts as inside, so that no character of an answer goes untrained: BPE likes to merge the
    blank that ends a prompt with the first word of its completion.
    """
    inside = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        inside |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return inside
