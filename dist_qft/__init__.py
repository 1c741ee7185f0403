"""Distributed fine-tuning of 4-bit language models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    from dist_qft.tuned_model.loaded_model import LoadedModel

__version__ = "0.1.0"


def load(path: "str | PathLike[str]", device: str = "cpu") -> "LoadedModel":
    """A model with `generate` and `logits`, from a run, a checkpoint, a GGUF file or a merged folder."""
    # Here, because it imports torch and transformers, which `import dist_qft` must not.
    from os import fspath

    from dist_qft.tuned_model.loaded_model import load

    return load(fspath(path), device)
