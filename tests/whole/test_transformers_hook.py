"""`import dist_qft` tells transformers of our folders, in either order, and imports neither it nor torch."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZER_MAPPING["dist_qft"].__name__ == "DistQFTQuantizer"
assert AUTO_QUANTIZATION_CONFIG_MAPPING["dist_qft"]().weights_file == "packed.safetensors"
"""


@pytest.mark.parametrize(
    "code",
    [
        "import sys, dist_qft\nassert not {'torch', 'transformers'} & set(sys.modules)\n" + REGISTERED,
        "import transformers.quantizers\nimport dist_qft\n" + REGISTERED,
    ],
)
def test_either_import_may_come_first(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
