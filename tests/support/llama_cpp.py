"""llama.cpp itself, from its Python binding: its quantizers by their C names, and its log-probabilities."""

import ctypes
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch


@cache
def _library() -> ctypes.CDLL:
    module = pytest.importorskip("xllamacpp.xllamacpp", reason="xllamacpp, llama.cpp's binding, is not installed")
    library = ctypes.CDLL(module.__file__)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def quantize(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Rows of float32 in a GGUF type, as ggml packs them: uint8 (rows, bytes), or floats for a float type."""
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return gguf.quants.quantize(values, kind)
    values = np.ascontiguousarray(values, np.float32)
    rows, columns = values.shape
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    packed = np.zeros((rows, columns // block * block_bytes), np.uint8)
    weights = np.ones(columns, np.float32)  # the importance that some types ask for
    size = ctypes.c_int64
    written = _library().ggml_quantize_chunk(
        ctypes.c_int(kind.value),
        values.ctypes.data_as(ctypes.c_void_p),
        packed.ctypes.data_as(ctypes.c_void_p),
        size(0),
        size(rows),
        size(columns),
        weights.ctypes.data_as(ctypes.c_void_p),
    )
    assert written == packed.nbytes
    return packed


def log_probability_error(path: Path, ids: list[int], logits: torch.Tensor, lengths: tuple[int, ...]) -> float:
    """Largest difference of llama.cpp's log-probabilities from those of `logits`, over the likeliest next tokens."""
    return max(log_probability_errors(path, ids, [logits], lengths))


def log_probability_errors(
    path: Path, ids: list[int], candidates: list[torch.Tensor], lengths: tuple[int, ...], lora: Path | None = None
) -> list[float]:
    """`log_probability_error` of several logits (tokens, vocabulary) against one run of the file and its adapter."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp, llama.cpp's binding, is not installed")
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.verbosity = str(path), 128, 1, -1
    if lora is not None:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(parameters)
    worst, answered = [0.0] * len(candidates), 0
    for length in lengths:
        request = {"prompt": ids[:length], "n_predict": 1, "n_probs": 10, "temperature": 0.0}
        answer = server.handle_completions(request)["choices"][0]
        if answer["logprobs"] is None:  # the next token is a part of a character
            continue
        found = answer["logprobs"]["content"][0]["top_logprobs"]
        assert len(found) == 10
        answered += 1
        for index, logits in enumerate(candidates):
            expected = logits[length - 1].log_softmax(-1)
            errors = [abs(entry["logprob"] - float(expected[entry["id"]])) for entry in found]
            worst[index] = max(worst[index], *errors)
    assert answered >= min(3, len(lengths))
    return worst
