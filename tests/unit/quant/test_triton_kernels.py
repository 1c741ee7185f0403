"""The CUDA kernels without a GPU: by Triton's interpreter the same bits as the formats' own arithmetic, and compiled
ahead of time for each architecture. Not their speed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

COMPARE = """
import torch
from dist_qft.quant.affine4 import Affine4
from dist_qft.quant.affine4_gathered import Affine4Gathered
from dist_qft.quant.affine8 import Affine8
from dist_qft.quant.codebook4 import Codebook4
from dist_qft.quant.nf4 import CONSTANT_BLOCK, NF4, codebook, dynamic_map
from dist_qft.quant.nibbles import group_width
from dist_qft.quant.q8_0 import Q8_0
from dist_qft.quant.triton_kernels import (
    dequantize_affine4, dequantize_affine4_gathered, dequantize_affine8, dequantize_codebook4, dequantize_nf4_nested,
    dequantize_q8_0,
)

guarded, device_of = [], torch.cuda.device_of
torch.cuda.device_of = lambda tensor: guarded.append(tensor) or device_of(tensor)

def check(format, packed, shape, dtype, write):
    out = torch.full(shape, float("nan"), dtype=dtype)
    write(out)
    assert guarded.pop() is out, "a kernel runs on the device of what it writes"
    expected = format.dequantize(packed, shape, dtype)
    if dtype == torch.bfloat16:  # the interpreter cuts off where a GPU rounds
        expected = format.dequantize(packed, shape, torch.float32)
        expected = (expected.view(torch.int32) & -65536).view(torch.float32).bfloat16()
    assert torch.equal(out, expected), (format, shape, dtype)

def random_packed(format, shape):  # any codes; scales that no sum makes infinite
    generator = torch.Generator().manual_seed(0)
    packed = {}
    for name, (size, kind) in format.packed_shapes(shape).items():
        if kind == torch.uint8:
            packed[name] = torch.randint(0, 256, size, generator=generator).to(torch.uint8)
        elif kind == torch.int32:
            packed[name] = torch.randint(0, format.groups, size, generator=generator).to(torch.int32)
        else:
            packed[name] = (torch.randn(size, generator=generator) * 2).to(kind)
    if getattr(format, "kind", None) == "mxfp4":
        packed["scale"] = packed["scale"] % 16 + 120
    elif isinstance(format, Codebook4):
        packed["scale"] = packed["scale"] & 0xBF  # 0x7F and 0xFF are NaN
    return packed

for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for shape, block in [((16, 64), (1, 32)), ((16, 576), (8, 4)), ((24, 40), (3, 5)), ((2, 1056), (1, 1056))]:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 0.5
        for format in (Affine4(block), Affine4(block, "float32"), Q8_0(), Q8_0(16, "float32")):
            packed = format.quantize(weight)
            if isinstance(format, Affine4):
                args = packed, format.block, group_width(shape[1])
                check(format, packed, shape, dtype, lambda out: dequantize_affine4(*args, out))
            else:
                args = packed, format.block_in(shape[1])
                check(format, packed, shape, dtype, lambda out: dequantize_q8_0(*args, out))
    for shape in ((6, 64), (3, 1056)):
        for format in (Affine4Gathered(5), Affine4Gathered(1, "float32")):
            packed = random_packed(format, shape)
            if format.constants == "float32":
                packed["scale"] = packed["scale"].half().float()
            write = lambda out: dequantize_affine4_gathered(packed, group_width(shape[1]), out)
            check(format, packed, shape, dtype, write)
        for format in (Affine8(32), Affine8(16, "float16")):
            packed = random_packed(format, shape)
            packed["codes"], packed["scale"] = packed["codes"] & 31, packed["scale"].half().to(packed["scale"].dtype)
            check(format, packed, shape, dtype, lambda out: dequantize_affine8(packed, format.block, out))
        for format in map(Codebook4, ("mxfp4", "nvfp4", "nvfp4-divided")):
            packed = random_packed(format, shape)
            args = packed["codes"], format.scales(packed), format.block
            check(format, packed, shape, dtype, lambda out: dequantize_codebook4(*args, out))
    for shape, block in (((3, 1088), 64), ((5, 1024), 32), ((520, 128), 128)):
        format = NF4(block, double_quant=True)
        packed = format.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3)
        args = packed, block, CONSTANT_BLOCK, dynamic_map(torch.device("cpu")), codebook()
        check(format, packed, shape, dtype, lambda out: dequantize_nf4_nested(*args, out))
