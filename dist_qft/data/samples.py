"""Samples: the forms that a record takes once its fields are understood, and before it is tokenized."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]
IGNORED = -100  # the target of a token without loss, as in PyTorch and Hugging Face
REASONING = "reasoning_content"  # the key of an assistant message that holds its reasoning
WEIGHT = "weight"  # the key of an assistant message; 0 makes it context that is not trained


@dataclass(frozen=True)
class Conversation:
    """Messages of {role, content, ...} and the tools they may call, as chat templates take them.

    prompt_length: that many messages at the start are a prompt, and the loss on the assistant begins after them.
    inputs: by message, the end of its content that an alpaca row gave as its `input`.
    """

    messages: list[Message]
    tools: list[Tool] | None = None
    prompt_length: int = 0
    inputs: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptCompletion:
    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Tokenized:
    """Token ids, and for each whether it is to be predicted."""

    input_ids: list[int]
    targets: list[bool]


@dataclass(frozen=True)
class Labelled:
    """A text, or two, and the label as the data gives it: a name, a position or a number."""

    text: str
    text_pair: str | None
    label: Any


@dataclass(frozen=True)
class Preference:
    """Two answers to the same prompt, each with it, the better one first."""

    chosen: Conversation | PromptCompletion
    rejected: Conversation | PromptCompletion


@dataclass(frozen=True)
class Rated:
    """An answer with its prompt, and the verdict on it."""

    answer: Conversation | PromptCompletion
    desirable: bool


Sample = Conversation | PromptCompletion | Text | Tokenized | Labelled
AnySample = Sample | Preference | Rated
