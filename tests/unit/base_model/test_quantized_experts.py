"""Stacks of experts whose files hold each expert by itself, quantized: kept value for value, never dense unasked."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tests.support.tiny_gguf_mixture as gguf_mixture
from dist_qft.base_model.load import load_base
from dist_qft.base_model.model_tensors import check_names
from dist_qft.base_model.requantization import requantization_notes
from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.quant.affine4 import Affine4
from dist_qft.quant.codebook4 import Codebook4
from dist_qft.quant.contract import Format
from dist_qft.quant.dense import Dense
from dist_qft.quant.formats import described_format
from dist_qft.quant.nf4 import NF4
from dist_qft.quant.q8_0 import Q8_0
from dist_qft.sharding.replicated import ReplicatedEngine
from tests.support.quantized_experts import (
    EXPERTS,
    Meant,
    save_act_order,
    save_bitsandbytes,
    save_nvfp4,
    save_one_small_scale,
)


def stack_of(meant: Meant, product: str) -> Tensor:
    """A stack's values, one expert's rows below the other's."""
    parts = ("gate_proj", "up_proj") if product == "gate_up_proj" else (product,)
    return torch.cat([meant[f"{EXPERTS}.{expert}.{part}.weight"] for expert in range(4) for part in parts])


def loaded(path: Path, **quantization: str) -> tuple[BaseModel, list[str]]:
    """The base as a run holds it, and the lines on what became of its weights."""
    model = ModelConfig(path=str(path))
    base, source = build_skeleton(model, QuantizationConfig(**quantization), torch.float32), open_source(model)
    engine = ReplicatedEngine()
    engine.shard(base.units, torch.device("cpu"))
    load_base(base, source, engine, torch.device("cpu"))
    return base, requantization_notes(base, check_names(base, source))


def stacks_of(base: BaseModel) -> Iterator[tuple[str, Format, Tensor]]:
    for product in ("gate_up_proj", "down_proj"):
        stack = base.experts[f"{EXPERTS}.{product}"]
        yield product, stack.format, stack.dequantize()


KEPT: dict[str, tuple[Callable[[Path], Meant], Format, Format]] = {
    "NVFP4": (save_nvfp4, Codebook4("nvfp4-divided", by_row=True), Codebook4("nvfp4-divided", by_row=True)),
    "bitsandbytes": (save_bitsandbytes, NF4(32), NF4(32)),
    "one scale": (save_one_small_scale, Affine4((1, 16), "float32"), Affine4((1, 16))),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("linear", ["auto", "stored"])
def test_stacks_are_kept_value_for_value(tmp_path, name, linear):
    save, gate_up, down = KEPT[name]
    meant = save(tmp_path)
    base, notes = loaded(tmp_path, linear=linear)
    for (product, format, values), expected in zip(stacks_of(base), (gate_up, down), strict=True):
        assert format == expected
        assert torch.equal(values, stack_of(meant, product)), product
    assert all(note.endswith("value for value") for note in notes)


def test_a_stack_that_cannot_be_kept_is_quantized_again_and_said(tmp_path):
    """Each expert's inputs have groups of their own; rows of one table cannot have."""
    meant = save_act_order(tmp_path)
    base, notes = loaded(tmp_path)
    for product, format, values in stacks_of(base):
        block = 64 if product == "gate_up_proj" else 32
        expected = stack_of(meant, product)
        assert format == NF4(block)
        assert torch.equal(values, format.dequantize(format.quantize(expected), expected.shape, torch.float32))
    assert sum("act-order -> nf4" in note and "quantized a second time, mean error" in note for note in notes) == 2


def test_stored_has_the_values_of_such_a_stack_as_floats(tmp_path):
    meant = save_act_order(tmp_path)
    for product, format, values in stacks_of(loaded(tmp_path, linear="stored")[0]):
        assert format == Dense() and torch.equal(values, stack_of(meant, product))


@pytest.mark.parametrize(
    ("up", "format", "line"),
    [
        ("Q8_0", Q8_0(), "GGUF Q4_1 and GGUF Q8_0 -> q8_0: 2 weights, quantized a second time, mean error"),
        ("Q4_0", Affine4((1, 32)), "GGUF Q4_1 and GGUF Q4_0 -> affine4 [1, 32]: 2 weights, value for value"),
    ],
)
def test_mixed_types_of_a_gguf_file(tmp_path, monkeypatch, up, format, line):
    parts = gguf_mixture._parts
    monkeypatch.setattr(
        gguf_mixture,
        "_parts",
        lambda *args: [(name, part, up if "ffn_up_exps" in name else kind) for name, part, kind in parts(*args)],
    )
    file = tmp_path / "mixture.gguf"
    gguf_mixture.save_mixture_gguf(file, "qwen3moe")
    base, notes = loaded(file)
    assert {path.rpartition(".")[2]: stack.format for path, stack in base.experts.items()} == {
        "gate_up_proj": format,
        "down_proj": Affine4((1, 32)),
    }
    assert sum(note.startswith(line) for note in notes) == 1


def test_floats_beside_quantized_experts_stay_floats(tmp_path):
    """Experts that cannot be kept do not make the base one of floats, which would be quantized whole."""
    save_act_order(tmp_path, exempt=("q_proj", "k_proj", "v_proj", "o_proj"))
    base, _ = loaded(tmp_path)
    assert {layer.format for layer in base.linears.values()} == {Dense()}
    assert {stack.format.name for stack in base.experts.values()} == {"nf4"}


def test_a_description_of_rows_with_their_own_scale_is_read_again():
    for format in (Codebook4("nvfp4"), Codebook4("nvfp4", by_row=True)):
        assert described_format(json.loads(json.dumps(format.describe()))) == format
