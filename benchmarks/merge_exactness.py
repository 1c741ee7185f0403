"""A table of the benefit of exact merging; not a test: `python benchmarks/merge_exactness.py CONFIG RUN [ROWS]`.

The run's adapter merged in several ways, each against the live model (the base with its adapter): the exact fold; the
exact sums in float32, which shows what the float16 rounding alone does; and what PEFT does with a 4-bit layer,
dequantize, add dW, quantize again. Loss and perplexity are those of the first ROWS (32) held-out rows of CONFIG.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from dist_qft.config.load import load_config
from dist_qft.data.batches import eval_batches
from dist_qft.data.prepare import prepare
from dist_qft.merge.live_model import LiveModel
from dist_qft.merge.probe import as_written, compare_logits, logits_of, probe_ids
from dist_qft.methods.adapters.exact_fold import folded
from dist_qft.quant.formats import linear_format
from dist_qft.ranks.connection import connect
from dist_qft.ranks.world import World
from dist_qft.tuned_model.checkpointed import find_checkpoint
from dist_qft.tuned_model.held_out import held_out_loss
from dist_qft.tuned_model.loaded_model import whole_on_this_rank

CPU = torch.device("cpu")


@contextmanager
def folded_zeros(model: LiveModel, *, rounded: bool) -> Iterator[None]:
    """Context in which the base has the merged zeros: in float16, or as the exact sums in float32."""
    before = {}
    for path, adapter in model.adapters.by_path.items():
        layer = model.base.linears[path]
        target = layer.format.fold_target
        assert target is not None and target.tensor == "zero", "this script compares merges of affine4 layers"
        zero = before[layer] = layer.zero.data
        written, exact = folded(zero.view(-1), 0, zero.shape[1], target.block, adapter)
        layer.zero.data = (written if rounded else exact.float()).view_as(zero)
        layer._packed_dtypes["zero"] = layer.zero.dtype
    try:
        yield
    finally:
        for layer, zero in before.items():
            layer.zero.data = zero
            layer._packed_dtypes["zero"] = zero.dtype


def main(config_path: str, run: str, rows: int = 32) -> None:
    config = load_config(config_path)
    with connect(World.from_environment({}), CPU, 600):
        parts, tokenizer = whole_on_this_rank(find_checkpoint(run), CPU)
        tuned = LiveModel.of(parts)
        data = prepare(config.data, tokenizer, tuned.base.vocab_size, Path(run) / "data_cache")
        batches = eval_batches(data.eval, 4, 0, 1)[: rows // 4]
        ids = probe_ids(tokenizer)
        live = logits_of(tuned.base, ids, CPU)
        own = {path: tuned.base.linears[path].format for path in tuned.adapters.by_path}
        nf4 = dict.fromkeys(own, linear_format("nf4"))
        ways = {
            "live: base with adapter": None,
            "exact sums, float32 zeros": folded_zeros(tuned, rounded=False),
            "exact fold, float16 zeros": folded_zeros(tuned, rounded=True),
            "quantized again, own format": as_written(tuned, own, None),
            "quantized again, nf4": as_written(tuned, nf4, None),
            "base without adapter": nullcontext(),
        }
        print(f"{'':28} {'max logit error':>15} {'mean':>9} {'loss':>9} {'perplexity':>11}")
        for name, way in ways.items():
            with way or nullcontext(), tuned.adapters.disabled() if way else nullcontext():
                logits = compare_logits(live, logits_of(tuned.base, ids, CPU), ids)
                held_out = held_out_loss(tuned.base, batches, CPU)
            figures = f"{logits.maximum:15.2e} {logits.mean:9.1e} {held_out.loss:9.5f} {held_out.perplexity:11.3f}"
            print(f"{name:28} {figures}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
