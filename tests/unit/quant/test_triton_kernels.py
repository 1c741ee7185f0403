"""The CUDA kernels by Triton's interpreter, on a CPU: the same bits as the formats' own arithmetic. Not their speed."""

import os
import subprocess
import sys

import pytest

COMPARE = """
import torch
from dist_qft.quant.affine4 import Affine4
from dist_qft.quant.nibbles import group_width
from dist_qft.quant.q8_0 import Q8_0
from dist_qft.quant.triton_kernels import dequantize_affine4, dequantize_q8_0

for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for shape, block in [((16, 64), (1, 32)), ((16, 576), (8, 4)), ((24, 40), (3, 5)), ((2, 1056), (1, 1056))]:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 0.5
        for format in (Affine4(block), Affine4(block, "float32"), Q8_0(), Q8_0(16, "float32")):
            packed = format.quantize(weight)
            out = torch.full(shape, float("nan"), dtype=dtype)
            if isinstance(format, Affine4):
                dequantize_affine4(packed, format.block, group_width(shape[1]), out)
            else:
                dequantize_q8_0(packed, format.block_in(shape[1]), out)
            expected = format.dequantize(packed, shape, dtype)
            if dtype == torch.bfloat16:  # the interpreter cuts off where a GPU rounds
                expected = format.dequantize(packed, shape, torch.float32)
                expected = (expected.view(torch.int32) & -65536).view(torch.float32).bfloat16()
            assert torch.equal(out, expected), (format, shape, dtype)
print("equal")
"""


def test_kernels_give_the_formats_bits():
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", COMPARE], env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"
