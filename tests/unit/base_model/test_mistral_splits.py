"""Tokenizers of Mistral's with the rule of another family, and those whose rule is meant as it stands."""

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dist_qft.base_model import mistral_splits
from dist_qft.base_model.mistral_splits import RIGHT, WRONG, correct_file
from dist_qft.base_model.tokenizer import load_tokenizer
from dist_qft.config.schema import ModelConfig

TEXT = "HelloWorld's 12345"
AS_TRAINED = ["Hello", "World", "'s", "Ġ", "1", "2", "3", "4", "5"]
OTHERWISE = ["HelloWorld", "'s", "Ġ", "123", "45"]
MISTRAL = ("<unk>", "<s>", "</s>", "[INST]")


def folder_of(folder, rule, specials, model_type):
    """A tokenizer of more tokens than transformers asks of one that it looks at, beside its model's config."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*specials, *letters, *(f"unused{i}" for i in range(100_000))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    split = pre_tokenizers.Split(Regex(rule), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "transformers_version": "4.52.4"}))
    return folder


def pieces(tokenizer):
    return [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)]


@pytest.mark.parametrize(
    "rule, specials, model_type, expected",
    [
        (WRONG, MISTRAL, "mistral3", AS_TRAINED),
        (RIGHT, MISTRAL, "mistral3", AS_TRAINED),
        (WRONG, ("<s>", "</s>"), "llama", OTHERWISE),
        (WRONG, ("<s>", "</s>"), "mistral", OTHERWISE),  # a model of this type with another vocabulary
        (WRONG.replace("{1,3}", ""), MISTRAL, "mistral", ["HelloWorld", "'s", "Ġ", "1", "2", "3", "4", "5"]),
    ],
)
def test_the_wrong_rule_alone_is_replaced(tmp_path, capfd, rule, specials, model_type, expected):
    folder = folder_of(tmp_path, rule, specials, model_type)
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    assert pieces(tokenizer) == expected
    assert "fix_mistral_regex" not in capfd.readouterr().err

    before = (folder / "tokenizer.json").read_bytes()
    correct_file(folder / "tokenizer.json", tokenizer)
    changed = (folder / "tokenizer.json").read_bytes() != before
    assert changed == (expected == AS_TRAINED and rule == WRONG)
    assert pieces(PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))) == expected


def test_the_right_rule_is_that_of_gguf_files():
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    assert GGUF_PRE_TOKENIZER_SPLITS["tekken"] == RIGHT
    assert mistral_splits._first_rule(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))) is None
