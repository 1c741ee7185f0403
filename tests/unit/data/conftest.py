"""Small real tokenizers, trained here in milliseconds, and the real SmolLM2 tokenizer where its file is at hand."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dist_qft.base_model.tokenizer import load_tokenizer
from dist_qft.config.data_schema import DataConfig, DatasetConfig
from dist_qft.config.schema import ModelConfig
from dist_qft.data.prepare import prepare
from dist_qft.data.tokens import SampleEncoder

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<think>", "</think>", "<|User|>", "<|Assistant|>", "<|channel|>")
CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "Hello there, how are you? I am fine, thank you. Goodbye!",
    "The quick brown fox jumps over the lazy dog, one two three four five.",
]


@pytest.fixture(scope="session")
def make_tokenizer():
    """A byte-level BPE tokenizer of about 330 tokens with the given chat template and special tokens."""

    def make(chat_template: str | None = CHATML, **special) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | special
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        fast.chat_template = chat_template
        return fast

    return make


@pytest.fixture(scope="session")
def chatml(make_tokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def encoder(make_tokenizer):
    """An encoder for a template, one for each set of settings."""
    made = {}

    def get(template, **settings):
        key = (template, *sorted(settings.items()))
        if key not in made:
            tokenizer = make_tokenizer(template, bos_token="<s>")
            tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
            made[key] = SampleEncoder(tokenizer, len(tokenizer), **settings)
        return made[key]

    return get


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerBase:
    default = "~/.cache/dist_qft/SmolLM2-135M-Instruct.Q4_1.gguf"
    path = Path(os.environ.get("DIST_QFT_SMOLLM2", default)).expanduser()
    if not path.exists():
        pytest.skip(f"needs the SmolLM2 file: {path} (or set DIST_QFT_SMOLLM2)")
    return load_tokenizer(ModelConfig(path=str(path)))


@pytest.fixture
def corpus(tmp_path):
    """Writes records to a jsonl file and returns its path."""

    def write(records, name="train.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


@pytest.fixture
def run(tmp_path, chatml):
    def run(train, tokenizer=chatml, vocab_size=330, **settings):
        train = train if isinstance(train, DatasetConfig) else DatasetConfig(path=train)
        return prepare(DataConfig(train=train, **settings), tokenizer, vocab_size, tmp_path / "cache" / "tokens")

    return run
