"""The trained part of a conversation, for templates of every kind: compared with text written by hand."""

import pytest

from dist_qft.data.tokens import Remarks
from dist_qft.errors import UserError
from tests.support import chat_templates as kinds
from tests.support.conversations import WHERE, assistant, call, trained, user

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
AS_JSON = '{"name": "get_weather", "arguments": {"city": "Par\\"is \u00e9", "days": 2}}'
TURNS = [user("Hi"), assistant("Hello."), user("How are you?"), assistant("Fine.")]
THINKING = [user("Hi"), assistant("Hello.", reasoning_content="A greeting.")]
INLINE = [user("Hi"), assistant("<think>\nA greeting.\n</think>\n\nHello.")]
CALLS = [
    user("Weather?"),
    assistant("", tool_calls=[call(city='Par"is \u00e9', days=2)]),
    user("Thanks"),
    assistant("Sun."),
]

END_OUTSIDE = kinds.MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
NO_END = kinds.MARKED.replace("<|im_end|>", "")


TARGETS = {
    "chatml": (kinds.CHATML, TURNS, "Hello.<|im_end|>Fine.<|im_end|>"),
    "equal texts": (kinds.CHATML, [user("a"), assistant("a"), user("a"), assistant("a")], "a<|im_end|>a<|im_end|>"),
    "two answers in a row": (
        kinds.CHATML,
        [*TURNS, assistant("Bye.")],
        "Hello.<|im_end|>Fine.<|im_end|>Bye.<|im_end|>",
    ),
    "question last": (kinds.CHATML, TURNS[:3], "Hello.<|im_end|>"),
    "empty answer": (kinds.CHATML, [user("a"), assistant("")], "<|im_end|>"),
    "last turn differs": (
        kinds.LAST_TURN_DIFFERS,
        TURNS,
        "Hello.<|im_end|><think>\n\n</think>\n\nFine.<|im_end|>",
    ),
    "last turn differs, reasoning": (
        kinds.LAST_TURN_DIFFERS,
        THINKING,
        "<think>\nA greeting.\n</think>\n\nHello.<|im_end|>",
    ),
    "last turn differs, inline": (
        kinds.LAST_TURN_DIFFERS,
        INLINE,
        "<think>\nA greeting.\n</think>\n\nHello.<|im_end|>",
    ),
    "last turn differs, calls": (
        kinds.LAST_TURN_DIFFERS,
        CALLS,
        f"<tool_call>\n{AS_JSON}\n</tool_call><|im_end|><think>\n\n</think>\n\nSun.<|im_end|>",
    ),
    "prompt opens a block, answers have none": (kinds.PROMPT_OPENS_THINK, TURNS, "Hello.<|im_end|>Fine.<|im_end|>"),
    "prompt opens the block": (kinds.PROMPT_SHARES_THINK, THINKING, "A greeting.\n</think>\n\nHello.<|im_end|>"),
    "prompt opens an empty block": (
        kinds.PROMPT_SHARES_THINK,
        TURNS[:2],
        "<think>\n\n</think>\n\nHello.<|im_end|>",
    ),
    "parts only": (kinds.PARTS_ONLY, TURNS, " Hello.<|im_end|> Fine.<|im_end|>"),
    "end at the very end": (kinds.END_AT_THE_END, TURNS, "Hello.<|im_end|>Fine.<|im_end|>\n<|endoftext|>"),
    "last end differs": (kinds.LAST_END_DIFFERS, TURNS, "<|channel|>Hello.<|im_end|><|channel|>Fine.<|endoftext|>"),
    "last end differs, behind a result in quotes": (
        kinds.LAST_END_DIFFERS_AND_QUOTES,
        [user("Hi"), assistant("I ask."), {"role": "tool", "content": "Dry."}, assistant("Sun."), *TURNS[2:]],
        "<|channel|>I ask.<|im_end|><|channel|>Sun.<|im_end|><|channel|>Fine.<|endoftext|>",
    ),
    "end with the next question": (kinds.END_WITH_THE_NEXT, TURNS, "Hello.<|im_end|>Fine."),
    "the last has no end": (kinds.LAST_HAS_NO_END, TURNS, "Hello.<|im_end|>Fine."),
    "the text has an end": (kinds.TEXT_ENDS, TURNS, "Hello.Fine.<|im_end|>"),
    "always asks": (kinds.ALWAYS_ASKS, TURNS, "Hello.<|im_end|>Fine.<|im_end|>"),
    "always asks in words": (kinds.ALWAYS_ASKS_IN_WORDS, TURNS, "Hello.\n<|im_end|>Fine.\n<|im_end|>"),
    "always asks in words, behind blanks": (
        kinds.ALWAYS_ASKS_IN_WORDS,
        [user("Hi\n\n"), assistant("Hello.")],
        "Hello.\n<|im_end|>",
    ),
    "always asks in tokens": (kinds.ALWAYS_ASKS_IN_TOKENS, TURNS, "Hello.<|im_end|>Fine.<|im_end|>"),
    "asks on a line of its own": (
        kinds.CHATML.replace("<|im_end|>\n", "<|im_end|>").replace("prompt %}<", "prompt %}{{ '\n' }}<"),
        TURNS,
        "Hello.<|im_end|>Fine.<|im_end|>",
    ),
    "begins to ask": (kinds.BEGINS_TO_ASK, TURNS, "Hello.<|im_end|>Fine.<|im_end|>"),
    "words end turns, and no prompt": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '[over]\n' }}{% endfor %}",
        TURNS[:2],
        "assistant: Hello.[over]\n",
    ),
    "instruction at the end": (kinds.INSTRUCTION_AT_THE_END, TURNS, "Hello.<|im_end|>Fine.<|im_end|>"),
    "instruction behind calls": (
        kinds.INSTRUCTION_AT_THE_END,
        [*CALLS[:2], {"role": "tool", "content": "Dry."}, assistant("Sun."), *CALLS[:2]],
        f"{AS_JSON}\nSun.<|im_end|>{AS_JSON}\n",
    ),
    "calls are numbered": (
        kinds.CALLS_ARE_NUMBERED,
        [user("Hi"), assistant("", tool_calls=[call(a="b")]), {"role": "tool", "content": "c"}, assistant("Sun.")],
        '[get_weather({"a": "b"}, 1)]<|im_end|>Sun.',
    ),
    "the next header is no end, behind blanks": (
        kinds.PROMPT_OPENS_THINK.replace("<|im_end|>", ""),
        [user("  Hi"), *TURNS[1:]],
        "Hello.Fine.",
    ),
    "prompt goes on with words": (kinds.PROMPT_GOES_ON, TURNS, "Hello.<|im_end|>Fine.<|im_end|>"),
    "prompt has a channel": (kinds.PROMPT_HAS_CHANNEL, TURNS, "Hello.<|im_end|>Fine.<|im_end|>"),
    "system folded": (
        kinds.ALTERNATING,
        [{"role": "system", "content": "Be kind."}, *TURNS],
        "Hello.<|im_end|>Fine.<|im_end|>",
    ),
    "trimmed": (kinds.ALTERNATING, [user(" a "), assistant("  b \n")], "b<|im_end|>"),
    "marked": (kinds.MARKED, TURNS, "Hello.<|im_end|>Fine.<|im_end|>"),
    "marked, characters of several tokens": (
        kinds.MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}[over]"),
        [user("a"), assistant("caf\u00e9"), user("b"), assistant("yes \U0001f600")],
        "caf\u00e9yes \U0001f600",
    ),
    "marked without the end": (END_OUTSIDE, TURNS, "Hello.<|im_end|>Fine.<|im_end|>"),
    "marked without the end, question last": (END_OUTSIDE, TURNS[:3], "Hello.<|im_end|>"),
    "marked without the end, which is on the next line": (
        END_OUTSIDE.replace("{% endgeneration %}", "{% endgeneration %}{{ '\n' }}"),
        TURNS,
        "Hello.\n<|im_end|>Fine.\n<|im_end|>",
    ),
    "marked without the end, weight 0": (
        END_OUTSIDE,
        [user("Hi"), assistant("Hello.", weight=0), *TURNS[2:]],
        "Fine.<|im_end|>",
    ),
    "marked without the end, calls": (
        END_OUTSIDE,
        CALLS,
        f"{AS_JSON}<|im_end|>Sun.<|im_end|>",
    ),
    "marked, and no end but the next header": (NO_END, TURNS, "Hello.Fine."),
    "marked, and no end but a prompt": (
        NO_END.replace("{% if add_generation_prompt %}", "{% if 1 %}"),
        TURNS,
        "Hello.Fine.",
    ),
    "marked, and an end behind the last answer only": (
        NO_END.replace("{% if add", "{% if not add_generation_prompt %}<|endoftext|>{% endif %}{% if add"),
        TURNS,
        "Hello.Fine.<|endoftext|>",
    ),
    "no special tokens": (kinds.PLAIN, TURNS, " Hello.\n\n Fine.\n\n"),
    "calls as json": (
        kinds.TOOLS_AS_JSON,
        CALLS,
        f"<tool_call>{AS_JSON}</tool_call><|im_end|>Sun.<|im_end|>",
    ),
    "calls as tags": (
        kinds.TOOLS_AS_TAGS,
        CALLS,
        '<function=get_weather><parameter=city>\nPar"is \u00e9\n</parameter><parameter=days>\n2\n</parameter>'
        "</function><|im_end|>Sun.<|im_end|>",
    ),
    "calls as text": (
        kinds.TOOLS_AS_TEXT,
        CALLS,
        '<tool_call>get_weather\n{"city": "Par\\"is \u00e9", "days": 2}</tool_call><|im_end|>Sun.<|im_end|>',
    ),
    "calls without content": (kinds.CALLS_WITHOUT_CONTENT, CALLS, f"{AS_JSON}<|im_end|>Sun.<|im_end|>"),
    "calls, and no empty answer": (kinds.CALLS_BESIDE_AN_ANSWER, CALLS, f"{AS_JSON}<|im_end|>Sun.<|im_end|>"),
    "weight 0": (
        kinds.CHATML,
        [user("Hi"), assistant("Hello.", weight=0), *TURNS[2:]],
        "Fine.<|im_end|>",
    ),
    "weight 0, marked": (kinds.MARKED, [user("Hi"), assistant("Hello.", weight=0), *TURNS[2:]], "Fine.<|im_end|>"),
}


