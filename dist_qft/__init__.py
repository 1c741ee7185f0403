"""Distributed fine-tuning of 4-bit language models."""

from typing import TYPE_CHECKING

from dist_qft.base_model.transformers_hook import register_with_transformers

if TYPE_CHECKING:
    from os import PathLike

    import torch

    from dist_qft.tuned_model.loaded_model import LoadedModel

__version__ = "0.2.0"

register_with_transformers()


def load(
    path: "str | PathLike[str]", device: "str | torch.device" = "cpu", dtype: "str | torch.dtype | None" = None
) -> "LoadedModel":
    """A model with `generate` and `logits`, from a run, a checkpoint, a GGUF file or a merged folder.

    Args:
        device: "cpu" or "cuda".
        dtype: compute dtype, "float32" or "bfloat16". Default: the run's, or for a model float32 on CPUs and bfloat16
            on CUDA.
    """
    # Here, because it imports torch and transformers, which `import dist_qft` must not.
    from os import fspath

    from dist_qft.tuned_model.loaded_model import load

    return load(fspath(path), device, dtype)
