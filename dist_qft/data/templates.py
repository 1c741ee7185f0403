"""Prompt templates for base models that have none: `data.template: alpaca` and `none`.

They are Jinja chat templates like those of chat models, so that training, `generate`, `chat` and programs that serve an
export all write the same prompt. Jinja drops a line break behind a tag, so those are written as text.
"""

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from dist_qft.data.samples import Conversation

# The frame of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca) as most programs write it today, with a line break
# behind "### Response:". A system message stands in the place of the introduction. Tools and their results are refused.
_ALPACA = (
    "{{% for message in messages %}}"
    "{{% if message.role == 'system' %}}{bos}{{{{ message.content }}}}\n\n"
    "{{% elif message.role == 'user' %}}"
    "{{% if loop.first %}}{bos}Below is an instruction that describes a task"
    "{{% if message.input %}}, paired with an input that provides further context{{% endif %}}. "
    "Write a response that appropriately completes the request.\n\n{{% endif %}}"
    "### Instruction:\n{{{{ message.content }}}}\n\n"
    "{{% if message.input %}}### Input:\n{{{{ message.input }}}}\n\n{{% endif %}}"
    "{{% elif message.role == 'assistant' %}}"
    "### Response:\n{{{{ message.content }}}}{eos}{{% if not loop.last %}}{{{{ '\\n\\n' }}}}{{% endif %}}"
    "{{% else %}}{{{{ raise_exception('data.template alpaca has no role ' ~ message.role) }}}}{{% endif %}}"
    "{{% endfor %}}"
    "{{% if add_generation_prompt %}}### Response:\n{{% endif %}}"
)
# Texts and nothing else; a line break ends all but an answer, which the end token ends.
_NONE = (
    "{bos}{{% for message in messages %}}{{{{ message.content }}}}"
    "{{% if message.role == 'assistant' %}}{eos}{{% else %}}{{{{ '\\n' }}}}{{% endif %}}"
    "{{% endfor %}}"
)
_FRAMES = {"alpaca": _ALPACA, "none": _NONE}


def use_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """Give the tokenizer the chat template that `data.template` names; `chat` leaves it its own. Returns it."""
    if template != "chat":
        tokenizer.chat_template = template_for(tokenizer, template)
    return tokenizer


def template_for(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The Jinja source of the template `alpaca` or `none`: with BOS if the tokenizer writes one before texts."""
    bos = "{{ bos_token }}" if writes_bos(tokenizer) else ""
    eos = "{{ eos_token }}" if tokenizer.eos_token else ""
    return _FRAMES[template].format(bos=bos, eos=eos)


def writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the tokenizer puts its BOS token before every text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def with_inputs(conversation: Conversation) -> Conversation:
    """The conversation with an alpaca row's `input` apart from its instruction, as the template `alpaca` takes it."""
    if not conversation.inputs:
        return conversation
    messages = list(conversation.messages)
    for index, text in conversation.inputs.items():
        content = messages[index]["content"]
        messages[index] = {**messages[index], "content": content.removesuffix(f"\n\n{text}"), "input": text}
    return replace(conversation, messages=messages)
