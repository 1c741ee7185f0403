"""The small files of a model folder: configuration, tokenizer with its chat template, generation settings."""

from pathlib import Path

import torch
from transformers import GenerationConfig

from dist_qft.base_model.model_config import read_model_config
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.base_model.tokenizer import load_tokenizer
from dist_qft.config.schema import ModelConfig


def write_model_files(folder: Path, model: ModelConfig, base: BaseModel, dtype: torch.dtype) -> None:
    """Write what `from_pretrained` needs besides the weights, whose float type is `dtype`."""
    config, _ = read_model_config(model)
    config.dtype = dtype
    config.architectures = [type(base.model).__name__]
    config.save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    _generation_config(model, base).save_pretrained(folder)


def _generation_config(model: ModelConfig, base: BaseModel) -> GenerationConfig:
    if not model.path.endswith(".gguf"):
        try:
            return GenerationConfig.from_pretrained(model.path, revision=model.revision or "main")
        except OSError:
            pass  # many models have none
    return GenerationConfig.from_model_config(base.config)
