"""By property: everything that the assistant said is trained, and nothing else, for templates of every kind."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_qft.data.formats import to_sample
from tests.support import chat_templates as kinds
from tests.support.conversations import WHERE, assistant, call, trained, user

TEXT = st.text(st.sampled_from("ab \n\"'<>{}\\\u00e9\u4e2d\U0001f600"), min_size=1, max_size=12).filter(
    lambda text: text.strip()
)


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": "S" + draw(TEXT)}] if draw(st.booleans()) else []
    for number in range(draw(st.integers(1, 4))):
        messages.append(user(f"U{number}:" + draw(TEXT)))
        answer = assistant(f"A{number}:" + draw(TEXT))
        if draw(st.booleans()):
            answer["weight"] = draw(st.sampled_from([0, 1]))
        messages.append(answer)
    return messages


@st.composite
def conversations_with_calls(draw):
    messages = draw(conversations())
    for message in messages:
        if message["role"] == "assistant" and draw(st.booleans()):
            arguments = draw(st.dictionaries(st.sampled_from("xyz"), TEXT | st.integers() | st.booleans(), max_size=3))
            message["tool_calls"] = [call(**arguments)]
    return messages


HEADERS = ("<|im_start|>", "<|User|>", "<|Assistant|>", "###")


def check_targets(encoder, messages):
    text = trained(encoder, messages)
    assert not any(header in text for header in HEADERS)
    position = 0
    for message in messages:
        said = message["content"].strip()
        if message["role"] == "assistant" and message.get("weight", 1):
            position = text.index(said, position) + len(said)
        elif said:
            assert said not in text


@pytest.mark.parametrize(
    "template",
    [kinds.CHATML, kinds.LAST_TURN_DIFFERS, kinds.PROMPT_OPENS_THINK, kinds.PARTS_ONLY, kinds.END_AT_THE_END,
     kinds.LAST_END_DIFFERS, kinds.ALTERNATING, kinds.MARKED, kinds.PLAIN, kinds.CLOCK, kinds.END_WITH_THE_NEXT,
     kinds.PROMPT_HAS_CHANNEL, kinds.LAST_HAS_NO_END, kinds.TEXT_ENDS, kinds.ALWAYS_ASKS, kinds.ALWAYS_ASKS_IN_WORDS,
     kinds.ALWAYS_ASKS_IN_TOKENS, kinds.BEGINS_TO_ASK, kinds.INSTRUCTION_AT_THE_END],
    ids=["chatml", "last turn", "think", "parts", "end", "last end", "alternating", "marked", "plain", "clock",
         "end with the next", "channel", "last has no end", "text ends", "asks", "asks in words", "asks in tokens",
         "begins to ask", "instruction"],
)  # fmt: skip
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=conversations())
def test_exactly_what_the_assistant_said_is_trained(encoder, template, messages):
    check_targets(encoder(template), messages)


@pytest.mark.parametrize(
    "template",
    [kinds.LAST_TURN_DIFFERS, kinds.TOOLS_AS_JSON, kinds.TOOLS_AS_TAGS, kinds.TOOLS_AS_TEXT, kinds.MARKED],
    ids=["last turn", "json", "tags", "text", "marked"],
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=conversations_with_calls())
def test_calls_are_trained_whole(encoder, template, messages):
    check_targets(encoder(template), messages)


# --- the same for rows as files hold them: other names of roles, contents in parts, calls of every form ---------------

ROLES = {
    "system": ("system", "developer", "System"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model"),
}


@st.composite
def rows(draw):
    """A row of the format messages, and the conversation that it means."""
    conversation, entries = draw(conversations_with_calls()), []
    for message in conversation:
        content, entry = message["content"], dict(message)
        entry["role"] = draw(st.sampled_from(ROLES[message["role"]]))
        if draw(st.booleans()):
            cut = draw(st.integers(0, len(content)))
            parts = [part for part in (content[:cut], content[cut:]) if part]
            entry["content"] = [{"type": "text", "text": part} for part in parts]
        if calls := message.get("tool_calls"):
            function = calls[0]["function"]
            text = {**function, "arguments": json.dumps(function["arguments"])}
            forms = (calls, [function], [{"type": "function", "function": text}])
            entry["tool_calls"] = draw(st.sampled_from(forms))
        if entry.get("weight") == 0 and draw(st.booleans()):
            del entry["weight"]
            entry["train"] = False
        entries.append({**entry, "name": None} if draw(st.booleans()) else entry)
    return {"messages": entries}, conversation


@pytest.mark.parametrize(
    "template", [kinds.TOOLS_AS_JSON, kinds.TOOLS_AS_TAGS, kinds.MARKED], ids=["json", "tags", "marked"]
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=rows())
def test_rows_are_trained_as_what_they_mean(encoder, template, row):
    record, meant = row
    sample = to_sample(record, "messages", {}, WHERE)
    found = encoder(template).encode(sample, WHERE)
    text = encoder(template).tokenizer.decode(found.input_ids[found.targets])
    assert text == trained(encoder(template), meant)
    check_targets(encoder(template), meant)
