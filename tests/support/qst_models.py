"""Small random decoders of every family that QST is checked on, side networks beside them, and runs of those."""

from pathlib import Path

import torch
from torch import nn
from transformers import (
    Gemma2Config,
    GemmaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from dist_qft.base_model.load import load_base
from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.methods.door import make_method
from dist_qft.config.schema import ModelConfig, QuantizationConfig, RunConfig
from dist_qft.methods.qst.network import SideNetwork
from dist_qft.methods.qst.pruning import start_from_base
from dist_qft.methods.qst.spec import side_network_spec
from dist_qft.sharding.replicated import ReplicatedEngine
from dist_qft.tuned_model.loaded_model import open_base
from tests.support.tiny_model import VOCABULARY, save_tiny_model, tiny_config, tiny_llama_config

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
_OPT = {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "init_std": 0.1,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": tiny_llama_config(),
    "mistral": MistralConfig(**_SIZES, sliding_window=6),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen3": Qwen3Config(**_SIZES, head_dim=32),
    "opt": OPTConfig(**_OPT),
    "gemma": GemmaConfig(**{**_SIZES, "tie_word_embeddings": True}, head_dim=32),
    "gemma2": Gemma2Config(**{**_SIZES, "tie_word_embeddings": True}, head_dim=32, sliding_window=6),
}


METHOD = {"name": "qst", "reduction": 4, "downsample_rank": 8}


def qst_config(model: Path, output_dir: Path, **sections: dict) -> RunConfig:
    """A run of 10 steps at a learning rate that lets the side network take part soon."""
    method = {**METHOD, **sections.pop("method", {})}
    train = {"max_steps": 10, "learning_rate": 2e-2, **sections.pop("train", {})}
    quantization = {"linear": "nf4", "block": [64]}
    config = tiny_config(model, output_dir, train=train, quantization=quantization, **sections)
    tree = config.model_dump(exclude_unset=True) | {"method": method}
    return RunConfig.model_validate(tree)


def load_whole(folder: Path, linear: str = "nf4", dtype: torch.dtype = torch.float32) -> BaseModel:
    """The base of a Hugging Face folder, held whole. Needs a process group."""
    model = ModelConfig(path=str(folder), attention="eager" if folder.name == "gemma2" else "sdpa")
    base = build_skeleton(model, QuantizationConfig(linear=linear), dtype)
    engine = ReplicatedEngine()
    engine.shard(base.units, torch.device("cpu"))
    load_base(base, open_source(model), engine, torch.device("cpu"))
    return base


def side_network(base: BaseModel, **settings: object) -> SideNetwork:
    """A fresh side network beside `base`, attached."""
    method = make_method(name="qst", **{"reduction": 4, "downsample_rank": 8, **settings})
    side = side_network_spec(method, base).build(seed=0)
    side.attach(base.model)
    return side


def not_pruned_from(path: Path) -> list[str]:
    """The matrices that are not every fourth row and column of a base that comes quantized. Needs a process group."""
    base = open_base(path, torch.device("cpu"))
    side = side_network(base)
    start_from_base(side, base, open_source(ModelConfig(path=str(path))))
    narrow = {f"model.{name}": parameter for name, parameter in side.decoder.named_parameters()}
    wide = {
        f"{name}.weight": layer.format.dequantize(layer.packed(), layer.weight_shape, torch.float32)
        for name, layer in base.linears.items()
    }
    return [name for name, weight in wide.items() if not torch.equal(narrow[name], weight[::4, ::4])]


def perturb(side: SideNetwork) -> None:
    """Random values everywhere, as after training: the side network has its share of every logit."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in side.named_tensors():
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2, generator=generator)
            if name == "alpha":
                parameter.fill_(0.5)


def family_folder(name: str, root: Path) -> Path:
    """A random model of the family, saved."""
    return save_tiny_model(root / name, FAMILIES[name])
