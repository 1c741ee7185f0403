"""`dist_qft.load`: a model ready to answer, from a run, a checkpoint, or anything a merge has written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.base_model.tokenizer import load_tokenizer
from dist_qft.base_model.weight_files import open_source, stored_quantization
from dist_qft.config.schema import ModelConfig, ShardingConfig
from dist_qft.errors import UserError
from dist_qft.methods.adapters.attach import AdapterSet
from dist_qft.ranks.connection import connect
from dist_qft.ranks.device import compute_dtype
from dist_qft.ranks.world import World
from dist_qft.sharding.engines import make_engine
from dist_qft.storage.checkpoint import TRAINER_STATE, Checkpoint, list_checkpoints
from dist_qft.tuned_model.answer import answer
from dist_qft.tuned_model.assemble import materialize
from dist_qft.tuned_model.trained import config_of, find_checkpoint, open_trained

_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class LoadedModel:
    """A model held whole by this process, with its tokenizer; `adapters` is None for a merged one."""

    base: BaseModel
    tokenizer: PreTrainedTokenizerBase
    adapters: AdapterSet | None
    device: torch.device

    @overload
    def generate(self, prompts: str, max_new_tokens: int = 64) -> str: ...
    @overload
    def generate(self, prompts: Sequence[str], max_new_tokens: int = 64) -> list[str]: ...
    def generate(self, prompts: str | Sequence[str], max_new_tokens: int = 64) -> str | list[str]:
        """Greedy answers, one by one; each prompt is a user's turn if the tokenizer has a chat template."""
        if isinstance(prompts, str):
            return answer(self.base, self.tokenizer, prompts, max_new_tokens=max_new_tokens, device=self.device)
        return [self.generate(prompt, max_new_tokens) for prompt in prompts]

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) in float32 of token ids (batch, length)."""
        return self.base.model(input_ids=input_ids.to(self.device)).logits.float()


def load_model(path: str | Path, device: str | torch.device = "cpu") -> LoadedModel:
    """Load a run's folder (its newest checkpoint), a checkpoint, a GGUF file, or a quantized or dense folder.

    Weights stay in the formats of their files. In a process group every rank must call this, and each holds the whole.

    Raises:
        UserError: nothing of that kind is at `path`, or the adapter belongs to another base.
        CorruptFileError: a checkpoint or model file is damaged.
    """
    path, device = Path(path), torch.device(device)
    if not path.exists():
        raise UserError(f"no file or folder '{path}'")
    with _process_group(device):
        if is_model(path):
            return LoadedModel(open_model(path, device), load_tokenizer(ModelConfig(path=str(path))), None, device)
        return open_tuned(find_checkpoint(path), device)


def is_model(path: Path) -> bool:
    """Whether a path holds a model and not a run or checkpoint."""
    if path.suffix == ".gguf":
        return True
    return (path / "config.json").is_file() and not (path / TRAINER_STATE).is_file() and not list_checkpoints(path)


def open_model(path: Path, device: torch.device) -> BaseModel:
    """A model's files as they are, whole on this process; needs a process group. Collective."""
    model = ModelConfig(path=str(path))
    base = build_skeleton(model, stored_quantization(path), compute_dtype("auto", device))
    materialize(base, open_source(model), make_engine("replicated"), device)
    return base


def open_tuned(checkpoint: Checkpoint, device: torch.device, base_path: str | None = None) -> LoadedModel:
    """A checkpoint's adapters on its base, whole on this process; needs a process group. Collective.

    Args:
        base_path: where the base lies now, if not where it was.
    """
    config = config_of(checkpoint)
    changes = {"sharding": ShardingConfig(engine="replicated")}
    if base_path is not None:
        changes["model"] = config.model.model_copy(update={"path": base_path})
    parts, tokenizer = open_trained(checkpoint, config.model_copy(update=changes), device)
    return LoadedModel(parts.base, tokenizer, parts.trainables, device)


@contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    """The caller's process group, or one of this process alone for as long as loading takes."""
    if dist.is_initialized():
        yield
        return
    alone = World(0, 1, 0, 1, "127.0.0.1", 0, "single")
    with connect(alone, device, _TIMEOUT_SECONDS):
        yield
