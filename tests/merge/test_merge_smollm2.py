"""The real model once: SmolLM2's GGUF file with adapters on all 210 layers, merged on two ranks."""

from pathlib import Path

import gguf
import numpy as np
import torch
from merges import GGUF_RUN, assemble_random
from tiny_model import tiny_config
from transformers import AutoModelForCausalLM
from whole_runs import pool_world

from dist_qft.checkpoint import read_checkpoint
from dist_qft.config.schema import RunConfig
from dist_qft.merge.probe import logits_of, probe_ids
from dist_qft.merge.recipe import MergeRequest
from dist_qft.merge.run import gather_inputs, merge
from dist_qft.preemption import StopSignal


def merged_with_live_logits(config: RunConfig, path: Path) -> tuple[dict, torch.Tensor]:
    """On rank 0 the certificate; on all the logits of base and adapters before the merge."""
    parts, origin = assemble_random(config, size=0.05)
    request = MergeRequest("gguf", path)
    inputs = gather_inputs(request, read_checkpoint(origin.checkpoint), pool_world())
    live = logits_of(parts.base, probe_ids(inputs.tokenizer), inputs.device)
    return merge(parts, inputs.recipe, origin, inputs.tokenizer, inputs.device, StopSignal()), live


def test_smollm2_merged_on_two_ranks_is_the_tuned_model_to_transformers(pools, smollm2, tmp_path):
    path = tmp_path / "merged.gguf"
    config = tiny_config(smollm2, tmp_path / "run", **GGUF_RUN)
    said, live = pools[2].run(merged_with_live_logits, config=config, path=path)[0]
    assert said["weights"]["max_float16_steps"] <= 0.5

    before, after = np.fromfile(smollm2, np.uint8), np.fromfile(path, np.uint8)
    untouched = np.ones(before.size, dtype=bool)
    adapted = [tensor for tensor in gguf.GGUFReader(smollm2).tensors if tensor.tensor_type.name == "Q4_1"]
    for tensor in adapted:
        start = int(tensor.data_offset)
        untouched[start : start + tensor.n_bytes].reshape(-1, 20)[:, 2:4] = False
    assert len(adapted) == said["adapter"]["layers"] == 210
    assert np.array_equal(before[untouched], after[untouched])
    assert (before[~untouched] != after[~untouched]).mean() > 0.4

    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([said["probe"]])).logits[0]
    difference = float((logits - live).abs().max())
    assert abs(difference - said["logits"]["maximum"]) < 0.05 * difference
    assert difference < 0.01 * said["logits"]["largest_logit"]
