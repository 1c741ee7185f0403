"""Templates as programs: the same text as transformers renders, and limits on what they may use."""

import datetime
import resource
import time

import pytest

from dist_qft.data import chat_template, tokens
from dist_qft.data.chat_template import ChatTemplate, Request, TemplateStopped, has_clock, template_source
from dist_qft.data.forms import prompt_text
from dist_qft.data.records import RowError
from dist_qft.data.samples import Conversation
from dist_qft.data.spans import SpanFinder
from dist_qft.data.tokens import SampleEncoder
from dist_qft.errors import UserError
from dist_qft.tuned_model.prompts import turn_end_id
from tests.support import chat_templates

TODAY = datetime.date(2025, 3, 9)
MESSAGES = [
    {"role": "user", "content": "caf\u00e9 \U0001f600 <b>\n\u2028"},
    {"role": "assistant", "content": "yes", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "\u00e9<"}}}]},
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
TEMPLATES = {name: source for name, source in vars(chat_templates).items() if name.isupper()}


def render(source, *requests, variables=None):
    template = ChatTemplate(source, variables or {}, TODAY)
    try:
        return [template.render(request) for request in requests or [Request([{"role": "user", "content": "a"}])]]
    finally:
        template.close()


@pytest.mark.parametrize("source", [*TEMPLATES.values(), "{{ dict(a=1) | tojson }}{{ messages | tojson(indent=1) }}"])
def test_the_text_is_that_of_transformers(make_tokenizer, source):
    tokenizer = make_tokenizer(source, bos_token="<s>")
    variables = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    requests = [Request(messages, tools, prompt) for messages in (MESSAGES, MESSAGES[:1]) for tools in (None, [TOOL])
                for prompt in (False, True)]  # fmt: skip
    for request, rendered in zip(requests, render(source, *requests, variables=variables), strict=True):
        try:
            expected = tokenizer.apply_chat_template(
                request.messages, tools=request.tools, tokenize=False, add_generation_prompt=request.prompt
            )
        except Exception as error:
            assert rendered.error == str(error).partition("\n")[0]
            continue
        if "strftime_now" in source:
            expected = expected.replace(datetime.date.today().strftime("%d %b %Y"), TODAY.strftime("%d %b %Y"))
        assert (rendered.text, rendered.error) == (expected, None)


def test_the_clock_stands_still(make_tokenizer):
    (rendered,) = render(chat_templates.CLOCK)
    assert "Today Date: 09 Mar 2025" in rendered.text
    assert has_clock(make_tokenizer(chat_templates.CLOCK)) and not has_clock(make_tokenizer(None))


@pytest.mark.parametrize(
    "expression",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** 100000000 }}",
        "{{ lipsum(n=99999) }}",
        "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'a' * 20000000000 }}",
        "{{ 'a' * 20000000 }}",
    ],
)
def test_no_template_hangs_or_fills_the_memory(monkeypatch, expression):
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    source = expression + "{{ messages[0].content }}"
    try:
        (rendered,) = render(source)
    except UserError as error:
        assert error.exit_code == 2
    else:
        assert rendered.error is not None
    assert time.monotonic() - started < 60  # on a busy machine; alone it is 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10  # KiB


def test_a_stopped_template_renders_again(monkeypatch):
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    template = ChatTemplate(
        "{% if messages[0].content == 'bomb' %}{{ 10 ** (messages | length * 10**8) }}{% endif %}fine", {}, TODAY
    )
    with pytest.raises(UserError, match=r"^model.path: the chat template was stopped"):
        template.render(Request([{"role": "user", "content": "bomb"}]))
    rendered = template.render(Request([{"role": "user", "content": "a"}]))
    assert rendered.text == "fine"
    template.close()


def test_the_limit_is_of_each_rendering_and_not_of_all(monkeypatch):
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    slow = "{% for i in range(99999) %}{% for j in range(9) %}{% endfor %}{% endfor %}fine"  # part of a second each
    renderings = render(slow, *[Request([{"role": "user", "content": "a"}])] * 12)
    assert {rendering.text for rendering in renderings} == {"fine"}


