"""Ends of turns behind `{% generation %}` blocks where calls and results have tokens of their own."""

import pytest

from tests.support import chat_templates as kinds
from tests.support.conversations import assistant, call, trained, user

# A call ends in a token of its own, and a result stands between two of them.
WITH_TOOLS = kinds.MARKED.replace("tojson }}{% endfor %}", "tojson }}<|channel|>{% endfor %}").replace(
    "{% else %}{{ m.content }}",
    "{% elif m.role == 'tool' %}<think>{{ m.content }}</think><|im_end|>\n{% else %}{{ m.content }}",
)
OUTSIDE = WITH_TOOLS.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
CALL = assistant("", tool_calls=[call("f", a=1)])
RESULT = {"role": "tool", "content": "2"}
TARGET = '{"name": "f", "arguments": {"a": 1}}<|channel|><|im_end|>'


@pytest.mark.parametrize("template", [WITH_TOOLS, OUTSIDE], ids=["inside", "outside"])
@pytest.mark.parametrize(
    "messages, expected",
    [
        ([user("q"), CALL, RESULT, assistant("Two.")], f"{TARGET}Two.<|im_end|>"),
        ([user("q"), CALL, RESULT, CALL, RESULT, assistant("Two.")], f"{TARGET}{TARGET}Two.<|im_end|>"),
        ([user("q"), CALL], TARGET),
        ([user("q"), CALL, RESULT], TARGET),
    ],
)
def test_the_end_of_a_turn_is_trained_behind_calls_and_results(encoder, template, messages, expected):
    assert trained(encoder(template), messages) == expected


@pytest.mark.parametrize(
    "template",
    [
        # Questions have no end: the token behind them begins the answer.
        "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% endif %}{% endfor %}<|Assistant|>",
        # The text has an end of its own behind that of the last turn.
        kinds.MARKED.replace(
            "{% if add_generation_prompt %}", "{% if not add_generation_prompt %}<|endoftext|>{% else %}"
        ),
    ],
    ids=["always asks", "ends the text"],
)
def test_nothing_is_added_to_a_block_that_ends_its_turn(encoder, template):
    turns = [user("Hi"), assistant("Hello."), user("a"), assistant("Fine."), assistant("Bye.")]
    assert trained(encoder(template), turns) == "Hello.<|im_end|>Fine.<|im_end|>Bye.<|im_end|>"
