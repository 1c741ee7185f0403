"""Cards and Modelfiles: frames that are read off templates write what the templates write."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dist_qft.config.schema import RunConfig
from dist_qft.merge.certificate import (
    AdapterUsed,
    BaseUsed,
    Certificate,
    Origin,
    ResultFiles,
    WeightFigures,
)
from dist_qft.merge.model_card import held_out_rows, model_card
from dist_qft.merge.modelfile import frames_of, modelfile
from dist_qft.merge.probe import LogitDifference
from dist_qft.merge.targets import TARGETS

TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n"
DEFAULT = f"{{% if messages[0].role != 'system' %}}{SYSTEM}{{{{ '' }}}}{{% endif %}}"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% else %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
)
LAST = "{% for m in messages %}{{ 'last ' if loop.last }}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<s>", "</s>", "x"])}
    plain = Tokenizer(WordLevel(words, unk_token="x"))
    plain.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="x")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "start", "system", "user", "assistant", "prompt"),
    [
        (TURN + PROMPT, "", True, "<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n"),
        (DEFAULT + TURN + PROMPT, SYSTEM, True, "<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n"),
        (LLAMA3, "", True, "<|start|>user<|end|>\n\n", "<|eot|>", "<|start|>assistant<|end|>\n\n"),
        (MISTRAL, "", False, "[INST] ", "</s>", ""),
    ],
)  # fmt: skip
def test_frames(template, start, system, user, assistant, prompt):
    frames = frames_of(tokenizer_with(template))
    assert frames is not None
    assert (frames.start, frames.user[0], frames.assistant[1], frames.prompt) == (start, user, assistant, prompt)
    assert (frames.system is not None) == system


def test_a_turn_that_begins_with_the_bos_token_keeps_it():
    tokenizer = tokenizer_with(TURN + PROMPT)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    frames = frames_of(tokenizer)
    assert frames is not None and frames.user == ("<|im_start|>user\n", "<|im_end|>\n")


def test_a_modelfile_has_the_template_and_the_ends():
    text = modelfile("m.gguf", tokenizer_with(DEFAULT + TURN + PROMPT), ["<|im_end|>", 'a"b'])
    assert text == (
        'FROM ./m.gguf\nTEMPLATE """{{ if not .System }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}'
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        '<|im_start|>assistant\n"""\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "a\\"b"\n'
    )


@pytest.mark.parametrize(
    "template", [None, LAST, "{{ raise_exception('never') }}", "{% for m in messages %}x{% endfor %}"]
)
def test_templates_without_frames_get_none(template):
    assert frames_of(tokenizer_with(template)) is None
    assert "TEMPLATE" not in modelfile("m.gguf", tokenizer_with(template), [])


@pytest.mark.parametrize("target", ["dense", "quantized", "peft", "gguf"])
def test_a_card_names_base_data_and_difference_and_no_path_of_this_machine(tmp_path, target):
    data = {"train": [{"path": str(tmp_path), "weight": 1}, {"path": "owner/set", "weight": 2}]}
    config = RunConfig.model_validate({"output_dir": str(tmp_path), "model": {"path": "owner/base"}, "data": data})
    certificate = Certificate(
        version=1, summary="lossless: all is well", lossless=True, kind="exact", target=target, dtype=None,
        result=ResultFiles("result", {}), base=BaseUsed("owner/base", "f" * 64),
        adapter=AdapterUsed("checkpoint", "a" * 64, "qlora", 12, 7), weights=WeightFigures(0.0),
        logits=LogitDifference(0.0, 0.0, 1.0, 1.0, 1.0), notes=[], probe=[], versions={"torch": "2"},
    )  # fmt: skip
    text = TARGETS[target].card
    assert text is not None
    card = model_card("my-result", Origin(config, tmp_path, 12), certificate, text)
    assert card.startswith("---\nbase_model: owner/base\n") and "Lossless: all is well." in card
    assert "12 steps" in card and "\n# my-result\n" in card and tmp_path.name in card and "owner/set" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("result", "measured"),
    [({"result_step": 4}, 4), ({"result_step": 8}, 8), ({"result_step": None}, 8), ({}, 8)],
    ids=str,
)
def test_held_out_figures_are_those_of_the_step_that_is_the_result(tmp_path, result, measured):
    """A run that takes its best checkpoint back at its end measures that one, and not its last."""
    summary = {"steps": 8, "base_eval_loss": 3.25, "tuned_eval_loss": 1.5, **result}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    config = RunConfig.model_validate({"output_dir": str(tmp_path), "model": {"path": "owner/base"}})
    for step in (4, 8):
        rows = held_out_rows(Origin(config, tmp_path / f"checkpoint-{step}", step))
        assert rows == (["| loss (nats per target) | 3.2500 | 1.5000 |"] if step == measured else [])
