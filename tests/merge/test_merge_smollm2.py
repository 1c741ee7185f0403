"""The real model once: SmolLM2's GGUF file with adapters on all 210 layers, merged on two ranks."""

import gguf
import numpy as np
import torch
from merges import GGUF_RUN, merge_run
from transformers import AutoModelForCausalLM

import dist_qft


def test_smollm2_merged_on_two_ranks_is_the_tuned_model_to_transformers(pools, make_run, smollm2, tmp_path):
    base = tmp_path / smollm2.name
    base.symlink_to(smollm2.resolve())
    run, path = make_run(base, **GGUF_RUN), tmp_path / "merged.gguf"
    said = pools[2].run(merge_run, source=run, target="gguf", path=path)[0]
    assert said["weights"]["max_float16_steps"] <= 0.5

    before, after = np.fromfile(base, np.uint8), np.fromfile(path, np.uint8)
    untouched = np.ones(before.size, dtype=bool)
    adapted = [tensor for tensor in gguf.GGUFReader(base).tensors if tensor.tensor_type.name == "Q4_1"]
    for tensor in adapted:
        start = int(tensor.data_offset)
        untouched[start : start + tensor.n_bytes].reshape(-1, 20)[:, 2:4] = False
    assert len(adapted) == said["adapter"]["layers"] == 210
    assert np.array_equal(before[untouched], after[untouched])
    assert (before[~untouched] != after[~untouched]).mean() > 0.4

    ids = torch.tensor([said["probe"]])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        logits = model.eval()(ids).logits
    difference = float((logits - dist_qft.load(run).logits(ids)).abs().max())
    assert abs(difference - said["logits"]["maximum"]) < 0.05 * difference
    assert difference < 0.01 * said["logits"]["largest_logit"]
