"""int4 folders of GPTQ, AWQ, AutoRound and compressed-tensors: every weight is the one they mean, on any ranks."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dist_qft
from dist_qft.base_model.model_tensors import check_names
from dist_qft.base_model.requantization import requantization_notes
from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.errors import DistQFTError
from dist_qft.quant.affine4 import Affine4
from dist_qft.quant.affine4_gathered import Affine4Gathered
from tests.support.loading import loaded_fingerprint
from tests.support.packed_folders import awq, compressed, float_twin, gptq, save_int4_folder
from tests.support.tiny_model import tiny_config, tiny_llama_config
from tests.support.whole_runs import train_losses

IDS = torch.arange(3, 40)[None]
PARTS = ("qweight", "qzeros", "scales", "g_idx", "_packed", "weight_scale", "_zero_point", "_shape")
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "desc_act": False,
    "checkpoint_format": "gptq",
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
# Widths: 96 inputs, 152 of the MLP (no multiple of a group), 24 outputs of k and v; biases; o_proj left as floats.
VARIANTS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "gptq": (gptq, GPTQ, {"group": 32, "symmetric": True}),
    "gptq, odd groups": (gptq, GPTQ | {"group_size": 48}, {"group": 48, "symmetric": True}),
    "gptq, one group": (gptq, GPTQ | {"group_size": -1}, {"group": -1, "symmetric": True}),
    "gptq v2": (partial(gptq, less=0), GPTQ | {"checkpoint_format": "gptq_v2"}, {"group": 32, "symmetric": True}),
    "gptq asymmetric": (gptq, GPTQ | {"sym": False}, {"group": 32, "symmetric": False}),
    "gptq act-order": (gptq, GPTQ | {"desc_act": True}, {"group": 32, "symmetric": True, "act_order": True}),
    "gptq asymmetric act-order": (
        gptq,
        GPTQ | {"sym": False, "desc_act": True},
        {"group": 32, "symmetric": False, "act_order": True},
    ),
    "awq": (awq, AWQ, {"group": 32, "symmetric": False}),
    "auto-round": (gptq, ROUND | {"packing_format": "auto_round:auto_gptq"}, {"group": 32, "symmetric": True}),
    "auto-round, own zeros": (
        partial(gptq, less=0),
        ROUND | {"packing_format": "auto_round", "sym": False},
        {"group": 32, "symmetric": False},
    ),
    "auto-round awq": (awq, ROUND | {"packing_format": "auto_round:auto_awq"}, {"group": 32, "symmetric": False}),
    "compressed": (compressed, COMPRESSED, {"group": 8, "symmetric": True, "scale_dtype": torch.bfloat16}),
    "compressed float32": (compressed, COMPRESSED, {"group": 8, "symmetric": False, "scale_dtype": torch.float32}),
    "compressed one group": (compressed, COMPRESSED, {"group": -1, "symmetric": True}),
    "compressed asymmetric": (compressed, COMPRESSED, {"group": 8, "symmetric": False, "scale_dtype": torch.bfloat16}),
}
DOWN, KEYS = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight"


def odd_config():
    return tiny_llama_config(
        hidden_size=96,
        intermediate_size=152,
        num_attention_heads=4,
        num_key_value_heads=1,
        num_hidden_layers=2,
        attention_bias=True,
        initializer_range=0.05,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    to, made = tmp_path_factory.mktemp("int4"), {}
    for name, (pack, settings, options) in VARIANTS.items():
        meant = save_int4_folder(to / name, odd_config(), pack, settings, exempt=("o_proj",), **options)
        made[name] = (to / name, meant)
    return made


@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_is_the_one_that_is_meant_and_rows_are_rows_of_the_whole(folders, name):
    folder, meant = folders[name]
    source = open_source(ModelConfig(path=str(folder)))
    for weight, expected in meant.items():
        assert source.shape(weight) == tuple(expected.shape) and source.is_float(weight)
        assert torch.equal(source.read(weight), expected), weight
    for weight in (DOWN, KEYS):
        format, whole = source.stored_format(weight), source.read_packed(weight)
        for first, stop in ((0, 1), (5, 9), (7, 7), (3, 24)):
            part = source.read_packed(weight, (first, stop))
            for key in whole:
                assert torch.equal(part[key], whole[key] if format.shared(key) else whole[key][first:stop])
            assert torch.equal(source.read(weight, (first, stop)), meant[weight][first:stop])
    assert {"model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.q_proj.bias"} <= source.names()
    assert not any(part.endswith(PARTS) for part in source.names())


def test_the_formats_are_those_that_hold_the_values(folders):
    found = {
        name: open_source(ModelConfig(path=str(folder))).stored_format(KEYS) for name, (folder, _) in folders.items()
    }
    assert found["gptq"] == found["gptq v2"] == found["auto-round"] == Affine4((1, 32))
    assert found["gptq, odd groups"] == Affine4((1, 48)) and found["gptq, one group"] == Affine4((1, 96))
    assert found["gptq asymmetric"] == found["awq"] == Affine4((1, 32), "float32")
    assert found["gptq act-order"] == Affine4Gathered(3, "float16")
    assert found["compressed"] == Affine4((1, 8)) and found["compressed one group"] == Affine4((1, 96))
    # 152 inputs in groups of 48 end within a group: blocks of 8 are whole in each.
    odd = open_source(ModelConfig(path=str(folders["gptq, odd groups"][0])))
    assert odd.stored_format(DOWN) == Affine4((1, 8))


@pytest.mark.parametrize("name", ["gptq, odd groups", "gptq asymmetric act-order", "awq", "compressed asymmetric"])
def test_the_logits_are_those_of_the_same_weights_as_floats(folders, tmp_path, name):
    folder, meant = folders[name]
    twin = float_twin(folder, tmp_path / "floats", meant, PARTS)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)(IDS).logits
    found = dist_qft.load(folder).logits(IDS)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("world", "engine"), [(2, "fsdp"), (2, "zero"), (3, "fsdp")])
def test_the_same_base_on_any_number_of_ranks(pools, folders, world, engine):
    for name in ("gptq, odd groups", "gptq asymmetric act-order", "awq"):
        request = {"path": folders[name][0], "quantization": {}}
        alone = pools[1].run(loaded_fingerprint, engine_name="replicated", **request)
        assert pools[world].run(loaded_fingerprint, engine_name=engine, **request) == alone * world


def test_float16_zeros_say_how_far_they_move_a_weight(folders):
    model = ModelConfig(path=str(folders["awq"][0]))
    base = build_skeleton(model, QuantizationConfig(linear="affine4", exempt=["o_proj", "down_proj"]), torch.float32)
    notes = requantization_notes(base, check_names(base, open_source(model)))
    kept = [note for note in notes if "affine4 [1, 32]" in note]
    assert len(kept) == 1 and "codes kept, constants rounded, off by at most" in kept[0]
    assert 0 < float(kept[0].split(" of a step")[0].split()[-1]) < 0.01


def test_qahira_on_a_symmetric_base_merges_exactly(pools, tmp_path):
    """Trained with the zeros that the merge writes, so the merged model is the trained one, bit for bit."""
    config = tiny_llama_config(num_hidden_layers=2)
    save_int4_folder(tmp_path / "base", config, gptq, GPTQ, group=32, symmetric=True)
    run = tiny_config(
        tmp_path / "base",
        tmp_path / "run",
        quantization={"linear": "auto", "block": None},
        method={"name": "qahira", "pool": 32, "repeat": 1, "merge_aware": True},
        merge={"at_end": "quantized"},
    )
    losses = pools[2].run(train_losses, config=run)[0]
    assert losses[-1] < losses[0]
    merged = tmp_path / "run" / "merged-quantized"
    certificate = json.loads((merged / "certificate.json").read_text())
    assert certificate["kind"] == "exact" and certificate["lossless"] and certificate["logits"]["maximum"] == 0.0
    assert torch.equal(dist_qft.load(merged).logits(IDS), dist_qft.load(tmp_path / "run").logits(IDS))
    before = open_source(ModelConfig(path=str(tmp_path / "base")))
    after = open_source(ModelConfig(path=str(merged)))
    old, new = before.read_packed(KEYS), after.read_packed(KEYS)
    assert torch.equal(old["codes"], new["codes"]) and torch.equal(old["scale"], new["scale"])
    assert not torch.equal(old["zero"], new["zero"])


# --- refusals --------------------------------------------------------------------------------------------------------


def without(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


GATE = "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("gptq", lambda t, c: without(t, f"{GATE}.scales"), "has no tensor"),
        ("gptq", lambda t, c: t.update({f"{GATE}.scales": t[f"{GATE}.scales"][:-1].clone()}), "must be 3"),
        ("gptq", lambda t, c: t[f"{GATE}.scales"].fill_(torch.inf), "not finite"),
        ("gptq", lambda t, c: t[f"{GATE}.g_idx"].fill_(77), "names group 77 of 3"),
        ("gptq", lambda t, c: t[f"{GATE}.qzeros"].fill_(0), "its zeros are not all 8"),
        ("gptq", lambda t, c: t.update({f"{GATE}.qzeros": t[f"{GATE}.qzeros"].long()}), "must be I32"),
        ("gptq", lambda t, c: c.update(bits=8), "only 4-bit integers are supported"),
        ("gptq", lambda t, c: c.update(group_size="a"), "group_size: got 'a'"),
        ("gptq", lambda t, c: c.update(quant_method="vptq"), "already quantized by vptq"),
        ("awq", lambda t, c: c.update(version="gemv"), "AWQ version 'gemv'"),
        ("compressed", lambda t, c: t[f"{GATE}.weight_shape"].fill_(-1), "says -1 x -1"),
        ("compressed", lambda t, c: t[f"{GATE}.weight_shape"].fill_(300), "is not packed in 4 bits"),
        ("compressed", lambda t, c: c.update(transform_config={"config_groups": {"u": {}}}), "transform_config"),
        ("compressed", lambda t, c: without(t, f"{GATE}.weight_scale"), "has no tensor"),
        ("compressed", lambda t, c: t.update({f"{GATE}.weight_scale": torch.ones(())}), "must be a matrix"),
        (
            "gptq",
            lambda t, c: t.update({f"{GATE}.qweight": torch.zeros(0, 152, dtype=torch.int32)}),
            "must be a matrix",
        ),
        ("gptq", lambda t, c: t[f"{GATE}.scales"].fill_(6e4), "not finite"),
        ("gptq", lambda t, c: c.update(dynamic={"(": {"bits": 4}}), "'dynamic' has the pattern"),
        ("gptq", lambda t, c: c.update(quant_method=["gptq"]), "already quantized by"),
    ],
)
def test_damage_is_named(folders, tmp_path, name, damage, words):
    folder = tmp_path / "damaged"
    folder.mkdir()
    tensors = load_file(folders[name][0] / "model.safetensors")
    tree = json.loads((folders[name][0] / "config.json").read_text())
    damage(tensors, tree["quantization_config"])
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(tree))
    with pytest.raises(DistQFTError) as refused:
        source = open_source(ModelConfig(path=str(folder)))
        source.read_packed(f"{GATE}.weight")
    assert words in str(refused.value) and "\n" not in str(refused.value) and refused.value.exit_code in (2, 5)
