"""Kernels alone: their bits, their bandwidth beside a copy's, the gradient of the loss, and the ceiling of products."""

import importlib.util
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from parts import Figures, Options
from torch import Tensor

from dist_qft.base_model.loss import LogitMap, token_cross_entropy
from dist_qft.bench.measuring import median_seconds
from dist_qft.quant.affine4 import Affine4
from dist_qft.quant.affine4_gathered import Affine4Gathered
from dist_qft.quant.affine8 import Affine8
from dist_qft.quant.codebook4 import Codebook4
from dist_qft.quant.contract import Format
from dist_qft.quant.nf4 import NF4
from dist_qft.quant.q8_0 import Q8_0

_PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "peft", "deepspeed")


def formats() -> dict[str, Format]:
    """The formats that are measured, by name; nf4 only with bitsandbytes."""
    found: dict[str, Format] = {"affine4 [1, 32]": Affine4((1, 32)), "affine4 [8, 4]": Affine4((8, 4)), "q8_0": Q8_0()}
    if importlib.util.find_spec("bitsandbytes") is not None:
        found |= {"nf4": NF4(64), "nf4, double_quant": NF4(64, double_quant=True)}
    return found


def only_read() -> dict[str, Format]:
    """The formats that files alone have, by name."""
    found: dict[str, Format] = {"affine4 gathered": Affine4Gathered(32), "affine8": Affine8(32)}
    return found | {kind: Codebook4(kind) for kind in ("mxfp4", "nvfp4")}