def test_a_row_that_hits_the_limit_is_at_fault_but_not_if_all_do(monkeypatch, make_tokenizer):
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    bomb = "{% if messages[0].content == 'bomb' %}{{ 10 ** (messages | length * 10**8) }}{% endif %}"
    monkeypatch.setattr(tokens, "_MOST_STOPS", 2)
    tokenizer = make_tokenizer(bomb + chat_templates.CHATML)
    encoder = SampleEncoder(tokenizer, len(tokenizer))

    def encode(content):
        encoder.encode(
            Conversation([{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]), "row"
        )

    refusal = r"^row: model\.path: the chat template was stopped: one rendering may use"
    with pytest.raises(RowError, match=refusal):
        encode("bomb")
    encode("a")
    with pytest.raises(RowError, match=refusal):
        encode("bomb")
    with pytest.raises(TemplateStopped):
        encode("bomb")


def test_only_trained_turns_are_rendered_for_their_ends():
    class Counting(ChatTemplate):
        rendered = 0

        def render(self, request):
            self.rendered += 1
            return super().render(request)

    template = Counting(chat_templates.CHATML, {}, TODAY)
    finder = SpanFinder(template, ("<|im_start|>", "<|im_end|>"))
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(20) for role in ("user", "assistant")]
    spans = {}
    for wanted in ({39}, {39}, {37, 39}):
        before = template.rendered
        spans[len(wanted)] = finder.locate(turns, None, wanted).spans
        assert template.rendered - before <= 1 + 3 * len(wanted)
    assert spans[1][39] == spans[2][39] and set(spans[2]) == {37, 39}
    template.close()


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{% generation %}",
        "{{ messages.__class__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% import 'os' as os %}",
        "{{ namespace(__class__=1) }}",
        "{{ messages.append(1) }}",
    ],
)
def test_bad_templates_are_refused(source):
    try:
        (rendered,) = render(source)
    except UserError as error:
        assert str(error).startswith("model.path: the chat template is not valid: ")
    else:
        assert rendered.error is not None or rendered.text == ""


def test_several_templates_without_a_default(make_tokenizer):
    tokenizer = make_tokenizer({"tool_use": chat_templates.CHATML, "rag": chat_templates.CHATML})
    assert template_source(tokenizer, [TOOL]) == chat_templates.CHATML
    with pytest.raises(UserError, match=r"^model.path: got .* rag, tool_use, must have a default$"):
        template_source(tokenizer, None)
    assert turn_end_id(tokenizer) is None


def test_a_refused_prompt_is_not_written_as_a_list_of_parts():
    source = "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('not that') }}{% endif %}"
    template = ChatTemplate(source + "{{ m.content }}{% endfor %}", {}, TODAY)
    with pytest.raises(UserError, match=r"^model.path: the chat template refuses the conversation: not that$"):
        prompt_text(Conversation([{"role": "user", "content": "say no"}]), template)
    assert prompt_text(Conversation([{"role": "user", "content": "yes"}]), template) == "yes"
    template.close()


SWITCHED = (
    "{% for m in messages %}{% if m.role == 'system' and '/no_think' in m.content %}<off>{% endif %}"
    "<|im_start|>{{ m.role }}: {{ m.content.replace('/no_think', '').rstrip() }}<|im_end|>{% endfor %}"
)


def test_a_switch_that_a_template_takes_out_of_a_text_leaves_the_text_where_it_is():
    """As the templates of SmolLM3 and Nemotron do."""
    template = ChatTemplate(SWITCHED, {}, TODAY)
    asked = [{"role": "system", "content": "Be nice. /no_think"}, {"role": "user", "content": "Hi /no_think"}]
    expected = "<off><|im_start|>system: Be nice.<|im_end|><|im_start|>user: Hi<|im_end|>"
    assert prompt_text(Conversation(asked), template) == expected
    template.close()


def test_what_a_template_leaves_out_is_refused_still():
    template = ChatTemplate("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", {}, TODAY)
    with pytest.raises(UserError, match=r"it leaves out 'x y'$"):
        prompt_text(Conversation([{"role": "user", "content": "Hi"}, {"role": "tool", "content": "x y"}]), template)
    template.close()


def test_a_template_that_cannot_end_a_prompt_ends_the_run(monkeypatch, make_tokenizer):
    """The whole conversation is rendered well, for each row; what stands in front of its answer never is."""
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    monkeypatch.setattr(tokens, "_MOST_STOPS", 2)
    bomb = "{% if add_generation_prompt %}{{ 10 ** (messages | length * 10**8) }}{% endif %}"
    tokenizer = make_tokenizer(bomb + chat_templates.CHATML)
    encoder = SampleEncoder(tokenizer, len(tokenizer))

    def encode(content):
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]
        encoder.encode(Conversation(messages), "row")

    with pytest.raises(RowError):
        encode("a")
    with pytest.raises(TemplateStopped):
        encode("c")
