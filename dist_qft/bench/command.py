"""The table of benchmarks, and running them one after the other."""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dist_qft.bench.options import Options
from dist_qft.bench.processes import has_device
from dist_qft.bench.report import append_report, print_report
from dist_qft.errors import UserError

# Name -> module below this package, whose `run(options)` returns the report.
BENCHMARKS = {
    "step": "step",
    "loading": "loading",
    "frozen-layer": "frozen_layer",
    "all-reduce": "all_reduce",
    "merge": "merge",
    "scaling": "scaling",
    "mixture": "mixture",
    "nodes": "nodes",
}
PEER_PACKAGES = ("peft", "accelerate", "bitsandbytes", "deepspeed")


def run_benchmarks(names: Sequence[str], *, every: bool, options: Options, json_path: Path | None) -> None:
    """Run the named benchmarks, or all; print each report, and append it to `json_path`.

    Raises:
        UserError: no or an unknown name, or a device that is not here; before anything runs.
    """
    allowed = ", ".join(BENCHMARKS)
    if not names and not every:
        raise UserError(f"bench: needs a NAME or --all; names: {allowed}")
    if names and every:
        raise UserError(f"bench: got '{names[0]}' and --all, which has every benchmark; leave one out")
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise UserError(f"bench: got '{unknown[0]}', must be one of {allowed}")
    if options.device not in ("cpu", "cuda"):
        raise UserError(f"--device: got '{options.device}', must be cpu or cuda")
    if options.precision not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--precision: got '{options.precision}', must be float32, bfloat16 or auto")
    if not has_device(options.device):
        raise UserError("--device: got 'cuda', but torch finds no CUDA device here")
    missing = [name for name in PEER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"bench: {missing[0]} is not installed; pip install 'dist-qft[bench]'")
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise UserError(f"--json: there is no folder '{json_path.absolute().parent}'")
    kept = None if json_path is None else json_path.with_name(f"{json_path.name}.sides")
    options = replace(options, kept=kept)
    for name in BENCHMARKS if every else names:
        report = importlib.import_module(f"dist_qft.bench.{BENCHMARKS[name]}").run(options)
        print_report(report)
        if json_path is not None and kept is not None:
            append_report(report, json_path)
            kept.unlink(missing_ok=True)
