"""gpt-oss's own layout, experts in MXFP4: read byte for byte, computed as transformers does, trained, merged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import dist_qft
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig
from dist_qft.errors import DistQFTError
from dist_qft.plan import make_plan
from dist_qft.quant.codebook4 import Codebook4
from tests.support.loading import loaded_fingerprint
from tests.support.merges import merge_run
from tests.support.packed_folders import float_twin, set_quantization
from tests.support.tiny_model import VOCABULARY, save_tiny_model, tiny_config
from tests.support.whole_runs import train_losses

IDS = torch.arange(3, 40)[None]
STACKS = [f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")]
SETTINGS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        vocab_size=VOCABULARY,
        initializer_range=0.1,
    )
    folder = save_tiny_model(tmp_path_factory.mktemp("gpt-oss"), config)
    generator = torch.Generator().manual_seed(2)
    tensors = load_file(folder / "model.safetensors")
    for stack in STACKS:
        experts, inputs, outputs = tensors.pop(stack).shape
        size = (experts, outputs, inputs // 32)
        tensors[f"{stack}_blocks"] = torch.randint(0, 256, (*size, 16), generator=generator).to(torch.uint8)
        tensors[f"{stack}_scales"] = torch.randint(119, 125, size, generator=generator).to(torch.uint8)
        tensors[f"{stack}_bias"].normal_(std=0.1, generator=generator)
    save_file(tensors, folder / "model.safetensors")
    set_quantization(folder, SETTINGS)
    return folder


def meant(folder: Path) -> dict[str, torch.Tensor]:
    """The weights by transformers' own conversion, with inputs before outputs."""
    tensors = load_file(folder / "model.safetensors")
    return {
        stack: convert_moe_packed_tensors(tensors[f"{stack}_blocks"], tensors[f"{stack}_scales"], dtype=torch.float32)
        for stack in STACKS
    }


def test_weights_are_those_of_transformers_and_bytes_those_of_the_file(folder):
    source = open_source(ModelConfig(path=str(folder)))
    tensors = load_file(folder / "model.safetensors")
    for stack, expected in meant(folder).items():
        name = f"{stack}.weight"
        assert source.stored_format(name) == Codebook4("mxfp4")
        assert torch.equal(source.read(name), expected.transpose(1, 2))
        assert torch.equal(source.read(name, (1, 3)), expected.transpose(1, 2)[1:3])
        height = expected.shape[0] * expected.shape[2]
        for first, stop in ((0, height), (5, 5), (60, 200)):  # across the border of experts
            packed = source.read_packed(name, (first, stop))
            blocks = tensors[f"{stack}_blocks"].view(height, -1)
            assert torch.equal(packed["codes"], blocks[first:stop])
            assert torch.equal(packed["scale"], tensors[f"{stack}_scales"].view(height, -1)[first:stop])


@torch.no_grad()
def test_the_logits_are_those_of_the_same_weights_as_floats(folder, tmp_path):
    twin = float_twin(folder, tmp_path / "floats", meant(folder), ("_blocks", "_scales"))
    expected = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)(IDS).logits
    loaded = dist_qft.load(folder)
    assert (loaded.logits(IDS) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert {weight.format for weight in loaded.base.experts.values()} == {Codebook4("mxfp4")}
    assert {weight.format.name for weight in loaded.base.linears.values()} == {"dense"}


def test_trained_and_merged_on_two_ranks(pools, folder, tmp_path):
    for engine in ("fsdp", "zero"):
        request = {"path": folder, "quantization": {}, "engine_name": engine, "attention": "eager"}
        alone = pools[1].run(loaded_fingerprint, **{**request, "engine_name": "replicated"})
        assert pools[2].run(loaded_fingerprint, **request) == alone * 2
    sections = {"quantization": {"linear": "auto", "block": None}, "method": {"name": "qlora", "rank": 4}}
    config = tiny_config(folder, tmp_path / "run", **sections)
    config = config.model_copy(update={"model": config.model.model_copy(update={"attention": "eager"})})
    notes = [note for note in make_plan(config, 2).warnings if " -> " in note]
    assert notes == ["MXFP4 (stacked experts) -> codebook4 mxfp4: 4 weights, value for value"]
    losses = pools[2].run(train_losses, config=config)
    assert losses[0] == losses[1] and len(losses[0]) == 4
    pools[2].run(merge_run, source=Path(config.output_dir), target="dense", path=tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)(IDS).logits
        live = dist_qft.load(config.output_dir).logits(IDS)
        before = dist_qft.load(folder).logits(IDS)
    assert not torch.equal(live, before)
    torch.testing.assert_close(theirs, live, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("scales", lambda t: t[:, :1].contiguous(), "must be U8"),
        ("scales", lambda t: t.int(), "is I32"),
        ("scales", lambda t: t.fill_(255), "not finite"),
        ("scales", None, "has no tensor"),
        ("blocks", lambda t: t[..., :8].contiguous(), "must be U8"),
        ("blocks", lambda t: t.flatten(1), "must be experts, rows, blocks, bytes"),
        ("blocks", lambda t: t[:, :, :1].contiguous(), "must be U8"),
    ],
)
def test_damage_is_named(folder, tmp_path, name, damage, words):
    tensors = load_file(folder / "model.safetensors")
    changed = tensors.pop(f"{STACKS[0]}_{name}")
    if damage:
        tensors[f"{STACKS[0]}_{name}"] = damage(changed)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(DistQFTError) as refused:
        open_source(ModelConfig(path=str(tmp_path))).read_packed(f"{STACKS[0]}.weight")
    assert words in str(refused.value) and "\n" not in str(refused.value) and refused.value.exit_code in (2, 5)
