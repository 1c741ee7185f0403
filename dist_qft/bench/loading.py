"""`bench loading`: from files to a base that is ready to train, ours sharded beside `from_pretrained` on every rank."""

import time
from typing import Any

import torch
import torch.distributed as dist

from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.base_model.weight_files import open_source
from dist_qft.bench.measuring import Memory, synchronize
from dist_qft.bench.models import dense_folder
from dist_qft.bench.options import Options
from dist_qft.bench.peers_step import quantized_model
from dist_qft.bench.processes import run_side
from dist_qft.bench.report import Report, compare
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.ranks.device import compute_dtype
from dist_qft.sharding.engines import make_engine
from dist_qft.tuned_model.assemble import materialize


def run(options: Options) -> Report:
    """Both sides on 2 ranks and on 4, and on 2 with the larger model."""
    cases = [(options.model, 1)] if options.quick else [("smollm2", 2), ("smollm2", 4), ("llama-1b", 2)]
    sides, comparisons = [], []
    for model, ranks in cases:
        settings = options.common(ranks) | {"model": str(dense_folder(model))}
        ours = run_side(f"ours, {model}, {ranks} ranks", "load-ours", settings, ranks=ranks)
        peer = run_side(f"from_pretrained, {model}, {ranks} ranks", "load-peer", settings, ranks=ranks)
        sides += [ours, peer]
        named = {side.name: side for side in (ours, peer)}
        metrics = ("seconds", "peak_bytes", "held_bytes")
        comparisons += [compare(named, metric, ours.name, peer.name) for metric in metrics]
    notes = ["peak and held MiB: resident memory of the largest rank above its imports, mapped file pages included"]
    return Report("loading", {"device": options.device}, sides, comparisons, notes)


def ours(settings: dict[str, Any]) -> dict[str, float]:
    """Our streamed, sharded loading on this rank: NF4 linear layers, q8_0 tables."""
    device = torch.device(settings["device"])
    import bitsandbytes  # noqa: F401 - the packages' own weight is not compared

    memory, started = _begin(device)
    model = ModelConfig(path=settings["model"])
    skeleton = build_skeleton(
        model, QuantizationConfig(linear="nf4", block=[64]), compute_dtype(settings["precision"], device)
    )
    materialize(skeleton, open_source(model), make_engine("fsdp"), device)
    return _end(memory, started, device)


def peer(settings: dict[str, Any]) -> dict[str, float]:
    """transformers with bitsandbytes on this rank: NF4 linear layers, dense tables."""
    device = torch.device(settings["device"])
    import bitsandbytes  # noqa: F401

    memory, started = _begin(device)
    model = quantized_model(settings, device)
    result = _end(memory, started, device)
    del model
    return result


def _begin(device: torch.device) -> tuple[Memory, float]:
    dist.barrier()
    return Memory(device), time.perf_counter()


def _end(memory: Memory, started: float, device: torch.device) -> dict[str, float]:
    synchronize(device)
    return {"seconds": time.perf_counter() - started, "peak_bytes": memory.peak, "held_bytes": memory.held}
