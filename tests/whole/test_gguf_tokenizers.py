"""Tokenizers of GGUF files against llama.cpp's own, for every name of a rule, with the vocabulary of SmolLM2."""

import copy
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from dist_qft.base_model.gguf_metadata import MetadataReader
from dist_qft.base_model.gguf_splits import AS_GPT2, BEGUN, SPLITS, use_rules
from dist_qft.base_model.tokenizer import load_tokenizer
from dist_qft.config.schema import ModelConfig
from dist_qft.errors import UserError

TEXTS = [
    "a\n\n2. b",
    "[\n    1,",
    "x =  5",
    "year 2024 and 3.14159; 12345678 1 22 333 4444, 1,234,567; a1b2c3 12ab",
    "don't  stop\t\tnow \n\n\n ok, I'LL can't WE'VE",
    "\u00e9t\u00e9 \u5317\u4eac\uff11\uff12\uff13 \u00a0x  ",
    "   lead and trail   ",
    "a+b==c && $x<5>^~|` http://a.b/c?d=1 (a) [b] {c}; ...!!! ???",
    "\r\nwin\r\n\r\n  x",
    "foo_bar fooBar HTTPServer",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3001\u3067\u3059\u3002 \ud55c\uad6d\uc5b4",
    "emoji \U0001f600\U0001f600 ok",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440 \u0928\u092e\u0938\u094d\u0924\u0947\u0964",
    "a  \n b\t\n",
    "C\u2019est l\u2018an \u201c1999\u201d \u01c6 \ufb00 \uff41\uff42",
]
WORD, WORDS = "\u0120zzqjxk", "the zzqjxk"  # a token to which no merges lead, and a text with it
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def write(smollm2, tmp_path_factory) -> Write:
    """A function that writes a GGUF model of one tiny layer with SmolLM2's vocabulary and the given entries."""
    fields = MetadataReader(smollm2).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    tokens, types = [*tokens, WORD], [*types, gguf.TokenType.NORMAL.value]

    def made(**entries: str | bool) -> Path:
        path = tmp_path_factory.mktemp("gguf") / "model.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        for key, value in {
            "block_count": 1, "context_length": 512, "embedding_length": 32, "feed_forward_length": 32,
            "attention.head_count": 1, "vocab_size": len(tokens), "rope.dimension_count": 32,
        }.items():  # fmt: skip
            writer.add_uint32(f"llama.{key}", value)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        for key, entry in entries.items():
            (writer.add_bool if isinstance(entry, bool) else writer.add_string)(f"tokenizer.ggml.{key}", entry)
        shapes = {
            "token_embd": (len(tokens), 32),
            "output_norm": (32,),
            "blk.0.attn_norm": (32,),
            "blk.0.ffn_norm": (32,),
        }
        shapes |= {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.0.ffn_{name}": (32, 32) for name in ("gate", "up", "down")}
        for name, shape in shapes.items():
            writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float16 if len(shape) > 1 else np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return made


def by_llama_cpp(path: Path, texts: list[str]) -> list[list[int]]:
    """llama.cpp's tokens of each text, BOS and EOS among them if the file asks for them."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp, llama.cpp's binding, is not installed")
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.verbosity = str(path), 64, 1, -1
    parameters.warmup = False
    server = xllamacpp.Server(parameters)
    found = []
    for text in texts:
        body = json.dumps({"content": text, "add_special": True, "parse_special": False}).encode()
        request = urllib.request.Request(f"{server.listening_address}/tokenize", body)
        with urllib.request.urlopen(request) as answer:
            found.append(json.load(answer)["tokens"])
    return found


@pytest.fixture(scope="module")
def plain(write) -> PreTrainedTokenizerBase:
    """A tokenizer that splits as GPT-2's, as transformers reads the file of any name that it does not know."""
    return load_tokenizer(ModelConfig(path=str(write(pre="gpt-2"))))


@pytest.mark.parametrize("name", sorted({*SPLITS, *AS_GPT2}))
def test_texts_become_the_tokens_that_llama_cpp_makes_of_them(write, plain, name):
    tokenizer = copy.deepcopy(plain)
    use_rules(tokenizer, name, None)
    assert [tokenizer.encode(text) for text in [*TEXTS, WORDS]] == by_llama_cpp(write(pre=name), [*TEXTS, WORDS])


@pytest.mark.parametrize("name", [*BEGUN, "smollm"])
def test_files_are_read_with_their_rule(write, name):
    path = write(pre=name)
    tokenizer = load_tokenizer(ModelConfig(path=str(path)))
    assert [tokenizer.encode(text) for text in [*TEXTS, WORDS]] == by_llama_cpp(path, [*TEXTS, WORDS])


@pytest.mark.parametrize(
    "entries",
    [{}, {"pre": "gpt-2", "add_bos_token": True}, {"pre": "llama-bpe", "add_bos_token": False}],
    ids=["no name", "BOS asked for", "no BOS"],
)
def test_entries_beside_the_name_count(write, entries):
    path = write(**entries)
    tokenizer = load_tokenizer(ModelConfig(path=str(path)))
    assert [tokenizer.encode(text) for text in TEXTS] == by_llama_cpp(path, TEXTS)


def test_a_name_that_nobody_knows_is_refused(write):
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre: got 'nobodys', whose rule for splitting texts is not"):
        load_tokenizer(ModelConfig(path=str(write(pre="nobodys"))))


def test_the_tokenizer_of_smollm2_itself(smollm2, tmp_path):
    """And as a dense merge writes it."""
    tokenizer = load_tokenizer(ModelConfig(path=str(smollm2)))
    expected = by_llama_cpp(smollm2, TEXTS)
    assert [tokenizer.encode(text) for text in TEXTS] == expected
    copy.deepcopy(tokenizer).save_pretrained(tmp_path)
    saved = load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert [saved.encode(text) for text in TEXTS] == expected
