"""`bench merge`: adapters into the 4-bit base in memory, ours beside PEFT's `merge_and_unload`; one process each.

Ours adds dW to the zeros of affine4 and leaves the codes alone. PEFT dequantizes each NF4 layer, adds dW and quantizes
again. Both begin with a loaded model whose adapters are not zero, and end with the merged one. No file is written.
"""

import time
from pathlib import Path
from typing import Any

import torch

from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.bench.measuring import Memory, synchronize
from dist_qft.bench.models import dense_folder
from dist_qft.bench.options import Options
from dist_qft.bench.peers_step import peft_model
from dist_qft.bench.processes import run_side
from dist_qft.bench.report import Report, compare
from dist_qft.bench.step import run_config
from dist_qft.merge.collective import fold_base
from dist_qft.merge.live_model import LiveModel
from dist_qft.merge.recipe import MergeRequest
from dist_qft.merge.run import make_recipe
from dist_qft.methods.adapters.adapter_spec import require_tiles
from dist_qft.methods.specs import make_spec
from dist_qft.ranks.device import compute_dtype
from dist_qft.tuned_model.assemble import assemble


def run(options: Options) -> Report:
    """QA-HiRA and QA-LoRA, folded exactly, beside a LoRA of PEFT."""
    settings = options.common(1)
    settings |= {"model": str(dense_folder(options.model)), "rank": 16, "engine": "fsdp"}
    peer = run_side("PEFT merge_and_unload", "merge-peer", settings, ranks=1)
    sides = {peer.name: peer}
    for method in ("qahira",) if options.quick else ("qahira", "qalora"):
        sides[f"ours, {method}"] = run_side(f"ours, {method}", "merge-ours", settings | {"method": method}, ranks=1)
    ours = [name for name in sides if name != peer.name]
    comparisons = [compare(sides, metric, name, peer.name) for name in ours for metric in ("seconds", "peak_bytes")]
    return Report("merge", settings, list(sides.values()), comparisons)


def ours(settings: dict[str, Any]) -> dict[str, float]:
    """The exact fold of every layer."""
    config, device = run_config(settings), torch.device(settings["device"])
    skeleton = build_skeleton(config.model, config.quantization, compute_dtype(settings["precision"], device))
    spec = make_spec(config, skeleton)
    recipe = make_recipe(MergeRequest("quantized", Path("unused")), config, skeleton, require_tiles(spec))
    parts = assemble(config, skeleton, spec, device)
    _fill([parameter for _, parameter in parts.named_tensors()])
    memory, started = Memory(device), time.perf_counter()
    fold_base(LiveModel.of(parts), recipe, device)
    synchronize(device)
    return {"seconds": time.perf_counter() - started, "peak_bytes": memory.peak}


def peer(settings: dict[str, Any]) -> dict[str, float]:
    """PEFT's merge of a LoRA into Linear4bit layers."""
    device = torch.device(settings["device"])
    model = peft_model(settings, device)
    _fill([parameter for parameter in model.parameters() if parameter.requires_grad])
    memory, started = Memory(device), time.perf_counter()
    model.merge_and_unload()
    synchronize(device)
    return {"seconds": time.perf_counter() - started, "peak_bytes": memory.peak}


@torch.no_grad()
def _fill(parameters: list[torch.Tensor]) -> None:
    for parameter in parameters:
        parameter.normal_(std=1e-3)
