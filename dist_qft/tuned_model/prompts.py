"""Prompts as the model was trained on them, and the tokens that end an answer.

Templates render in the process of `data.chat_template`, as for training: they are code that comes with the model.
"""

import datetime
import os
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from dist_qft.base_model.stop_tokens import distinct_ids
from dist_qft.config.schema import RunConfig
from dist_qft.data.chat_template import ChatTemplate, template_source
from dist_qft.data.forms import prompt_text
from dist_qft.data.samples import Conversation, Message
from dist_qft.data.text_ends import open_text_ids
from dist_qft.errors import UserError

Messages = list[Message]  # a conversation: role and content of each turn

_CONTENT = "an answer"


def date_of(config: RunConfig) -> datetime.date | None:
    """The date that a run's chat template prints; None if it prints none."""
    return datetime.date.fromisoformat(config.data.date) if config.data is not None and config.data.date else None


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, today: datetime.date | None = None
) -> list[int]:
    """Token ids of a prompt up to where the answer begins.

    Args:
        prompt: text, which is a user's turn if the tokenizer has a chat template, or a conversation.
        today: the date for templates that print it; None takes the day of this call.

    Raises:
        UserError: the template refuses the conversation, or there is none to render it.
    """
    if not tokenizer.chat_template:
        if not isinstance(prompt, str):
            raise UserError("the tokenizer has no chat template, so it takes no conversations")
        return open_text_ids(tokenizer, prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = conversation_text(tokenizer, messages, today)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def conversation_text(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, today: datetime.date | None = None, *, prompt: bool = True
) -> str:
    """A conversation as the tokenizer's chat template writes it, up to where the next answer begins if `prompt`.

    Raises:
        UserError: the template refuses the conversation, or there is none.
    """
    source = template_source(tokenizer, None)
    if source is None:
        raise UserError("the tokenizer has no chat template")
    variables = tuple((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    template = _started(source, variables, today or datetime.date.today(), os.getpid())
    return prompt_text(Conversation(messages), template, prompt=prompt)


def stop_ids(named: object, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids at which generation ends: `named` (an id, several or None), the tokenizer's eos and its template's turn end.

    A base model that was tuned on chats ends its turns with the template's token, which its own files need not name.
    """
    return distinct_ids([named, tokenizer.eos_token_id, turn_end_id(tokenizer)])


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes right after an assistant's content; None if there is none."""
    turns: Messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _CONTENT}]
    try:
        text = conversation_text(tokenizer, turns, prompt=False)
    except UserError:  # no template, or one that refuses: then the files' own ids have to do
        return None
    if _CONTENT not in text:
        return None
    ending = tokenizer(text.rpartition(_CONTENT)[2].lstrip(), add_special_tokens=False)["input_ids"]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ending[0] if ending and ending[0] in {*special, *tokenizer.all_special_ids} else None


@lru_cache(maxsize=2)  # each has a process of its own, which a fork of this one must not talk to
def _started(source: str, variables: tuple[tuple[str, str], ...], today: datetime.date, pid: int) -> ChatTemplate:
    return ChatTemplate(source, dict(variables), today)