@pytest.mark.parametrize(("template", "messages", "expected"), TARGETS.values(), ids=TARGETS)
def test_targets(encoder, template, messages, expected):
    assert trained(encoder(template), messages) == expected


def test_a_template_that_ends_no_conversation_is_told(encoder):
    open_ended = encoder(kinds.END_WITH_THE_NEXT)
    trained(open_ended, TURNS)
    assert any("do not teach the model to stop" in remark for remark in open_ended.remarks.first)


@pytest.mark.parametrize(
    ("template", "note"),
    [
        (END_OUTSIDE, "leave out the token that ends a turn"),
        (NO_END, "do not teach the model to stop"),
        (END_OUTSIDE.replace("endgeneration %}<", "endgeneration %}[over]<"), "do not teach the model to stop"),
        (kinds.MARKED, None),
        (kinds.MARKED.replace("<|im_end|>", "[over]"), None),
        (kinds.MARKED.replace("<|im_end|>{%", "{% endgeneration %}{% generation %}<|im_end|>{%"), None),
    ],
)
def test_marks_that_end_no_turn_are_told(encoder, template, note):
    marked = encoder(template, on_missing="warn")  # an encoder of this test's own
    marked.remarks = Remarks()
    trained(marked, TURNS)
    remarks = list(marked.remarks.first)
    assert len(remarks) == (note is not None) and all(note in remark for remark in remarks)


