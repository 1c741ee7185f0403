"""`bench frozen-layer`: forward and backward through one frozen layer, each format beside bitsandbytes and torch.

The bound of a training shape is the dense layer's own time and twice (forward and backward) the time in which the
dequantized matrix can be copied: no format that is dequantized for the product can do better.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dist_qft.bench.measuring import alternating_seconds
from dist_qft.bench.options import Options
from dist_qft.bench.report import Comparison, Report, Side
from dist_qft.quant.affine4 import Affine4
from dist_qft.quant.contract import Format
from dist_qft.quant.dense import Dense
from dist_qft.quant.frozen import FrozenLinear
from dist_qft.quant.nf4 import NF4
from dist_qft.quant.q8_0 import Q8_0
from dist_qft.ranks.device import compute_dtype, dtype_name

FORMATS: dict[str, Format] = {
    "nf4": NF4(64),
    "affine4 [1, 32]": Affine4((1, 32)),
    "affine4 [8, 4]": Affine4((8, 4)),
    "q8_0": Q8_0(),
    "dense": Dense(),
}
SHAPES = {"SmolLM2 up_proj": (1536, 576), "1B up_proj": (5632, 2048)}
TRAINING_TOKENS, DECODE_TOKENS = 512, 1
BNB, DENSE, INT4 = "bitsandbytes Linear4bit", "torch dense", "torch int4 matmul"


def run(options: Options) -> Report:
    """Every format at a training and at a decoding shape, all taking turns."""
    device = torch.device(options.device)
    dtype = compute_dtype(options.precision, device)
    torch.set_num_threads(1)
    sides, comparisons, notes = [], [], []
    shapes = {"tiny": (128, 64)} if options.quick else SHAPES
    for where, shape in shapes.items():
        for tokens in (TRAINING_TOKENS, DECODE_TOKENS):
            part = _one_shape(f"{where}, {tokens} tokens", shape, tokens, device, dtype, 3 if options.quick else 15)
            sides += part[0]
            comparisons += part[1]
            notes += part[2]
    settings = {"device": options.device, "threads": 1, "precision": dtype_name(dtype)}
    return Report("frozen-layer", settings, sides, comparisons, notes)


def _one_shape(
    where: str, shape: tuple[int, int], tokens: int, device: torch.device, dtype: torch.dtype, rounds: int
) -> tuple[list[Side], list[Comparison], list[str]]:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) / shape[1] ** 0.5).to(device)
    training = tokens > DECODE_TOKENS
    x = torch.randn(tokens, shape[1], generator=generator).to(device, dtype).requires_grad_(training)
    upstream = torch.randn(tokens, shape[0], generator=generator).to(device, dtype)
    layers: dict[str, Callable[[Tensor], Tensor]] = {
        name: _frozen_layer(format, weight, dtype) for name, format in FORMATS.items()
    }
    layers |= {BNB: _bitsandbytes_layer(weight, dtype), DENSE: _dense_layer(weight, dtype)}
    # The other sides' calls, ours among them, run in between: nobody finds its weights in the cache.
    calls = {name: _call(layer, x, upstream if training else None) for name, layer in layers.items()}
    notes = []
    if not training:
        try:
            calls[INT4] = _int4_call(weight, x)
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            notes.append(f"{where}: {INT4} did not run: {str(error).partition(chr(10))[0]}")
    matrix = weight.to(dtype)
    seconds = alternating_seconds(calls | {"copy": lambda: matrix.clone()}, device, rounds)
    copy, passes = seconds.pop("copy"), 2 if training else 1
    bound = seconds[DENSE] + passes * copy
    flops, moved = passes * 2 * tokens * weight.numel(), passes * matrix.nbytes
    sides = [
        Side(
            f"{name}, {where}",
            {"milliseconds": value * 1e3, "gflops": flops / value / 1e9, "gigabytes_per_second": moved / value / 1e9},
        )
        for name, value in seconds.items()
    ]
    sides.append(Side(f"ceiling, {where}", _ceiling(flops, seconds[DENSE], matrix.nbytes, copy)))
    found = [
        Comparison(f"ms, {name}, {where}", seconds[name] * 1e3, seconds[peer] * 1e3, peer, bound * 1e3)
        for name in FORMATS
        for peer in (BNB, DENSE)
    ]
    return sides, found, notes


def _ceiling(flops: float, dense: float, copied: int, copy: float) -> dict[str, float]:
    """The speeds that this machine reaches: of the dense product, and of copying the matrix (read and written)."""
    return {"gflops": flops / dense / 1e9, "gigabytes_per_second": 2 * copied / copy / 1e9}


def _call(layer: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor | None) -> Callable[[], object]:
    if upstream is None:
        return torch.no_grad()(lambda: layer(x))
    return lambda: torch.autograd.grad(layer(x), x, upstream)


def _frozen_layer(format: Format, weight: Tensor, dtype: torch.dtype) -> FrozenLinear:
    layer = FrozenLinear(weight.shape[1], weight.shape[0], format, False, dtype, weight.device)
    for name, tensor in format.quantize(weight).items():
        getattr(layer, name).data = tensor.to(getattr(layer, name).dtype)
    return layer


def _bitsandbytes_layer(weight: Tensor, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    return layer.to(weight.device).train()


def _dense_layer(weight: Tensor, dtype: torch.dtype) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=dtype)
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return layer


def _int4_call(weight: Tensor, x: Tensor) -> Callable[[], object]:
    """torch's own product with 4-bit weights in groups of 32; its codes are random, for time alone. Inference only."""
    rows, columns = weight.shape
    constants = torch.rand(columns // 32, rows, 2, device=weight.device, dtype=x.dtype)
    if weight.device.type == "cpu":
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=weight.device)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        product = torch.ops.aten._weight_int4pack_mm

    def call() -> Tensor:
        return product(x, packed, 32, constants)

    call()
    return call
