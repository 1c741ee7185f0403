"""The parts for one GPU; started by `benchmarks/gpu.sh`."""

import sys
from collections.abc import Callable

import beside_peft
import kernels
import shapes
import single_runs
import steps
import torch
from parts import Figures, Options, options, print_table, run_parts

from dist_qft.bench.measuring import median_seconds
from dist_qft.ranks.connection import connect
from dist_qft.ranks.world import World

_LAYERS = 2  # of the shapes that are loaded and merged


def loading(asked: Options) -> Figures:
    """Weights quantized per second where they are quantized when a model is loaded: on the CPU."""
    weight = torch.randn(1 << 8 if asked.quick else 1 << 12, 1 << 10)
    found: Figures = {}
    for name, format in kernels.formats().items():
        seconds = median_seconds(lambda f=format: f.quantize(weight), torch.device("cpu"))
        found[f"{name}, million weights/s"] = weight.numel() / seconds / 1e6
    return found


def loading_of_a_model(asked: Options) -> Figures:
    """Random weights of an 8B shape through the way that loads a model, a few layers of it: made on the device."""
    found: Figures = {}
    for method in (name for name in ("qlora", "qahira") if name in steps.possible()):
        with steps.run_config(method, asked.quick, layers=_LAYERS) as config:
            _, engine, seconds = shapes.loaded(config, asked.device)
        name, gigabytes = config.quantization.linear, engine.resident_bytes() / 1e9
        found |= {f"{name}, s for {_LAYERS} layers": seconds, f"{name}, GB kept": gigabytes}
    return found


def merging_of_a_model(asked: Options) -> Figures:
    """QA-HiRA of an 8B shape folded into the zeros of a few layers, and these brought to the CPU to be written."""
    with steps.run_config("qahira", asked.quick, layers=_LAYERS) as config:
        seconds, folded = shapes.merged(config, asked.device)
    return {f"s for {_LAYERS} layers": seconds, "million zeros": folded / 1e6}


PARTS: dict[str, Callable[[Options], Figures]] = {
    "environment": kernels.environment,
    "bits of the kernels": kernels.bits,
    "bandwidth of the kernels": kernels.bandwidth,
    "products": kernels.products,
    "products of few rows, us": kernels.few_rows,
    "gradient of the loss, bfloat16": kernels.loss_gradient,
    "no waits within a micro-batch": steps.waits,
    "steps beside the CPU's": steps.beside_the_cpu,
    "loading": loading,
    "loading of an 8B shape": loading_of_a_model,
    "merging of an 8B shape": merging_of_a_model,
    "qlora, 4096 tokens": steps.step_of("qlora"),
    "qbara, 4096 tokens": steps.step_of("qbara"),
    "qahira, 4096 tokens": steps.step_of("qahira"),
    "qst, 4096 tokens": steps.step_of("qst"),
    "PEFT with bitsandbytes, 4096 tokens": beside_peft.step,
    "qahira, 32768 tokens": steps.long_row,
    **single_runs.PARTS,
}


if __name__ == "__main__":
    given = options()
    with connect(World.from_environment({}), given.device, 600):
        code = run_parts(given, PARTS)
    print_table(given)
    sys.exit(code)
