"""GGUF files of the common types, made from SmolLM2: our logits against llama.cpp's. A measurement, not a test.

    PYTHONPATH=. python benchmarks/gguf_types.py [FILE.gguf]

Makes a file of each type out of FILE (SmolLM2-135M-Instruct.Q4_1.gguf), with ggml's quantizers and llama.cpp's rule for
which tensor gets which type. Prints a line for each: types of the tensors, size, the largest difference of
log-probabilities between llama.cpp and us on the ten likeliest next tokens at 12 places, and for scale that between
llama.cpp and the model before this quantization. llama.cpp quantizes activations to 8 bits, which we do not; so Q8_0,
whose weights are the closest to the model before, shows how far apart two correct programs are.
"""

import sys
from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import dist_qft
from dist_qft.base_model.gguf_file import GgufSource
from dist_qft.base_model.gguf_types import FLOATS, GGUF_TYPES
from dist_qft.merge.probe import probe_ids
from tests.support.llama_cpp import log_probability_errors
from tests.support.tiny_gguf import llama_cpp_type, quantized_again

TYPES = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "Q8_0")
LENGTHS = tuple(range(5, 65, 5))


def main(source: str = "models/SmolLM2-135M-Instruct.Q4_1.gguf") -> None:
    base = dist_qft.load(source)
    ids = probe_ids(base.tokenizer)
    before = base.logits(torch.tensor([ids]))[0]
    layers = len(base.base.layers)
    del base
    print("| file | tensors | MB | held value for value | ours | before |")
    print("|---|---|---|---|---|---|")
    with TemporaryDirectory() as folder:
        for mixture in TYPES:
            type_of = partial(llama_cpp_type, mixture, layers=layers)
            path = quantized_again(Path(source), Path(folder) / f"{mixture}.gguf", type_of)
            ours = dist_qft.load(path).logits(torch.tensor([ids]))[0]
            errors = log_probability_errors(path, ids, [ours, before], LENGTHS)
            print(line(mixture, path, *errors), flush=True)
            path.unlink()


def line(mixture: str, path: Path, ours: float, before: float) -> str:
    """A row of the table."""
    file = GgufSource(path)
    types = Counter(file.gguf_type(name) for name in file.names())
    shown = ", ".join(f"{count} {kind}" for kind, count in sorted(types.items()) if kind not in FLOATS)
    exact = all(kind in GGUF_TYPES for kind in types if kind not in FLOATS)
    size = path.stat().st_size / 1e6
    return f"| {mixture} | {shown} | {size:.1f} | {'yes' if exact else 'no'} | {ours:.3f} | {before:.3f} |"


if __name__ == "__main__":
    main(*sys.argv[1:])
