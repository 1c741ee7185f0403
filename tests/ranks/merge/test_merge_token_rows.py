"""Trained tokens in every kind of result, as independent readers see them."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dist_qft
from dist_qft.base_model.gguf_file import GgufSource
from dist_qft.errors import UserError
from dist_qft.merge.verify import run_verify
from dist_qft.merge.writers.gguf_rows import require_writable
from tests.ranks.merge.test_merge_gguf import IDS as GGUF_IDS
from tests.ranks.merge.test_merge_gguf import hugging_face_logits
from tests.ranks.merge.test_merge_peft import stock_model
from tests.support.llama_cpp import quantize
from tests.support.merges import GGUF_RUN, merge_run
from tests.support.tiny_gguf import save_tiny_gguf, tensors_of
from tests.support.tiny_model import save_tiny_model, tiny_llama_config

TOKENS = ["<|im_start|>", "<|im_end|>", 120]
IDS = torch.tensor([[1, 40, 77, 120, 33, 9, 2, 60, 12, 300]])
QLORA = {"method": {"name": "qlora", "rank": 4, "train_tokens": TOKENS}, "quantization": {"block": [1, 32]}}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def run(request, make_run, tmp_path_factory):
    """(model, run) with random adapters and rows."""
    config = tiny_llama_config(tie_word_embeddings=request.param)
    model = save_tiny_model(tmp_path_factory.mktemp("model"), config)
    return model, make_run(model, size=0.1, **QLORA)


def changed(live) -> float:
    """The most that the rows alone change a logit."""
    with torch.no_grad(), live.adapters.token_rows.off():
        without = live.logits(IDS)
    return float((live.logits(IDS) - without).abs().max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dense_folder_has_the_rows_in_its_tables(pools, run, tmp_path, dtype):
    _, source = run
    certificate = pools[2].run(merge_run, source=source, target="dense", path=tmp_path / "dense", dtype=dtype)[0]
    live, model = dist_qft.load(source), AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        distance = float((model.eval()(IDS).logits - live.logits(IDS)).abs().max())
    assert distance < (1e-5 if dtype == "float32" else 0.1) * live.logits(IDS).abs().max() < changed(live)
    assert certificate.lossless == (dtype == "float32")
    run_verify(tmp_path / "dense")


def test_a_quantized_folder_rounds_the_rows_and_says_so(pools, run, tmp_path):
    _, source = run
    path = tmp_path / "quantized"
    options = {"source": source, "target": "quantized", "path": path, "requantize": "affine4"}
    certificate = pools[2].run(merge_run, **options)[0]
    live, merged = dist_qft.load(source), dist_qft.load(path)
    tables = live.base.tables()
    assert not certificate.lossless and len(certificate.notes) == len(tables)
    for name, table in merged.base.tables().items():
        assert table.format.name == "q8_0" and f"3 trained rows of {name}" in " ".join(certificate.notes)
        wanted, found = tables[name].rows(0, 320), table.rows(0, 320)
        step = wanted.abs().amax(1, keepdim=True) / 127
        assert ((found - wanted).abs() <= 0.6 * step).all()
        others = [row for row in range(320) if row not in (1, 2, 120)]
        assert torch.equal(found[others], wanted[others]) and not torch.equal(found, wanted)
    run_verify(path)


def test_stock_peft_reads_rows_and_adapters(pools, run, tmp_path):
    model, source = run
    certificate = pools[2].run(merge_run, source=source, target="peft", path=tmp_path / "peft")[0]
    live = dist_qft.load(source)
    with live.adapters.disabled():
        stock = stock_model(live.base, model, tmp_path / "peft")
    with torch.no_grad():
        assert (stock(IDS).logits - live.logits(IDS)).abs().max() <= 1e-5 * live.logits(IDS).abs().max()
    assert certificate.lossless and changed(live) > 0.1
    run_verify(tmp_path / "peft")


@pytest.mark.parametrize("tables", ["Q8_0", "F16"])
def test_a_gguf_file_gets_the_rows_in_the_type_of_its_tables(pools, make_run, tmp_path, tables):
    """Of a file that is patched, and of one that is written anew."""
    base = save_tiny_gguf(tmp_path / "base.gguf", "Q4_1" if tables == "Q8_0" else "Q4_0", tables)
    method = {**GGUF_RUN["method"], "train_tokens": TOKENS}
    quantization = {**GGUF_RUN["quantization"], "embedding": "q8_0" if tables == "Q8_0" else "dense"}
    source = make_run(base, size=0.1, method=method, quantization=quantization)
    path = tmp_path / "merged.gguf"
    certificate = pools[2].run(merge_run, source=source, target="gguf", path=path)[0]
    before, after = tensors_of(base), tensors_of(path)
    for name in ("token_embd.weight", "output.weight"):
        assert np.where((before[name][1] != after[name][1]).any(1))[0].tolist() == [1, 2, 120]
    live, merged = dist_qft.load(source), dist_qft.load(path)
    logits = live.logits(GGUF_IDS)
    distance = float((hugging_face_logits(path) - logits).abs().max())
    assert max(distance, certificate.logits.maximum) < 0.05 * changed(live)
    torch.testing.assert_close(merged.logits(GGUF_IDS), hugging_face_logits(path), rtol=1e-5, atol=1e-4)
    assert not certificate.lossless and f"of lm_head are stored as {tables}" in certificate.summary
    run_verify(path)


def test_rows_of_a_table_whose_type_nobody_writes_are_refused(tmp_path):
    config = tiny_llama_config(hidden_size=256, num_hidden_layers=1)
    file = save_tiny_gguf(tmp_path / "k.gguf", tables="Q6_K", config=config, quantize=quantize)
    with pytest.raises(UserError, match=r"^--to gguf: method\.train_tokens .*Q6_K"):
        require_writable(GgufSource(file), ["model.embed_tokens"])