print("equal")
"""


def test_kernels_give_the_formats_bits():
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", COMPARE], env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"


POINTERS = {"codes": "*u8", "group": "*i32", "columns": "i32", "groups": "i32", "absmax_codes": "*u8"}
POINTERS |= dict.fromkeys(("absmax_absmax", "absmax_offset", "dynamic", "codebook"), "*fp32")
# kernel, types of its constants, numbers that it is compiled for
VARIANTS: list[tuple[str, dict[str, str], dict[str, int]]] = [
    ("_affine4_kernel", {"scale": "*fp16", "zero": "*fp16"}, {"B_OUT": 1, "B_IN": 32, "GROUP": 32}),
    ("_affine4_kernel", {"scale": "*fp32", "zero": "*fp32"}, {"B_OUT": 8, "B_IN": 4, "GROUP": 2}),
    ("_affine4_kernel", {"scale": "*fp16", "zero": "*fp16"}, {"B_OUT": 3, "B_IN": 5, "GROUP": 8}),
    ("_affine4_gathered_kernel", {"scale": "*fp16", "zero": "*fp16"}, {"GROUP": 32}),
    ("_affine4_gathered_kernel", {"scale": "*fp32", "zero": "*fp32"}, {"GROUP": 32}),
    ("_affine8_kernel", {"scale": "*fp32", "zero": "*fp32"}, {"BLOCK": 32}),
    ("_q8_0_kernel", {"codes": "*i8", "scale": "*fp16"}, {"BLOCK": 32}),
    ("_q8_0_kernel", {"codes": "*i8", "scale": "*fp32"}, {"BLOCK": 16}),
    ("_q8_0_kernel", {"codes": "*i8", "scale": "*fp16"}, {"BLOCK": 25}),
    ("_codebook4_kernel", {"scale": "*fp32"}, {"BLOCK": 32}),
    ("_codebook4_kernel", {"scale": "*fp32"}, {"BLOCK": 16}),
    ("_nf4_nested_kernel", {}, {"BLOCK": 64, "SHARED": 256}),
]


# Loads per 8 weights in bfloat16 where all is aligned: codes, and each constant once.
LOADS = {("_affine4_kernel", 32): 3, ("_affine8_kernel", 32): 3, ("_q8_0_kernel", 32): 2, ("_codebook4_kernel", 32): 2}
RESULTS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
MOST_REGISTERS = 64  # of a thread: with more an H100 no longer holds half of the threads that it could


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_kernels_compile_without_a_gpu(capability, tmp_path):
    """For results of every dtype, a multiple of 16 columns or not: no spills to memory, and few registers."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from dist_qft.quant import triton_kernels

    for name, constants, numbers in VARIANTS:
        kernel: Any = getattr(triton_kernels, name)
        for dtype, aligned in [*((dtype, True) for dtype in RESULTS), (torch.bfloat16, False)]:
            block = numbers.get("B_IN", numbers.get("BLOCK", 1))
            sizes = {**numbers, **triton_kernels.sizes(dtype, block)}
            result = RESULTS[dtype]
            types = {**POINTERS, **constants, "out": result, **dict.fromkeys(sizes, "constexpr")}
            signature = {argument: types[argument] for argument in kernel.arg_names}
            run_time = [index for index, kind in enumerate(signature.values()) if kind != "constexpr"]
            attributes = {(index,): [["tt.divisibility", 16]] for index in run_time} if aligned else {}
            sizes = {size: number for size, number in sizes.items() if size in kernel.arg_names}
            source = ASTSource(kernel, signature, sizes, attributes)
            unfused = {"enable_fp_fusion": False} if "nf4" in name else {}
            compiled = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=unfused)
            odd = "gathered" not in name and block % 4  # threads exchange what they store together
            assert not (aligned and not odd and compiled.metadata.shared), (name, result)
            registers, stack = resources(compiled.asm["cubin"], tmp_path / "kernel.cubin")
            print(f"sm_{capability} {name} {numbers} {result} aligned={aligned}: {registers} registers")
            assert stack == 0 and registers <= MOST_REGISTERS, (name, result, registers, stack)
            assert not unfused or "fma" not in compiled.asm["ptx"]
            if aligned and dtype == torch.bfloat16 and (name, block) in LOADS:
                assert compiled.asm["ptx"].count("ld.global") == LOADS[name, block], name


def resources(cubin: bytes, path: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes of memory that each needs beside them: what did not fit is spilled there."""
    from triton import knobs

    path.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", told)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local
