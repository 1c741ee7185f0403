"""Folders that bitsandbytes quantized, as they are on the Hub: the same base, byte for byte, as quantized here."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

import dist_qft
from dist_qft.base_model.model_tensors import check_names
from dist_qft.base_model.requantization import requantization_notes
from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.quant.nf4 import NF4
from tests.support.loading import loaded_fingerprint
from tests.support.qst_models import not_pruned_from
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import train_losses

CPU = torch.device("cpu")
# Name -> what bitsandbytes is told, and the section that means the same here.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "once": ({}, {}),
    "twice": ({"bnb_4bit_use_double_quant": True}, {"double_quant": True}),
    "twice, dressed": (
        {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.float32},
        {"double_quant": True},
    ),
    "dressed": ({"bnb_4bit_quant_storage": torch.bfloat16}, {}),
    "exempt": ({"llm_int8_skip_modules": ["lm_head", "o_proj"]}, {"exempt": ["o_proj"]}),
}
IDS = torch.arange(3, 40)[None]
WEIGHT = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


def quantize(source: Path, folder: Path, **settings: Any) -> Path:
    """Make such a folder as a user of transformers does."""
    how = BitsAndBytesConfig(load_in_4bit=True, **({"bnb_4bit_quant_type": "nf4"} | settings))
    AutoModelForCausalLM.from_pretrained(source, quantization_config=how).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    to = tmp_path_factory.mktemp("bitsandbytes")
    return {name: quantize(tiny_llama, to / name, **settings) for name, (settings, _) in VARIANTS.items()}


LAYOUTS = [(1, "replicated"), (2, "fsdp"), (2, "zero"), (4, "fsdp")]
# The first variant in every layout, and every variant in one of several ranks.
PAIRS = dict.fromkeys([(next(iter(VARIANTS)), layout) for layout in LAYOUTS])
PAIRS |= dict.fromkeys((name, LAYOUTS[1 + v % 3]) for v, name in enumerate(VARIANTS))


@pytest.mark.parametrize(("name", "world", "engine"), [(name, *layout) for name, layout in PAIRS])
def test_it_is_the_base_that_is_quantized_here(pools, folders, tiny_llama, name, world, engine):
    section = {"linear": "nf4", **VARIANTS[name][1]}
    here = pools[world].run(loaded_fingerprint, path=tiny_llama, engine_name=engine, quantization=section)
    assert pools[world].run(loaded_fingerprint, path=folders[name], engine_name=engine, quantization=section) == here


def dequantized(folder: Path) -> PreTrainedModel:
    """The model as transformers and bitsandbytes read it, every weight as float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for path, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            state.dtype = torch.float32
            dense = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            dense.weight.data = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
            model.set_submodule(path, dense)
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_as_it_lies_there_it_gives_the_logits_of_transformers(folders, name):
    with torch.no_grad():
        expected = dequantized(folders[name])(IDS).logits
    found = dist_qft.load(folders[name]).logits(IDS)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", VARIANTS)
def test_its_weights_are_those_of_bitsandbytes_bit_for_bit_and_rows_are_rows_of_the_whole(folders, name):
    source = open_source(ModelConfig(path=str(folders[name])))
    format = NF4(double_quant="twice" in name)
    assert source.shape(DOWN) == (64, 128)
    assert source.stored_format(DOWN) == format and source.kind(DOWN) == f"bitsandbytes {format.words}"
    packed = source.read_packed(DOWN)
    expected = dequantized(folders[name]).model.layers[1].mlp.down_proj.weight
    assert torch.equal(format.dequantize(packed, (64, 128), torch.float32), expected)
    assert torch.equal(source.read(DOWN), expected)
    for first, stop in ((0, 1), (5, 9), (7, 7), (63, 64)):
        part = source.read_packed(DOWN, (first, stop))
        for key in packed:
            start, end = (0, len(packed[key])) if format.shared(key) else (first, stop)
            per_row = 2 if key == "absmax_codes" else 1
            assert torch.equal(part[key], packed[key][start * per_row : end * per_row])
        assert torch.equal(source.read(DOWN, (first, stop)), expected[first:stop])


def test_a_run_on_it_is_the_run_on_the_floats(pools, folders, tiny_llama, tmp_path):
    def config(name: str, model: Path):
        return tiny_config(model, tmp_path / name, quantization={"linear": "nf4", "block": [64], "double_quant": True})

    here = pools[2].run(train_losses, config=config("here", tiny_llama))
    assert pools[2].run(train_losses, config=config("there", folders["twice"])) == here
    # The adapters of one go on the other.
    moved = dist_qft.load(tmp_path / "here").logits(IDS)
    assert torch.equal(dist_qft.load(tmp_path / "there").logits(IDS), moved)


@pytest.mark.parametrize("name", ["twice", "exempt"])
def test_a_side_network_can_be_pruned_from_it(pools, folders, name):
    assert pools[1].run(not_pruned_from, path=folders[name]) == [[]]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_auto_keeps_what_the_folder_holds(folders, name):
    found, notes = formats_and_notes(folders[name], {})
    section = VARIANTS[name][1]
    explicit, _ = formats_and_notes(folders[name], {"linear": "nf4", **section})
    assert found == explicit
    assert len(notes) == 1 and notes[0].endswith("weights, value for value")


