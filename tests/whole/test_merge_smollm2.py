"""The real model once: SmolLM2's GGUF file with merge-aware adapters on all 210 layers, merged on two ranks, and what
two independent readers of the result, transformers and llama.cpp, make of it.
"""

from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dist_qft
from dist_qft.config.schema import RunConfig
from dist_qft.merge.certificate import Certificate
from dist_qft.merge.live_model import LiveModel
from dist_qft.merge.probe import logits_of, probe_ids
from dist_qft.merge.recipe import MergeRequest
from dist_qft.merge.run import export, gather_merge_inputs
from dist_qft.ranks.preemption import StopSignal
from dist_qft.storage.checkpoint import read_checkpoint
from tests.support.merges import GGUF_RUN, assemble_random
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import pool_world


def merged_with_live_logits(config: RunConfig, path: Path) -> tuple[Certificate, torch.Tensor]:
    """On rank 0 the certificate; on all the logits of base and adapters before the merge."""
    parts, origin = assemble_random(config, size=0.05)
    request = MergeRequest("gguf", path)
    inputs = gather_merge_inputs(request, read_checkpoint(origin.checkpoint), pool_world())
    live = logits_of(parts.base, probe_ids(inputs.tokenizer), inputs.device)
    return export(LiveModel.of(parts), inputs.recipe, origin, inputs.tokenizer, inputs.device, StopSignal()), live


class Merged(NamedTuple):
    path: Path
    certificate: Certificate
    live: torch.Tensor  # logits of the probe


@pytest.fixture(scope="module")
def merged(pools, smollm2, tmp_path_factory) -> Merged:
    folder = tmp_path_factory.mktemp("smollm2")
    path = folder / "merged.gguf"
    sections = {**GGUF_RUN, "method": {**GGUF_RUN["method"], "merge_aware": True}}
    config = tiny_config(smollm2, folder / "run", **sections)
    return Merged(path, *pools[2].run(merged_with_live_logits, config=config, path=path)[0])


def test_only_the_zeros_differ_from_the_base_and_no_logit_from_the_live_model(merged, smollm2):
    said = merged.certificate
    assert 0.4 < said.weights.max_float16_steps <= 0.5
    assert said.logits.maximum == 0 and said.logits.perplexity == said.logits.live_perplexity
    before, after = np.fromfile(smollm2, np.uint8), np.fromfile(merged.path, np.uint8)
    untouched = np.ones(before.size, dtype=bool)
    adapted = [tensor for tensor in gguf.GGUFReader(smollm2).tensors if tensor.tensor_type.name == "Q4_1"]
    for tensor in adapted:
        start = int(tensor.data_offset)
        untouched[start : start + tensor.n_bytes].reshape(-1, 20)[:, 2:4] = False
    assert len(adapted) == said.adapter.layers == 210
    assert np.array_equal(before[untouched], after[untouched])
    assert (before[~untouched] != after[~untouched]).mean() > 0.4


def test_transformers_reads_the_tuned_model(merged):
    folder, name = merged.path.parent, merged.path.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([merged.certificate.probe])).logits[0]
    assert float((logits - merged.live).abs().max()) < 1e-5 * float(merged.live.abs().max())


def llama_cpp_error(path: Path, probe: list[int], logits: torch.Tensor, lengths: tuple[int, ...]) -> float:
    """Largest difference of llama.cpp's log-probabilities from those of `logits`, over the likeliest next tokens."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.verbosity = str(path), 128, 1, -1
    server = xllamacpp.Server(parameters)
    worst = 0.0
    for length in lengths:
        request = {"prompt": probe[:length], "n_predict": 1, "n_probs": 10, "temperature": 0.0}
        found = server.handle_completions(request)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        expected = logits[length - 1].log_softmax(-1)
        assert len(found) == 10
        worst = max(worst, *(abs(entry["logprob"] - float(expected[entry["id"]])) for entry in found))
    return worst


def test_llama_cpp_runs_the_tuned_model(merged, smollm2):
    """As near to it as llama.cpp, which quantizes activations, comes to the base itself; and far from the base."""
    pytest.importorskip("xllamacpp", reason="xllamacpp, llama.cpp's binding, is not installed")
    probe, lengths = merged.certificate.probe, (8, 24, 48)
    base = dist_qft.load(smollm2).logits(torch.tensor([probe]))[0]
    of_base = llama_cpp_error(smollm2, probe, base, lengths)
    of_merged = llama_cpp_error(merged.path, probe, merged.live, lengths)
    confused = llama_cpp_error(merged.path, probe, base, lengths)
    print(f"log-probabilities: base {of_base:.3f}, merged {of_merged:.3f}, merged beside the base's {confused:.3f}")
    assert of_merged < 1.5 * of_base and confused > 3 * of_merged
