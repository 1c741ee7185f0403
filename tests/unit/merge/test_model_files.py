"""The small files of a result folder: the base's own bytes, and what older readers need beside them."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, Gemma4TextConfig, LlamaConfig, LlamaForCausalLM

from dist_qft.base_model.stop_tokens import eos_ids
from dist_qft.base_model.tokenizer import load_tokenizer
from dist_qft.config.schema import ModelConfig
from dist_qft.data.templates import use_template
from dist_qft.merge.names import portable_name
from dist_qft.merge.writers.model_files import _with_old_rope_keys, write_model_files
from dist_qft.tuned_model.prompts import stop_ids, turn_end_id
from tests.support.tiny_gguf import save_tiny_gguf
from tests.support.tiny_model import save_tiny_model, tiny_llama_config, tiny_tokenizer

BASE = SimpleNamespace(wrapped=False, model=object.__new__(LlamaForCausalLM), config=LlamaConfig(eos_token_id=2))
OLD = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "vocab_size": 320,
    "eos_token_id": 2,
    "odd": "  kept ",
}


@pytest.fixture
def base(tmp_path):
    """A folder as transformers 4 wrote them, with files of every kind."""
    folder = tmp_path / "base"
    folder.mkdir()
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(OLD, indent=4))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0], "temperature": 0.6}')
    for name in ("tokenizer.model", "vocab.json", "merges.txt", "LICENSE.txt", "tekken.json"):
        (folder / name).write_bytes(b"\x00own " + name.encode())
    for name in ("modeling_evil.py", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"):
        (folder / name).write_text("{}")
    return folder


def written(base, tmp_path, dtype=torch.bfloat16):
    result = tmp_path / "result"
    result.mkdir()
    model = ModelConfig(path=str(base))
    write_model_files(result, model, BASE, dtype, load_tokenizer(model))
    return result


def test_files_of_the_base_are_copied_byte_for_byte(base, tmp_path):
    result = written(base, tmp_path)
    copied = {file.name for file in result.iterdir()}
    weights = {"modeling_evil.py", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"}
    assert copied == {file.name for file in base.iterdir()} - weights
    for name in copied:
        assert (result / name).read_bytes() == (base / name).read_bytes(), name


def test_every_template_of_the_base_is_copied_or_none(base, tmp_path):
    more = base / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("{{ tools | tojson }}")
    tokenizer = load_tokenizer(ModelConfig(path=str(base)))
    assert load_tokenizer(ModelConfig(path=str(written(base, tmp_path)))).chat_template == tokenizer.chat_template
    trained_with, result = use_template(tokenizer, "alpaca"), tmp_path / "another"
    result.mkdir()
    write_model_files(result, ModelConfig(path=str(base)), BASE, torch.bfloat16, trained_with)
    assert load_tokenizer(ModelConfig(path=str(result))).chat_template == trained_with.chat_template


def test_another_dtype_is_said_in_both_spellings_and_code_is_not_named(base, tmp_path):
    extra = {"auto_map": {"AutoConfig": "modeling_evil.Config"}, "quantization_config": {"load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(OLD | extra))
    config = json.loads((written(base, tmp_path, torch.float16) / "config.json").read_text())
    assert config == OLD | {"dtype": "float16", "torch_dtype": "float16"}


ROPES = [
    {"rope_type": "default", "rope_theta": 250000.0},
    {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
]  # fmt: skip


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_new_rope_keys_get_their_old_spelling_and_read_the_same(base, tmp_path, rope):
    new = {key: value for key, value in OLD.items() if not key.startswith("rope")} | {"rope_parameters": rope}
    (base / "config.json").write_text(json.dumps(new | {"dtype": "bfloat16"}))
    result = written(base, tmp_path)
    config = json.loads((result / "config.json").read_text())
    assert config["rope_theta"] == rope["rope_theta"] and config["torch_dtype"] == "bfloat16"
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert config["rope_scaling"] == (None if rope["rope_type"] == "default" else scaling)
    assert AutoConfig.from_pretrained(result).rope_parameters == AutoConfig.from_pretrained(base).rope_parameters


def test_rope_keys_that_a_family_refuses_are_not_added(tmp_path):
    """Gemma 4 has rotary embeddings of two kinds, and its class refuses a scaling without a theta of its own."""
    content = Gemma4TextConfig(layer_types=["sliding_attention", "full_attention"], num_hidden_layers=2).to_dict()
    assert content["rope_parameters"]["full_attention"]["rope_type"] == "proportional"
    assert _with_old_rope_keys(content, tmp_path) == content


def test_a_turn_end_that_the_base_does_not_know_is_added_to_the_stops(base, tmp_path):
    (base / "generation_config.json").write_text('{"eos_token_id": 7, "top_p": 0.9}')
    result = written(base, tmp_path)
    end = tiny_tokenizer().eos_token_id
    assert json.loads((result / "generation_config.json").read_text()) == {"eos_token_id": [7, end], "top_p": 0.9}
    (base / "generation_config.json").unlink()
    (result / "generation_config.json").unlink()
    model = ModelConfig(path=str(base))
    write_model_files(result, model, BASE, torch.bfloat16, load_tokenizer(model))
    assert json.loads((result / "generation_config.json").read_text()) == {"eos_token_id": end}


def test_stops_are_those_of_all_three_places():
    tokenizer = tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn_end_id(tokenizer) == end
    assert stop_ids([5, 0, 5], tokenizer) == [5, 0, end] and stop_ids(None, tokenizer) == [end]
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert turn_end_id(tokenizer) is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [('{"eos_token_id": [0, 2]}', [2, 0]), ("[]", [2]), ("{", [2]), ('{"eos_token_id": 9}', [2, 9])],
)
def test_ends_of_generation_config_are_read(tmp_path, content, expected):
    (tmp_path / "generation_config.json").write_text(content)
    assert eos_ids(ModelConfig(path=str(tmp_path)), BASE.config) == expected


def test_a_gguf_base_gives_files_that_old_readers_understand(tmp_path):
    path = save_tiny_gguf(tmp_path / "tiny.gguf")
    result = written(path, tmp_path)
    config = json.loads((result / "config.json").read_text())
    assert {"rope_theta", "rope_scaling", "rope_parameters", "dtype", "torch_dtype"} <= config.keys()
    tokenizer = json.loads((result / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] != "TokenizersBackend" and not {"backend", "is_local"} & tokenizer.keys()
    assert not isinstance(tokenizer.get("extra_special_tokens"), list)
    again, own = load_tokenizer(ModelConfig(path=str(result))), load_tokenizer(ModelConfig(path=str(path)))
    text = "the quiet sea <|im_end|> had left"
    assert again(text).input_ids == own(text).input_ids and again.chat_template == own.chat_template


def test_names_of_bases_mean_something_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    assert portable_name("base") == str(tmp_path / "base") and portable_name("owner/name") == "owner/name"
    snapshot = tmp_path / "hub" / "models--owner--some-name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert portable_name(str(snapshot)) == "owner/some-name"
    for gone in ("/home/somebody/rows-*.jsonl", "~/rows-*.jsonl"):
        assert portable_name(gone, short=True) == "rows-*.jsonl" and portable_name(gone) == gone
    assert portable_name("owner/name", short=True) == "owner/name"


def test_tiny_models_are_as_transformers_writes_them(tmp_path):
    """The fixture of other tests has rope_parameters alone: the case above is the usual one."""
    config = json.loads((save_tiny_model(tmp_path, tiny_llama_config()) / "config.json").read_text())
    assert "rope_parameters" in config and "rope_theta" not in config