def test_last_turn(encoder):
    calls = [*TURNS, user("Weather?"), assistant("", tool_calls=[call(city="Rome")]), assistant("Sun.")]
    last = encoder(kinds.TOOLS_AS_JSON, train_on="last-turn")
    assert trained(last, TURNS) == trained(last, [*TURNS, user("Bye")]) == "Fine.<|im_end|>"
    assert trained(last, calls).endswith("</tool_call><|im_end|>Sun.<|im_end|>")
    assert "Fine" not in trained(last, calls)
    # What earlier turns lose does not matter then.
    earlier = [*THINKING, *TURNS[2:]]
    assert trained(encoder(kinds.LAST_TURN_DIFFERS, train_on="last-turn"), earlier).endswith("Fine.<|im_end|>")


def test_a_last_turn_that_is_context_is_not_replaced_by_an_earlier_one(encoder):
    last = encoder(kinds.TOOLS_AS_JSON, train_on="last-turn")
    assert trained(last, [*TURNS[:3], assistant("Fine.", weight=0)]) == ""
    calls = [user("Weather?"), assistant("", tool_calls=[call(city="Rome")], weight=0), assistant("Sun.")]
    assert trained(last, [*TURNS, *calls]) == "Sun.<|im_end|>"
    reversed_weights = [calls[0], assistant("I look."), assistant("Sun.", weight=0)]
    assert trained(last, [*TURNS, *reversed_weights]) == "I look.<|im_end|>"


