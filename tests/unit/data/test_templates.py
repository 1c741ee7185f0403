"""`data.template`: the prompts that base models are trained on, in training and in generation."""

import pytest
from tokenizers.processors import TemplateProcessing

from dist_qft.data.formats import to_sample
from dist_qft.data.samples import Conversation, PromptCompletion
from dist_qft.data.templates import use_template
from dist_qft.data.tokens import SampleEncoder
from dist_qft.errors import UserError
from dist_qft.tuned_model.prompts import prompt_ids, turn_end_id

INTRODUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
ROW = {"instruction": "Add.", "input": "1 2", "output": " 3"}
CHAT = [("user", "Hi"), ("assistant", "Ho"), ("user", "And?"), ("assistant", "So.")]


def encoded(tokenizer, sample, template):
    sequence = SampleEncoder(use_template(tokenizer, template), 330, template=template).encode(sample, "x")
    return tokenizer.decode(sequence.input_ids), tokenizer.decode(sequence.input_ids[sequence.targets])


def chat(turns):
    return Conversation([{"role": role, "content": content} for role, content in turns])


@pytest.mark.parametrize(
    ("sample", "text", "trained"),
    [
        (
            to_sample(ROW, "alpaca", {}, "x"),
            f"{WITH_INPUT}\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n 3<|im_end|>",
            " 3<|im_end|>",
        ),
        (
            to_sample({**ROW, "input": ""}, "alpaca", {}, "x"),
            f"{INTRODUCTION}\n\n### Instruction:\nAdd.\n\n### Response:\n 3<|im_end|>",
            " 3<|im_end|>",
        ),
        (
            chat(CHAT),
            f"{INTRODUCTION}\n\n### Instruction:\nHi\n\n### Response:\nHo<|im_end|>\n\n"
            "### Instruction:\nAnd?\n\n### Response:\nSo.<|im_end|>",
            "Ho<|im_end|>So.<|im_end|>",
        ),
        (
            chat([("system", "Be brief."), *CHAT[:2]]),
            "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHo<|im_end|>",
            "Ho<|im_end|>",
        ),
    ],
)
def test_alpaca(make_tokenizer, sample, text, trained):
    assert encoded(make_tokenizer(None), sample, "alpaca") == (text, trained)


def test_none_writes_the_texts_alone(make_tokenizer):
    sample = chat([("system", "Be brief."), *CHAT])
    expected = ("Be brief.\nHi\nHo<|im_end|>And?\nSo.<|im_end|>", "Ho<|im_end|>So.<|im_end|>")
    assert encoded(make_tokenizer(None), sample, "none") == expected


@pytest.mark.parametrize("template", ["alpaca", "none"])
def test_a_prompt_is_the_beginning_of_its_training_text(make_tokenizer, template):
    tokenizer = use_template(make_tokenizer(None), template)
    text, _ = encoded(tokenizer, chat(CHAT[:2]), template)
    prompt = tokenizer.decode(prompt_ids(tokenizer, "Hi"))
    assert text == f"{prompt}Ho<|im_end|>"
    assert turn_end_id(tokenizer) == tokenizer.eos_token_id


def test_bos_stands_where_the_tokenizer_writes_it(make_tokenizer):
    tokenizer = make_tokenizer(None, bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    for template in ("alpaca", "none"):
        text, _ = encoded(tokenizer, chat(CHAT[:2]), template)
        assert text.startswith("<s>") and text.count("<s>") == 1


def write_around(tokenizer, single):
    """Have the tokenizer write special tokens around each text, as `single` says."""
    known = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=known)


@pytest.mark.parametrize("bos", ["<s>", "<|im_end|>"])  # some models have one token for both ends
@pytest.mark.parametrize("single", ["<s> $A <|im_end|>", "$A <|im_end|>", "<s> $A", "$A"])
@pytest.mark.parametrize("prompt", ["Hi, ", "<s>Hi, ", "<|im_end|>", "Hi<|im_end|>"])
def test_a_plain_prompt_is_the_beginning_of_its_training_text(make_tokenizer, bos, single, prompt):
    """A tokenizer may write EOS by itself: the answer would begin behind the end. It is one token of the text, too."""
    tokenizer = make_tokenizer(None, bos_token=bos)
    write_around(tokenizer, single.replace("<s>", bos))
    whole = SampleEncoder(tokenizer, 330).encode(PromptCompletion(prompt, "Ho!"), "x").input_ids.tolist()
    completion = tokenizer("Ho!", add_special_tokens=False)["input_ids"]
    assert whole == [*prompt_ids(tokenizer, prompt), *completion, tokenizer.eos_token_id]


@pytest.mark.parametrize("bos", ["<s>", "<|im_end|>"])
def test_an_empty_plain_prompt_is_bos_alone(make_tokenizer, bos):
    tokenizer = make_tokenizer(None, bos_token=bos)
    for single, expected in {f"{bos} $A <|im_end|>": 1, f"{bos} $A": 1, "$A": 0}.items():
        write_around(tokenizer, single)
        assert prompt_ids(tokenizer, "") == [tokenizer.bos_token_id] * expected


def test_tools_have_no_place_in_alpaca(make_tokenizer):
    messages = [
        {"role": "user", "content": "x"},
        {"role": "tool", "content": "y"},
        {"role": "assistant", "content": "z"},
    ]
    with pytest.raises(UserError, match="alpaca has no role tool"):
        encoded(make_tokenizer(None), Conversation(messages), "alpaca")


def test_a_base_model_without_template_is_told_the_ways_out(make_tokenizer):
    with pytest.raises(UserError, match=r"^data.template: got chat, .*alpaca or none"):
        encoded(make_tokenizer(None), chat(CHAT), "chat")
