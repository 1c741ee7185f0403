"""A GPU where Triton cannot build its own part: weights come by PyTorch's operators, and the reason is told."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("bitsandbytes")

from dist_qft import doctor
from dist_qft.quant.affine4_gathered import Affine4Gathered
from dist_qft.quant.affine8 import Affine8
from dist_qft.quant.codebook4 import Codebook4, _pairs_on
from dist_qft.quant.formats import NF4, Q8_0, Affine4
from dist_qft.quant.frozen import FrozenLinear
from dist_qft.quant.nf4 import codebook_on, dynamic_map
from dist_qft.quant.triton_here import triton_obstacle
from tests.support.fake_cuda import DEVICE, fake_cuda

# Triton's own build of a small C file, as it builds the part that launches kernels, on a machine without a compiler.
NO_COMPILER = """
from unittest.mock import PropertyMock, patch
import torch
from triton.runtime.build import compile_module_from_src
from triton.runtime.driver import DriverConfig
from dist_qft.quant.triton_here import triton_obstacle
build = PropertyMock(side_effect=lambda: compile_module_from_src("int anything;", "anything"))
with patch("torch.cuda.is_available", lambda: True), patch.object(DriverConfig, "active", build):
    print(triton_obstacle())
"""


@pytest.fixture
def no_driver(monkeypatch):
    """A GPU that Triton finds no driver for, as here; the reason is kept."""
    triton_obstacle.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        triton_obstacle()
    yield
    for kept in (triton_obstacle, dynamic_map, codebook_on, _pairs_on):
        kept.cache_clear()


def kernels(format) -> set[str]:
    """The kernels of a weight's way back to floats, on a GPU that is not there."""
    layer = FrozenLinear(128, 48, format, False, torch.bfloat16)
    with fake_cuda() as counts:
        layer.to(DEVICE)
        counts.take()
        layer.dequantize()
        return set(counts.take().kernels)


FORMATS = [Affine4(), Affine4((8, 4)), Affine4Gathered(4), Affine8(32), Q8_0(), NF4(64, double_quant=True)]
FORMATS += map(Codebook4, ("mxfp4", "nvfp4", "nvfp4-divided"))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_weights_are_dequantized_without_triton(no_driver, format):
    assert triton_obstacle() is not None
    assert not [name for name in kernels(format) if name.startswith("triton")]


def test_no_compiler_is_named(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "CC"}
    env |= {"PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", NO_COMPILER], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Triton cannot be used: Failed to find C compiler")


def test_doctor_says_it(no_driver):
    finding = doctor._triton()
    assert finding.status == "note" and finding.found == triton_obstacle() and "python3-dev" in finding.remedy
    triton_obstacle.cache_clear()
    assert triton_obstacle() is None
