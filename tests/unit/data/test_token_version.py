"""The version of the way from records to tokens: prepared data of another version are not used."""

import hashlib
import json

import numpy as np
import pytest

from dist_qft.data.dataset import FORMAT_VERSION
from tests.support import chat_templates as kinds
from tests.support.conversations import assistant, call, trained, user

TEMPLATES = (
    kinds.CHATML,
    kinds.LAST_TURN_DIFFERS,
    kinds.LAST_END_DIFFERS_AND_QUOTES,
    kinds.MARKED,
    kinds.MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
    kinds.ALTERNATING,
    kinds.END_WITH_THE_NEXT,
    kinds.PROMPT_SHARES_THINK,
)
RESULT = {"role": "tool", "content": "Dry."}
CONVERSATIONS = (
    [user("Hi"), assistant("Hello."), user("How are you?"), assistant("Fine.")],
    [user("Hi"), assistant("Hello.", reasoning_content="A greeting.")],
    [user("Weather?"), assistant("I ask."), RESULT, assistant("Sun."), user("Thanks"), assistant("Bye.")],
    [user("Weather?"), assistant("", tool_calls=[call(city="Paris")]), RESULT, assistant("Sun.")],
    [
        {"role": "system", "content": "Be kind."},
        user("Hi"),
        assistant("  Hello. ", weight=0),
        user("b"),
        assistant("c"),
    ],
)
# Of all trained texts. Where it changes, FORMAT_VERSION goes up, and the new pair replaces this one.
KNOWN = (4, "096423b1b9411166")


@pytest.fixture(scope="module")
def texts(encoder) -> list[str]:
    """The trained text of every conversation under every template, or the refusal's kind."""
    found = []
    for template in TEMPLATES:
        for messages in CONVERSATIONS:
            try:
                found.append(trained(encoder(template), messages))
            except Exception as error:
                found.append(type(error).__name__)
    return found


def test_other_tokens_are_another_version(texts):
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
    assert (FORMAT_VERSION, digest) == KNOWN
    assert np.mean([text.endswith("Error") for text in texts]) < 0.5, "most are trained"