def random_packed(format: Format, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Any codes, and constants that make no value infinite, on the CPU."""
    generator, packed = torch.Generator().manual_seed(0), {}
    for name, (size, dtype) in format.packed_shapes(shape).items():
        if dtype is None or dtype.is_floating_point:
            # As files have them, in float16: a scale of 24 bits times a code is not exact in float32.
            packed[name] = (torch.rand(size, generator=generator) + 0.5).half().to(dtype or torch.float32)
        else:
            # No byte of a block's scale may be E4M3's NaN (127) or make E8M0's powers too large.
            low, high = (110, 127) if name == "scale" else (0, 32)
            packed[name] = torch.randint(low, high, size, generator=generator).to(dtype)
    return packed


def every_format(weight: Tensor) -> Iterator[tuple[str, Format, dict[str, Tensor]]]:
    """Names and formats, each with the weight packed, or of formats that are only read any tensors of its shape."""
    for name, format in formats().items():
        yield name, format, format.quantize(weight)
    height, width = weight.shape
    for name, format in only_read().items():
        packed = random_packed(format, (height, width))
        yield name, format, {key: tensor.to(weight.device) for key, tensor in packed.items()}


def environment(asked: Options) -> Figures:
    """Versions and the device."""
    found: Figures = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    if asked.device.type == "cuda":
        properties = torch.cuda.get_device_properties(asked.device)
        found |= {"GPU": properties.name, "GPU GiB": properties.total_memory / 2**30}
        found |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def bits(asked: Options) -> Figures:
    """Every format dequantized on the device, beside the CPU's result: the number of values that differ."""
    found: Figures = {}
    weight = torch.randn(96, 1088, generator=torch.Generator().manual_seed(0)) * 0.1
    for name, format, packed in every_format(weight):
        there = {key: tensor.to(asked.device) for key, tensor in packed.items()}
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            here = format.dequantize(packed, (96, 1088), dtype)
            other = format.dequantize(there, (96, 1088), dtype).cpu()
            found[f"{name}, {str(dtype)[6:]}: values that differ"] = int((here != other).sum())
            if (here != other).any():
                index = (here != other).nonzero()[0].tolist()
                exact = format.dequantize(packed, (96, 1088), torch.float32)[tuple(index)].item()
                values = here[tuple(index)].item(), other[tuple(index)].item(), exact
                print(f"{name}, {dtype}, {index}: CPU, GPU, float32 of the CPU: {values}")
    if any(found.values()):
        raise AssertionError(f"other bits than on the CPU: {found}")
    return found


def bandwidth(asked: Options) -> Figures:
    """GB/s of reading packed bytes and writing bfloat16, and the share of what a copy of as many bytes reaches."""
    shape = (256, 512) if asked.quick else (14336, 4096)
    out = torch.empty(shape, dtype=torch.bfloat16, device=asked.device)
    other = torch.empty_like(out)
    copy = 2 * out.nbytes / median_seconds(lambda: other.copy_(out), asked.device) / 1e9
    found: Figures = {"copy, GB/s": copy}
    for name, format, packed in every_format(torch.randn(shape, device=asked.device) * 0.02):
        moved = out.nbytes + sum(tensor.nbytes for tensor in packed.values())
        seconds = median_seconds(lambda f=format, p=packed: f.dequantize(p, shape, torch.bfloat16), asked.device)
        found[f"{name}, GB/s"] = moved / seconds / 1e9
        found[f"{name}, share of copy"] = moved / seconds / 1e9 / copy
    return found


def products(asked: Options) -> Figures:
    """The most that bfloat16 products reach, TFLOP/s."""
    size = 256 if asked.quick else 8192
    left, right = (torch.randn(size, size, device=asked.device).bfloat16() for _ in range(2))
    return {"bfloat16 product, TFLOP/s": 2 * size**3 / median_seconds(lambda: left @ right, asked.device) / 1e12}


@torch.no_grad()
def few_rows(asked: Options) -> Figures:
    """Microseconds of a product with few rows, as a generated token has: with the packed weight, and dequantized."""
    shape, found = (256, 512) if asked.quick else (14336, 4096), {}
    for name, format in formats().items():
        packed = format.quantize(torch.randn(shape, device=asked.device) * 0.02)
        for rows in range(1, format.few_rows(torch.bfloat16) + 1, 3):
            x = torch.randn(rows, shape[1], device=asked.device).bfloat16()
            ways: dict[str, Callable[[], Tensor]] = {
                "packed": lambda f=format, p=packed, x=x: f.product(p, shape, x, None),
                "dequantized": lambda f=format, p=packed, x=x: F.linear(x, f.dequantize(p, shape, torch.bfloat16)),
            }
            for way, product in ways.items():
                found[f"{name}, {rows} rows, {way}"] = median_seconds(product, asked.device) * 1e6
            error = (ways["packed"]() - ways["dequantized"]()).norm() / ways["dequantized"]().norm()
            found[f"{name}, {rows} rows, difference"] = error.item()
            if not error < 0.01:
                raise AssertionError(f"more than 1 % off: {found}")
    return found


class _Table:
    def __init__(self, weight: Tensor) -> None:
        self.weight, self.num_embeddings = weight, len(weight)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.weight[start:stop]

    def rows_of(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


def loss_gradient(asked: Options) -> Figures:
    """Largest relative error of a token's gradient in bfloat16 against float64, by the target's probability."""
    tokens, dim, vocabulary, found = 64, 512, 8192, {}
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(vocabulary, dim, generator=generator) * 0.05).bfloat16()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    pairs = torch.stack([weight[targets], weight[(targets + 531) % vocabulary]], dim=1).double()
    for probability in (0.5, 0.9, 0.99, 0.999, 0.9999):
        gap = torch.tensor(probability / (1 - probability)).log().item()
        wanted = torch.tensor([22.0, 22.0 - gap], dtype=torch.float64)
        hidden = (torch.linalg.pinv(pairs) @ wanted).bfloat16()
        logits = hidden.double() @ weight.double().T
        expected = logits.softmax(1) @ weight.double() - weight.double()[targets]
        _, gradient = token_cross_entropy(
            hidden.to(asked.device),
            targets.to(asked.device),
            _Table(weight.to(asked.device)),
            logit_map=LogitMap(),
            slice_size=2048,
            with_gradient=True,
        )
        assert gradient is not None, "asked for"
        error = (gradient.cpu().double() - expected).norm(dim=1) / expected.norm(dim=1)
        found[f"p = {probability}"] = error.max().item()
    if max(found.values()) > 0.01:
        raise AssertionError(f"more than 1 % off: {found}")
    return found
