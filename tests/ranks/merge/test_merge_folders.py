"""Quantized and dense result folders, as their readers see them, and the files below them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import dist_qft
from dist_qft.base_model.model_tensors import check_names
from dist_qft.base_model.requantization import requantization_notes
from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.errors import CorruptFileError
from dist_qft.hub.command import run_push
from dist_qft.merge.writers.safetensors_folder import SafetensorsFolder
from dist_qft.storage.manifest import sha256_of
from tests.support.merges import GGUF_RUN, merge_run
from tests.support.qst_models import not_pruned_from
from tests.support.tiny_model import VOCABULARY, save_tiny_model, tiny_config
from tests.support.whole_runs import train_losses

IDS = torch.tensor([[5, 40, 77, 120, 33, 9, 201, 60, 12, 300], list(range(10, 20))])
NF4 = {"linear": "nf4", "block": [64]}


@pytest.fixture(scope="module")
def quantized(pools, make_run, tiny_llama, tmp_path_factory):
    """(run, folder): QA-HiRA on 8 x 4 blocks with one layer type kept dense, merged on two ranks."""
    run = make_run(tiny_llama, quantization={"linear": "affine4", "block": [8, 4], "exempt": ["o_proj"]})
    folder = tmp_path_factory.mktemp("quantized") / "merged"
    pools[2].run(merge_run, source=run, target="quantized", path=folder)
    return run, folder


def test_quantized_folder_gives_the_logits_of_the_tuned_model(quantized):
    run, folder = quantized
    live, merged = dist_qft.load(run), dist_qft.load(folder)
    assert (merged.logits(IDS) - live.logits(IDS)).abs().max() < 5e-3 * live.logits(IDS).abs().max()
    for path, layer in live.base.linears.items():
        for name, tensor in layer.packed().items():
            if name not in ("zero", "weight"):
                assert torch.equal(tensor, merged.base.linears[path].packed()[name])
    prompts = ["Say cat 3:", "the quiet sea"]
    answers = merged.generate(prompts, max_new_tokens=4)
    assert answers == [merged.generate(prompt, max_new_tokens=4) for prompt in prompts]
    assert merged.tokenizer.chat_template == live.tokenizer.chat_template


def test_quantized_folder_is_the_base_of_the_next_run(pools, quantized, tmp_path):
    """Training starts at the merged model, and its own merge builds on the first one."""
    _, folder = quantized
    quantization = json.loads((folder / "quantization.json").read_text())["quantization"]
    run, again = tmp_path / "next", tmp_path / "again"
    config = tiny_config(folder, run, quantization=quantization, train={"max_steps": 2})
    state = pools[2].run(train_losses, config=config)[0]
    start, tuned = dist_qft.load(folder).logits(IDS), dist_qft.load(run).logits(IDS)
    assert len(state) == 2 and not torch.equal(start, tuned)
    pools[2].run(merge_run, source=run, target="quantized", path=again)
    assert (dist_qft.load(again).logits(IDS) - tuned).abs().max() < 5e-3 * tuned.abs().max()


def test_a_side_network_can_be_pruned_from_a_quantized_folder(pools, quantized):
    assert pools[1].run(not_pruned_from, path=quantized[1]) == [[]]


def test_another_format_than_the_folders_is_said_with_its_error(quantized):
    model = ModelConfig(path=str(quantized[1]))
    base = build_skeleton(model, QuantizationConfig(linear="affine4", block=[1, 32]), torch.float32)
    notes = requantization_notes(base, check_names(base, open_source(model)))
    again = [note for note in notes if "quantized a second time" in note]
    assert len(again) == 1 and "[8, 4]" in again[0] and "[1, 32]" in again[0] and "mean error" in again[0]


def test_transformers_loads_the_folder_as_we_do(quantized):
    """By the quantizer that `import dist_qft` registers."""
    model = AutoModelForCausalLM.from_pretrained(quantized[1])
    assert model.config.quantization_config.quant_method == "dist_qft" and not model.hf_quantizer.is_trainable
    with torch.no_grad():
        assert torch.equal(model(IDS).logits.float(), dist_qft.load(quantized[1]).logits(IDS))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ids = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert ids.shape[1] == IDS.shape[1] + 3


def test_transformers_loads_tied_and_scaled_embeddings_and_biases(pools, make_run, tmp_path):
    config = Gemma3TextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=VOCABULARY, max_position_embeddings=512, attention_bias=True,
    )  # fmt: skip
    run = make_run(save_tiny_model(tmp_path / "gemma", config), **GGUF_RUN)
    pools[1].run(merge_run, source=run, target="quantized", path=tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="sdpa")
    assert not any(name.startswith("lm_head") for name, _ in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits.float(), dist_qft.load(tmp_path / "merged").logits(IDS))


def test_a_reader_that_does_not_know_the_formats_finds_no_weights(quantized, monkeypatch):
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "dist_qft")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(quantized[1])


@pytest.mark.parametrize("damage", ["{", '{"version": 1, "weights": {"a": {"shape": [1]}}}', '{"version": 1}'])
def test_a_damaged_description_is_named(quantized, tmp_path, damage):
    (tmp_path / "config.json").write_bytes((quantized[1] / "config.json").read_bytes())
    (tmp_path / "quantization.json").write_text(damage)
    with pytest.raises(CorruptFileError, match=r"quantization\.json: not a "):
        dist_qft.load(tmp_path)


@pytest.mark.parametrize("requantize", ["nf4", "affine4"])
def test_requantized_folder_holds_every_linear_in_the_new_format(pools, make_run, tiny_llama, tmp_path, requantize):
    method = {"name": "qlora", "rank": 4, "targets": ["q_proj", "down_proj"]}
    run = make_run(tiny_llama, size=0.2, quantization=NF4, method=method)
    path = tmp_path / "merged"
    certificate = pools[2].run(merge_run, source=run, target="quantized", path=path, requantize=requantize)[0]
    merged = dist_qft.load(path)
    assert {layer.format.name for layer in merged.base.linears.values()} == {requantize}
    difference = float((merged.logits(IDS) - dist_qft.load(run).logits(IDS)).abs().max())
    assert not certificate.lossless and certificate.weights.mean_difference > 1e-3
    assert difference == pytest.approx(certificate.logits.maximum, rel=1)


@pytest.mark.parametrize("method", ["qlora", "qbara", "qalora", "qahira", "qablora"])
def test_dense_folder_loads_in_hugging_face_with_the_tuned_logits(pools, make_run, tiny_llama, tmp_path, method):
    sections = {
        "qlora": {"method": {"name": "qlora", "rank": 4}, "quantization": NF4},
        "qbara": {"method": {"name": "qbara", "rank": 4}, "quantization": NF4},
        "qalora": {"method": {"name": "qalora", "rank": 4, "pool": 32}},
        "qahira": {},
        "qablora": {"method": {"name": "qablora", "rank": 4, "pool": 4, "repeat": 8}},
    }[method]
    run = make_run(tiny_llama, **sections)
    certificate = pools[2].run(merge_run, source=run, target="dense", path=tmp_path / "dense")[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert model.dtype == torch.float32 and certificate.lossless
    with torch.no_grad():
        logits = model.eval()(IDS).logits
    torch.testing.assert_close(logits, dist_qft.load(run).logits(IDS), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, dist_qft.load(tmp_path / "dense").logits(IDS), rtol=1e-4, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert tokenizer("the cat").input_ids == AutoTokenizer.from_pretrained(tiny_llama)("the cat").input_ids
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_llama).chat_template
    assert (tmp_path / "dense" / "generation_config.json").is_file()


def test_a_base_with_a_folder_of_templates_is_merged_sent_and_replaced_with_it(pools, make_run, tiny_llama, tmp_path):
    base, folder, sent = tmp_path / "base", tmp_path / "merged", tmp_path / "sent"
    template = "additional_chat_templates/tool_use.jinja"
    shutil.copytree(tiny_llama, base)
    (base / template).parent.mkdir()
    (base / template).write_text("{{ messages | tojson }}")
    run = make_run(base, quantization=NF4, method={"name": "qlora", "rank": 4})
    for _ in range(2):
        (certificate,) = pools[1].run(merge_run, source=run, target="dense", path=folder, overwrite=True)
        assert certificate.result.sha256[template] == sha256_of(base / template) == sha256_of(folder / template)
    run_push(str(folder), "owner/name", private=True, dry_run=sent)
    assert sha256_of(sent / template) == sha256_of(base / template)
    (folder / template).write_text("altered")
    with pytest.raises(CorruptFileError, match=f"{template} is missing or differs"):
        run_push(str(folder), "owner/name", private=True, dry_run=tmp_path / "again")


def test_dense_folder_of_a_gguf_base(pools, gguf_run, tmp_path):
    certificate = pools[1].run(merge_run, source=gguf_run, target="dense", path=tmp_path / "d", dtype="bfloat16")[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    assert model.dtype == torch.bfloat16 and not certificate.lossless
    live = dist_qft.load(gguf_run).logits(IDS)
    with torch.no_grad():
        logits = model.float().eval()(IDS).logits
    difference = float((logits - live).abs().max())
    assert difference == pytest.approx(certificate.logits.maximum, rel=0.5)
    assert GGUF_RUN["method"]["name"] == certificate.adapter.method


def test_tensors_written_in_any_order_and_in_rows_are_read_back(tmp_path):
    tensors = {
        "a": torch.arange(15, dtype=torch.uint8).view(5, 3),
        "b": torch.randn(4, 3).half(),
        "c": torch.randn(7),
        "d": torch.randn(2, 5).bfloat16(),
        "e": torch.arange(-3, 4, dtype=torch.int8),
        "f": torch.arange(-3, 4, dtype=torch.int32),
        "g": torch.arange(5.0).to(torch.float8_e4m3fn),
    }
    entries = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    files = SafetensorsFolder(tmp_path, "model", entries, shard_bytes=55)
    for name in ("e", "c", "g", "b", "a", "f"):
        files.write(name, tensors[name])
    files.write("d", tensors["d"][:1])
    with pytest.raises(ValueError, match="'d' was not written completely"):
        files.finish()
    files.write("d", tensors["d"][1:])
    with pytest.raises(ValueError, match="'d' is longer than it was declared to be"):
        files.write("d", tensors["d"][1:])
    files.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    found = {}
    for name in names:
        found |= load_file(tmp_path / name)
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in tensors.items())
