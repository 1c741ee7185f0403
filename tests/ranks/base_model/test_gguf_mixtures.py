"""Mixtures of experts in GGUF files: stacks read by rows in the file's own format, merged beside untouched experts."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dist_qft
from dist_qft.base_model.gguf_file import GgufSource
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.merge.verify import run_verify
from tests.support.merges import GGUF_RUN, merge_run
from tests.support.tiny_gguf import tensors_of
from tests.support.tiny_gguf_mixture import save_mixture_gguf

IDS = torch.tensor([[5, 40, 77, 120, 33, 9, 201, 60, 12, 300]])


@pytest.mark.parametrize(
    ("architecture", "experts", "held"),
    [
        ("qwen3moe", "Q4_1", "affine4"),
        ("llama", "Q4_0", "affine4"),
        ("qwen3moe", "Q8_0", "q8_0"),
        ("qwen2moe", "Q4_1", "affine4"),
    ],
)
@torch.no_grad()
def test_logits_are_those_of_the_values_in_the_file(tmp_path, architecture, experts, held):
    model = save_mixture_gguf(tmp_path / "tiny.gguf", architecture, experts)
    loaded = dist_qft.load(tmp_path / "tiny.gguf")
    assert {stack.format.name for stack in loaded.base.experts.values()} == {held}
    assert (
        loaded.base.config.model_type
        == {
            "llama": "mixtral",
            "qwen2moe": "qwen2_moe",
            "qwen3moe": "qwen3_moe",
        }[architecture]
    )
    torch.testing.assert_close(loaded.logits(IDS), model(IDS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_files_from_before_there_were_stacks_hold_each_expert_alone(tmp_path):
    path = tmp_path / "tiny.gguf"
    model = save_mixture_gguf(path, "llama", "Q4_1", stacked=False)
    assert "blk.1.ffn_down.3.weight" in tensors_of(path)
    torch.testing.assert_close(dist_qft.load(path).logits(IDS), model(IDS).logits, rtol=1e-4, atol=1e-4)
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_down.3.weight", b"blk.1.ffn_down.9.weight"))
    with pytest.raises(UserError, match=r"tensor 'blk.1.ffn_down.9.weight' has no place in this architecture"):
        dist_qft.load(path)


def test_a_merge_keeps_the_files_experts_however_the_run_held_them(pools, make_run, tmp_path):
    save_mixture_gguf(tmp_path / "tiny.gguf", "qwen3moe", "Q8_0")
    run, path = make_run(tmp_path / "tiny.gguf", **GGUF_RUN), tmp_path / "merged.gguf"
    certificate = pools[2].run(merge_run, source=run, target="gguf", path=path)[0]
    assert certificate.kind == "exact" and "experts.gate_up_proj (Q8_0, held as affine4)" in certificate.notes[0]
    before, after = tensors_of(tmp_path / "tiny.gguf"), tensors_of(path)
    changed = {name for name, (_, raw) in before.items() if not np.array_equal(raw, after[name][1])}
    assert changed == {f"blk.{i}.attn_{part}.weight" for i in (0, 1) for part in ("q", "k", "v", "output")}
    run_verify(path)
    run = make_run(tmp_path / "tiny.gguf", **GGUF_RUN | {"method": {**GGUF_RUN["method"], "targets": ["experts"]}})
    with pytest.raises(Exception, match=r"--to gguf: .*gate_up_proj is a stack of experts"):
        pools[1].run(merge_run, source=run, target="gguf", path=tmp_path / "other.gguf")


def test_a_stack_of_another_number_of_experts_is_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    save_mixture_gguf(path, "qwen3moe")
    field = gguf.GGUFReader(path).fields["qwen3moe.expert_count"]
    with path.open("r+b") as file:
        file.seek(field.offset + sum(part.nbytes for part in field.parts[:-1]))
        file.write((3).to_bytes(4, "little"))
    with pytest.raises(CorruptFileError, match=r"ffn_gate_exps.weight' is \[4, 64, 64\], must be a stack of 3 experts"):
        dist_qft.load(path)


@pytest.mark.parametrize("architecture", ["qwen3moe", "llama", "qwen2moe"])
@torch.no_grad()
def test_a_dense_merge_has_the_tensors_that_such_models_publish(pools, make_run, tmp_path, architecture):
    """One for each expert and product, as vLLM and others read them; not the stacks of one library."""
    save_mixture_gguf(tmp_path / "tiny.gguf", architecture, "Q8_0")
    run, path = make_run(tmp_path / "tiny.gguf", **GGUF_RUN), tmp_path / "merged"
    pools[2].run(merge_run, source=run, target="dense", path=path, dtype="float32")
    assert set(open_source(ModelConfig(path=str(path))).names()) == set(GgufSource(tmp_path / "tiny.gguf").names())
    merged = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    torch.testing.assert_close(merged(IDS).logits, dist_qft.load(run).logits(IDS), rtol=1e-4, atol=1e-4)
