"""Merged GGUF files: which bytes change, and whether independent readers see the model that was trained."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dist_qft
from dist_qft.merge.verify import run_verify
from tests.support.llama_cpp import quantize
from tests.support.merges import GGUF_RUN, merge_run, told_merge
from tests.support.tiny_gguf import add_stored, metadata_of, save_tiny_gguf, split_gguf, tensors_of
from tests.support.tiny_model import tiny_llama_config

IDS = torch.tensor([[5, 40, 77, 120, 33, 9, 201, 60, 12, 300]])
PARTIAL = {"method": {**GGUF_RUN["method"], "targets": ["q_proj", "k_proj", "down_proj"]}}


def hugging_face_logits(path: Path) -> torch.Tensor:
    """Logits by transformers' own GGUF loader, which undoes the row permutation itself."""
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def merged(pools, gguf_run, tmp_path_factory) -> tuple[Path, dict]:
    path = tmp_path_factory.mktemp("merged") / "merged.gguf"
    return path, pools[2].run(merge_run, source=gguf_run, target="gguf", path=path)[0]


def test_only_m_fields_of_adapted_tensors_change(pools, make_run, tiny_gguf, tmp_path):
    path = tmp_path / "merged.gguf"
    run = make_run(tiny_gguf, **{**GGUF_RUN, **PARTIAL})
    pools[2].run(merge_run, source=run, target="gguf", path=path)
    before, after = tiny_gguf.read_bytes(), path.read_bytes()
    allowed = np.zeros(len(before), dtype=bool)
    for tensor in gguf.GGUFReader(tiny_gguf).tensors:
        if any(part in tensor.name for part in ("attn_q.", "attn_k.", "ffn_down.")):
            assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1
            start = int(tensor.data_offset)
            block = np.arange(tensor.n_bytes) % 20
            allowed[start : start + tensor.n_bytes] = (block == 2) | (block == 3)
    changed = np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8)
    assert len(before) == len(after)
    assert not (changed & ~allowed).any()
    assert changed.sum() > 0.4 * allowed.sum()


def test_the_template_that_was_trained_with_goes_into_the_file(pools, make_run, tiny_gguf, tmp_path):
    run, path = make_run(tiny_gguf, **GGUF_RUN, data={"template": "alpaca"}), tmp_path / "merged.gguf"
    assert pools[1].run(merge_run, source=run, target="gguf", path=path)[0].kind == "exact"
    before, after = metadata_of(tiny_gguf), metadata_of(path)
    key = gguf.Keys.Tokenizer.CHAT_TEMPLATE
    assert "### Response:" in after.pop(key) and before.pop(key) != after and before == after
    old, new = tensors_of(tiny_gguf), tensors_of(path)
    assert old.keys() == new.keys()
    assert dist_qft.load(path).generate("Say", 4) == dist_qft.load(run).generate("Say", 4)


def test_zeros_are_the_old_ones_plus_dW(merged, tiny_gguf, gguf_run):
    """By gguf's reader, the permutation of q and k undone here; dW by the adapters' own float64 formula."""
    from dist_qft.methods.adapters.tile_adapter import tile_values

    path, certificate = merged
    before, after = tensors_of(tiny_gguf), tensors_of(path)
    tuned = dist_qft.load(gguf_run)
    largest = 0.0
    for name, stored, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2), ("v_proj", "attn_v", None)):
        update = tile_values(tuned.adapters.by_path[f"model.layers.1.self_attn.{name}"]).numpy()
        if heads:  # rotary halves: (heads, 2, n) in the model, (heads, n, 2) in the file
            update = update.reshape(heads, 2, -1, update.shape[1]).swapaxes(1, 2).reshape(update.shape)
        old, new = (
            raw[f"blk.1.{stored}.weight"][1].reshape(update.shape[0], -1, 20)[:, :, 2:4].copy().view("<f2")[..., 0]
            for raw in (before, after)
        )
        exact = old.astype(np.float64) + update
        distance = np.abs(new.astype(np.float64) - exact)
        assert (distance <= 0.5 * np.spacing(np.abs(new)).astype(np.float64)).all()
        assert (new != old).mean() > 0.9
        largest = max(largest, distance.max())
    assert 0 < largest <= certificate.weights.max_difference


def test_independent_loader_gives_the_logits_of_the_tuned_model(merged, gguf_run, tiny_gguf):
    """No further apart than other roundings of the zeros would be: half a step, in random directions."""
    path, certificate = merged
    tuned = dist_qft.load(gguf_run)
    live, independent = tuned.logits(IDS), hugging_face_logits(path)
    torch.testing.assert_close(dist_qft.load(path).logits(IDS), independent, rtol=1e-5, atol=1e-5)
    difference = float((independent - live).abs().max())
    generator = torch.Generator().manual_seed(0)
    explained = []
    for _ in range(4):
        other = dist_qft.load(path)
        for layer in other.base.linears.values():
            step = torch.from_numpy(np.spacing(np.abs(layer.zero.numpy()))).float()
            noise = (torch.rand(step.shape, generator=generator) - 0.5) * step
            layer.zero.data = layer.zero.float() + noise  # kept in float32: no second rounding
            layer._packed_dtypes["zero"] = torch.float32
        explained.append(float((other.logits(IDS) - independent).abs().max()))
    assert 0 < difference <= 1.5 * max(explained)
    assert certificate.lossless and certificate.weights.max_float16_steps <= 0.5
    assert float((hugging_face_logits(tiny_gguf) - live).abs().max()) > 30 * difference, "the adapters change nothing"