@pytest.mark.parametrize(
    ("name", "section", "kind", "largest"),
    [
        ("once", {"linear": "affine4"}, "bitsandbytes nf4 64 -> affine4 [1, 32]", 10.0),
        ("once", {"linear": "nf4", "double_quant": True}, "bitsandbytes nf4 64 -> nf4 64 double quant", 2.0),
        ("twice", {"linear": "nf4"}, "bitsandbytes nf4 64 double quant -> nf4 64", 0.0),
        ("twice, dressed", {"linear": "affine4", "block": [8, 4]}, "nf4 64 double quant -> affine4 [8, 4]", 20.0),
    ],
)
def test_another_format_is_quantized_a_second_time_and_says_so(folders, name, section, kind, largest):
    _, notes = formats_and_notes(folders[name], section)
    assert len(notes) == 1 and kind in notes[0] and "quantized a second time" in notes[0]
    error = re.search(r"mean error ([\d.]+)% of the mean weight, largest ([\d.]+)%", notes[0])
    if largest == 0.0:  # the largest weight of a block is a constant of both
        assert error is None or float(error[2]) < 1e-3
        return
    assert error is not None and 0.01 < float(error[1]) < largest and float(error[1]) < float(error[2])


def formats_and_notes(folder: Path, section: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    model = ModelConfig(path=str(folder))
    base = build_skeleton(model, QuantizationConfig(**section), torch.float32)
    formats = {path: weight.format.words for path, weight in {**base.linears, **base.tables()}.items()}
    return formats, requantization_notes(base, check_names(base, open_source(model)))


def test_settings_that_kept_formats_would_ignore_are_refused(folders):
    for key, value in {"block": [32], "double_quant": True}.items():
        told = refusal(folders["once"], {key: value})
        assert told is not None and f"quantization.{key}: got {value}, must be unset" in told


def test_quantizations_that_are_not_nf4_are_refused_by_the_configuration(tiny_llama, tmp_path):
    fp4 = quantize(tiny_llama, tmp_path / "fp4", bnb_4bit_quant_type="fp4")
    assert f"model.path: '{fp4}' is already quantized by bitsandbytes fp4; must be " in refusal(fp4, {})


def test_a_quantized_head_is_held_in_a_format_for_tables(tiny_llama, tmp_path):
    folder = quantize(tiny_llama, tmp_path / "head", llm_int8_skip_modules=["o_proj"])
    formats, notes = formats_and_notes(folder, {"exempt": ["o_proj"]})
    assert formats["lm_head"] == "nf4 64" and any(
        "1 weight, value" in note or "value for value" in note for note in notes
    )


def refusal(folder: Path, section: dict[str, Any]) -> str | None:
    try:
        build_skeleton(ModelConfig(path=str(folder)), QuantizationConfig(**section), torch.float32)
    except UserError as error:
        return str(error)
    return None


def state_with(tensors: dict[str, torch.Tensor], **changes: Any) -> None:
    state = json.loads(bytes(tensors[STATE].tolist())) | changes
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def without_states(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".quant_state." in name]:
        del tensors[name]


def test_a_map_with_the_last_bits_of_another_cpu_is_the_same(folders, tmp_path):
    folder = tmp_path / "elsewhere"
    shutil.copytree(folders["twice"], folder)
    tensors = load_file(folder / "model.safetensors")
    for name, values in tensors.items():
        if name.endswith(".nested_quant_map"):
            tensors[name] = torch.nextafter(values, torch.zeros(()))
    save_file(tensors, folder / "model.safetensors")
    here, elsewhere = (open_source(ModelConfig(path=str(path))).read(DOWN) for path in (folders["twice"], folder))
    assert torch.equal(here, elsewhere)


def spoiled(tensors: dict[str, torch.Tensor], name: str, value: float) -> None:
    tensors[f"{WEIGHT}.{name}"][3] = value


@pytest.mark.parametrize(
    ("name", "damage", "error", "message"),
    [
        ("once", lambda t: state_with(t, shape=[128]), CorruptFileError, "not a description of a quantized weight"),
        ("once", lambda t: state_with(t, blocksize="64"), UserError, "got blocks of '64', must be one of 32, 64,"),
        (
            "once",
            lambda t: t.update({STATE: t[STATE][:9]}),
            CorruptFileError,
            "not a description of a quantized weight",
        ),
        ("once", lambda t: state_with(t, blocksize=48), UserError, "got blocks of 48, must be one of 32, 64,"),
        (
            "once",
            lambda t: t.update({WEIGHT: t[WEIGHT][:-1].clone()}),
            CorruptFileError,
            "elements, must be a multiple of",
        ),
        ("once", lambda t: state_with(t, shape=[64, 128]), UserError, "is [64, 128], the configuration says [128, 64]"),
        ("once", without_states, UserError, "no tensor is stored in it"),
        ("once", lambda t: spoiled(t, "quant_map", 0.5), UserError, "is not the code of this version"),
        ("once", lambda t: spoiled(t, "absmax", torch.nan), UserError, "holds a value that is not finite"),
        (
            "twice",
            lambda t: state_with(t, nested_blocksize=128),
            UserError,
            "constants in blocks of 128, must be 256",
        ),
        ("twice", lambda t: state_with(t, nested_offset=torch.inf), UserError, "holds a value that is not finite"),
        ("twice", lambda t: spoiled(t, "nested_quant_map", 0.5), UserError, "is not the code of this version"),
    ],
)
def test_damage_is_named(
    pools, folders, tmp_path, name: str, damage: Callable[[dict[str, torch.Tensor]], Any], error, message
):
    folder = tmp_path / "damaged"
    shutil.copytree(folders[name], folder)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(error) as refused:
        dist_qft.load(folder)
    assert message in str(refused.value) and str(folder) in str(refused.value)
