"""Distributed fine-tuning of 4-bit language models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    from dist_qft.tuned_model.loaded import LoadedModel

__version__ = "0.1.0"


def load(path: "str | PathLike[str]", device: str = "cpu") -> "LoadedModel":
    """A model with `generate` and `logits`, from a run, a checkpoint, a GGUF file or a merged folder."""
    from dist_qft.tuned_model.loaded import (
        load_model,  # imports torch and transformers, which `import dist_qft` must not
    )

    return load_model(path, device)