def test_qalora_merges_as_exactly(pools, make_run, tiny_gguf, tmp_path):
    method = {"name": "qalora", "pool": 32, "repeat": None, "rank": 4}
    run = make_run(tiny_gguf, size=0.2, **{**GGUF_RUN, "method": method})
    path = tmp_path / "merged.gguf"
    certificate = pools[2].run(merge_run, source=run, target="gguf", path=path)[0]
    live = dist_qft.load(run).logits(IDS)
    assert certificate.weights.max_float16_steps <= 0.5
    assert (hugging_face_logits(path) - live).abs().max() < 0.01 * live.abs().max()


def test_a_dense_file_comes_back_with_adapted_layers_as_q4_1(pools, make_run, tmp_path):
    source = save_tiny_gguf(tmp_path / "tiny.F16.gguf", linears="F16", tables="F16")
    add_stored(source, {"general.tags": struct.pack("<IIQ", 9, 8, 0)})  # an array of no texts
    sections = {"quantization": {**GGUF_RUN["quantization"], "embedding": "dense"}}
    run = make_run(source, **{**GGUF_RUN, **sections})
    path = tmp_path / "merged.gguf"
    certificate = pools[2].run(merge_run, source=run, target="gguf", path=path)[0]
    before, after = tensors_of(source), tensors_of(path)
    assert before.keys() == after.keys()
    kinds = {name: kind for name, (kind, _) in after.items()}
    assert {kinds[name] for name in kinds if "attn_q." in name or ("ffn_" in name and "norm" not in name)} == {"Q4_1"}
    for name, (kind, raw) in before.items():
        if kinds[name] != "Q4_1":
            assert kind == kinds[name] and np.array_equal(raw, after[name][1]), name
    old, new = metadata_of(source), metadata_of(path)
    assert {key for key in old | new if old.get(key) != new.get(key)} <= {"general.file_type"}
    assert new["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_1
    live = dist_qft.load(run).logits(IDS)
    assert certificate.lossless, certificate.summary
    assert (hugging_face_logits(path) - live).abs().max() < 0.01 * live.abs().max()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_untouched_tensors_that_the_run_held_otherwise_count_as_the_file_has_them(pools, make_run, tmp_path, precision):
    """Tables of a type of their own, a matrix that is quantized again, one that is dense; the head's rows trained."""
    source = save_tiny_gguf(tmp_path / "tiny.gguf", tables="F16", others={"up_proj": "Q8_0", "down_proj": "F16"})
    method = {**GGUF_RUN["method"], "targets": ["q_proj", "v_proj"], "train_tokens": ["<|im_end|>"]}
    run = make_run(source, **{**GGUF_RUN, "method": method}, train={"precision": precision})
    path = tmp_path / "merged.gguf"
    certificate = pools[2].run(merge_run, source=run, target="gguf", path=path)[0]
    assert not certificate.lossless
    assert (
        certificate.notes[0] == "the file keeps its own model.layers.0.mlp.up_proj (Q8_0, held as affine4) and 7 more"
    )
    old, new = tensors_of(source), tensors_of(path)
    for name in ("token_embd.weight", "output.weight", "blk.1.ffn_up.weight", "blk.1.ffn_down.weight"):
        assert old[name][0] == new[name][0] and (old[name][1] == new[name][1]).mean() > 0.99
    run_verify(path)  # as the file's reader computes them
    live, merged = (dist_qft.load(each, dtype=precision).logits(IDS) for each in (run, path))
    assert float((merged - live).abs().max()) == pytest.approx(certificate.logits.maximum, rel=0.8)


def test_lora_can_be_quantized_into_a_gguf_file_with_its_error_printed(pools, make_run, tiny_gguf, tmp_path):
    method = {"name": "qlora", "pool": None, "repeat": None, "rank": 4}
    run = make_run(tiny_gguf, size=0.2, **{**GGUF_RUN, "method": method})
    path = tmp_path / "merged.gguf"
    certificate = pools[1].run(merge_run, source=run, target="gguf", path=path, requantize="affine4")[0]
    assert certificate.kind == "requantized" and not certificate.lossless
    live = dist_qft.load(run).logits(IDS)
    difference = float((hugging_face_logits(path) - live).abs().max())
    assert difference > 100 * float((hugging_face_logits(path) - dist_qft.load(path).logits(IDS)).abs().max())
    assert difference == pytest.approx(certificate.logits.maximum, rel=1)
    assert metadata_of(path) == metadata_of(tiny_gguf)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """Q4_K, Q4_0 and Q5_K with Q6_K among them, aligned to 64 bytes, in three files."""
    folder = tmp_path_factory.mktemp("mixture")
    whole = save_tiny_gguf(
        folder / "whole.gguf",
        "Q4_K",
        others={"v_proj": "Q6_K", "down_proj": "Q6_K", "o_proj": "Q4_0", "up_proj": "Q5_K"},
        config=tiny_llama_config(hidden_size=256, intermediate_size=256, num_hidden_layers=2),
        quantize=quantize,
        finish=lambda writer: writer.add_custom_alignment(64),
    )
    return split_gguf(whole, folder)[0]


def mixture_run(make_run, path: Path, targets: list[str]) -> Path:
    method = {**GGUF_RUN["method"], "targets": targets}
    return make_run(path, size=0.05, quantization={"linear": "auto", "block": None}, method=method)


def test_adapted_tensors_of_4_bits_keep_their_codes_as_q4_1(pools, make_run, mixture, tmp_path):
    run, path = mixture_run(make_run, mixture, ["q_proj", "k_proj", "o_proj"]), tmp_path / "merged.gguf"
    certificate, told = pools[2].run(told_merge, source=run, target="gguf", path=path)[0]
    assert "become Q4_1 (they are 2 Q4_0, 4 Q4_K): " in told and f" -> {path.stat().st_size / 1e6:.1f} MB (" in told
    assert certificate.kind == "rounded" and not certificate.lossless and not certificate.notes
    assert 0 < certificate.weights.rounding_share_of_update < 0.02
    before = {name: each for part in sorted(mixture.parent.glob("model-*")) for name, each in tensors_of(part).items()}
    after = tensors_of(path)
    assert before.keys() == after.keys() and metadata_of(path)["general.alignment"] == 64
    assert not any(key.startswith("split.") for key in metadata_of(path))
    for name, (kind, raw) in before.items():
        adapted = name.split(".")[-2] in ("attn_q", "attn_k", "attn_output")
        assert after[name][0] == ("Q4_1" if adapted else kind), name
        assert adapted or np.array_equal(after[name][1], raw), name
    old, new = (each["blk.1.attn_output.weight"][1].reshape(-1, size) for each, size in ((before, 18), (after, 20)))
    assert np.array_equal(old[:, :2], new[:, :2]) and np.array_equal(old[:, 2:], new[:, 4:])  # scales and codes of Q4_0
    live = dist_qft.load(run).logits(IDS)
    assert (hugging_face_logits(path) - live).abs().max() < 0.01 * live.abs().max()
    run_verify(path)


def test_other_types_are_refused_or_quantized_again_alone(pools, make_run, mixture, tmp_path):
    run, path = mixture_run(make_run, mixture, ["q_proj", "v_proj"]), tmp_path / "merged.gguf"
    with pytest.raises(Exception, match=r"v_proj is q8_0, .*--requantize"):
        pools[1].run(merge_run, source=run, target="gguf", path=path)
    certificate = pools[1].run(merge_run, source=run, target="gguf", path=path, requantize="affine4")[0]
    kinds = {
        name: kind for name, (kind, _) in tensors_of(path).items() if name.startswith("blk.1.") and "norm" not in name
    }
    assert {name for name, kind in kinds.items() if kind == "Q4_1"} == {"blk.1.attn_q.weight", "blk.1.attn_v.weight"}
    assert kinds["blk.1.ffn_down.weight"] == "Q6_K" and certificate.kind == "requantized" and not certificate.notes
    difference = dist_qft.load(path).logits(IDS) - dist_qft.load(run).logits(IDS)
    assert float(difference.abs().max()) == pytest.approx(certificate.logits.maximum, rel=1)


def test_zeros_of_5_bit_types_take_the_update_in_a_folder(pools, make_run, mixture, tmp_path):
    """GGUF's Q4_1 cannot hold such a tensor; our own folder can, and codes and scales stay."""
    run = mixture_run(make_run, mixture, ["up_proj"])
    with pytest.raises(Exception, match=r"up_proj is .*affine8.*merge --to quantized"):
        pools[1].run(merge_run, source=run, target="gguf", path=tmp_path / "merged.gguf")
    certificate = pools[1].run(merge_run, source=run, target="quantized", path=tmp_path / "merged")[0]
    assert certificate.kind == "exact" and certificate.weights.rounding_share_of_update < 1e-3
    live, merged = dist_qft.load(run), dist_qft.load(tmp_path / "merged")
    torch.testing.assert_close(merged.logits(IDS), live.logits(IDS), rtol=1e-4, atol=1e-4)
    path = "model.layers.1.mlp.up_proj"
    old, new = live.base.linears[path].packed(), merged.base.linears[path].packed()
    assert torch.equal(old["codes"], new["codes"]) and torch.equal(old["scale"], new["scale"])
    assert not torch.equal(old["zero"], new["zero"])
