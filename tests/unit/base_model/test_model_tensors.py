"""Checkpoints as people publish them: their names, what they lack, and what nothing takes."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
)

from dist_qft.base_model.model_tensors import check_names
from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.base_model.sources import SafetensorsSource
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.errors import UserError
from tests.support.families import copied, open_base, refused, states_of, tokens_of


def test_sharded_files_with_an_index(folder_of, tmp_path):
    folder = folder_of("llama")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(states_of(tmp_path), states_of(folder))


def test_checkpoint_of_the_bare_decoder(folder_of, tmp_path):
    folder = folder_of("llama-tied")
    tensors = load_file(folder / "model.safetensors")
    bare = copied(folder, tmp_path, {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    assert "layers.0.mlp.up_proj.weight" in SafetensorsSource(bare).names()
    assert torch.equal(states_of(bare), states_of(folder))


@pytest.mark.parametrize(("family", "name"), [("gpt_neox", "embed_out.weight"), ("mixtral", "experts.3.w2.weight")])
def test_published_names(folder_of, family, name):
    """The logits test shows that they are read; this shows that the folder does have them."""
    assert any(stored.endswith(name) for stored in SafetensorsSource(folder_of(family)).names())


def changed(folder: Path, to: Path, tensors: dict[str, Tensor], **keys: object) -> Path:
    path = copied(folder, to, tensors)
    tree = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(tree | keys))
    return path


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_layers_than_the_files_hold(folder_of, tmp_path, count):
    folder = folder_of("llama")
    path = changed(folder, tmp_path / "x", load_file(folder / "model.safetensors"), num_hidden_layers=count)
    assert refused(path) == f"{path}: holds 2 decoder layers, the configuration says {count}"


@pytest.mark.parametrize("count", [2, 8])
def test_another_number_of_experts_than_the_files_hold(folder_of, tmp_path, count):
    folder = folder_of("qwen3_moe")
    keys = dict.fromkeys(("num_experts", "num_local_experts"), count)
    path = changed(folder, tmp_path / "x", load_file(folder / "model.safetensors"), **keys)
    text = refused(path)
    assert "holds 4 experts of 'model.layers.0.mlp.experts." in text
    assert text.endswith(f"the configuration says {count}")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_integers_where_floats_are_meant(folder_of, tmp_path, dtype):
    folder = folder_of("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    assert "'model.norm.weight' holds integers" in refused(copied(folder, tmp_path / "x", tensors))


@torch.no_grad()
def test_a_stored_head_counts_though_the_configuration_ties_it(folder_of, tmp_path):
    """transformers compares the two tables and does the same."""
    folder = folder_of("llama-tied")
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    same = open_base(copied(folder, tmp_path / "same", tensors | {"lm_head.weight": table.clone()}))
    other = copied(folder, tmp_path / "other", tensors | {"lm_head.weight": table.flip(0).contiguous()})
    base = open_base(other)
    assert (same.tied, base.tied) == (True, False)
    assert any("the files hold another one, which counts" in note for note in base.notes)
    tokens, positions = tokens_of(1, 8)
    expected = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(base.model(input_ids=tokens, position_ids=positions).logits, expected)


@pytest.mark.parametrize("section", [None, {"linear": "nf4", "block": [32], "embedding": "q8_0"}])
def test_a_tied_table_may_be_stored_as_the_head_alone(folder_of, tmp_path, section):
    """`safetensors.torch.save_model` keeps the name that comes first; transformers reads such a file."""
    folder = folder_of("llama-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    head_alone = copied(folder, tmp_path, tensors)
    base, usual = open_base(head_alone, section), open_base(folder, section)
    assert base.tied and base.fingerprint == usual.fingerprint and base.notes == usual.notes
    expected = AutoModelForCausalLM.from_pretrained(head_alone).get_input_embeddings().weight
    assert torch.equal(expected, load_file(folder / "model.safetensors")["model.embed_tokens.weight"])
    files = check_names(base, SafetensorsSource(head_alone))
    assert files.notes == [] and files.stored_name("model.embed_tokens.weight") == "lm_head.weight"


def test_tables_that_are_not_tied_are_both_needed(folder_of, tmp_path):
    tensors = load_file(folder_of("llama") / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    assert "has no tensor 'model.embed_tokens.weight'" in refused(copied(folder_of("llama"), tmp_path, tensors))


@pytest.mark.parametrize(("family", "limit"), [("opt", 64), ("llama", None)])
def test_samples_longer_than_the_learned_positions(folder_of, family, limit):
    base = build_skeleton(ModelConfig(path=str(folder_of(family))), QuantizationConfig(linear="dense"), torch.float32)
    base.require_positions(64)
    with pytest.raises(UserError, match=r"^data\.max_length: got 65, must be at most 64") if limit else nullcontext():
        base.require_positions(65)


def test_tensors_that_nothing_takes_are_named(folder_of, tmp_path):
    folder = folder_of("llama")
    tensors = load_file(folder / "model.safetensors")
    cache = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    path = copied(folder, tmp_path / "x", tensors | cache | {"model.layers.0.odd.bias": torch.ones(3)})
    base = build_skeleton(ModelConfig(path=str(path)), QuantizationConfig(linear="dense"), torch.float32)
    (note,) = check_names(base, SafetensorsSource(path)).notes
    assert note.endswith("does not take: model.layers.0.odd.bias")
    assert check_names(base, SafetensorsSource(folder)).notes == []


def test_other_safetensors_beside_the_model_are_left_alone(folder_of, tmp_path):
    folder = folder_of("llama")
    tensors = load_file(folder / "model.safetensors")
    both = copied(folder, tmp_path, tensors)
    save_file({"model.norm.weight": tensors["model.norm.weight"] + 1}, both / "adapter_model.safetensors")
    assert torch.equal(states_of(both), states_of(folder))