@pytest.mark.parametrize(
    "template",
    [
        kinds.MARKED.replace("<|im_end|>{%", "{% endgeneration %}{% generation %}<|im_end|>{%"),
        kinds.MARKED.replace("{% generation %}", "{% generation %}<think></think>{% endgeneration %}{% generation %}"),
    ],
    ids=["an end token", "an empty block of reasoning"],
)
@pytest.mark.parametrize("settings", [{"train_on": "last-turn"}, {}], ids=["last turn", "weight 0"])
def test_marks_without_text_belong_to_the_answer_beside_them(encoder, template, settings):
    first = {} if settings else {"weight": 0}
    messages = [user("Hi"), assistant("Hello.", **first), *TURNS[2:]]
    everything, last = trained(encoder(template), TURNS), trained(encoder(template, **settings), messages)
    assert everything.count("<|im_end|>") == 2 and last == everything[everything.index("<|im_end|>") + 10 :]


def test_loss_on_all_leaves_out_messages_of_weight_0(encoder):
    everything = encoder(kinds.CHATML, loss_on="all")
    text = trained(everything, [user("Hi"), assistant("Hello.", weight=0), *TURNS[2:]])
    assert "Hello." not in text and "How are you?" in text and "Fine.<|im_end|>" in text


MISSING = {
    "calls beside content": (
        kinds.CALLS_WITHOUT_CONTENT,
        [user("Weather?"), assistant("I look.", tool_calls=[call(city="Rome")])],
        "message 1 (assistant), function: 'get_weather'",
    ),
    "reasoning that is cut": (kinds.REASONING_CUT, INLINE, "message 1 (assistant), content: 'A greeting.'"),
    "reasoning of earlier turns": (
        kinds.LAST_TURN_DIFFERS,
        [*THINKING, *TURNS[2:]],
        "message 1 (assistant), reasoning",
    ),
    "reasoning that nobody knows": (kinds.CHATML, THINKING, "message 1 (assistant), reasoning: 'A greeting.'"),
    "calls": (kinds.CHATML, CALLS, "message 1 (assistant), function: 'get_weather'"),
    "outside the marks": (
        kinds.MARKED.replace("{% generation %}{{ m.content }}", "{{ m.content }}{% generation %}"),
        TURNS,
        "message 1 (assistant), content: 'Hello.'",
    ),
}


@pytest.mark.parametrize(("template", "messages", "message"), MISSING.values(), ids=MISSING)
def test_what_a_template_leaves_out(encoder, template, messages, message):
    with pytest.raises(UserError) as caught:
        trained(encoder(template), messages)
    assert str(caught.value).startswith(f"{WHERE}: {message}")
    assert "data.on_missing" in str(caught.value)
    warned = encoder(template, on_missing="warn")
    trained(warned, messages)
    assert any("leaves out" in remark and first == WHERE for remark, first in warned.remarks.first.items())


def test_lists_of_parts_are_not_given_to_a_template_that_writes_them_as_they_are(encoder):
    by_length = kinds.CHATML.replace("{{ m.content }}", "{{ m.content }}{{ '!' if m.content | length > 20 }}")
    with pytest.raises(UserError, match=r"^data.jsonl:7: the chat template changes what the messages say"):
        trained(encoder(by_length), [user("Hi"), assistant("An answer of more than twenty characters.")])


def test_a_template_that_changes_the_texts_is_refused(encoder):
    shouting = kinds.CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
    with pytest.raises(UserError, match=r"^data.jsonl:7: the chat template changes what the messages say"):
        trained(encoder(shouting), TURNS)
