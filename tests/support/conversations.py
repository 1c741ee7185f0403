"""Conversations as samples have them, and the part of one that is trained."""

from dist_qft.data.samples import Conversation

WHERE = "data.jsonl:7"


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(name="get_weather", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def trained(encoder, messages, tools=None):
    sequence = encoder.encode(Conversation(messages, tools), WHERE)
    return encoder.tokenizer.decode(sequence.input_ids[sequence.targets])
