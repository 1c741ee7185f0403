"""`dist_qft.load`: a model ready to answer, from a run, a checkpoint, or a model file or folder."""

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.base_model.tokenizer import load_tokenizer
from dist_qft.base_model.weight_files import open_source, stored_quantization
from dist_qft.config.schema import ModelConfig, ShardingConfig
from dist_qft.errors import SetupError, UserError
from dist_qft.methods.adapters.attach import AdapterSet
from dist_qft.methods.trainable import TrainableSet
from dist_qft.ranks.connection import connect
from dist_qft.ranks.device import compute_dtype
from dist_qft.ranks.world import World
from dist_qft.sharding.engines import make_engine
from dist_qft.storage.checkpoint import TRAINER_STATE, Checkpoint, list_checkpoints
from dist_qft.tuned_model.answer import Sampling, answers
from dist_qft.tuned_model.assemble import Assembled, materialize
from dist_qft.tuned_model.checkpointed import config_of, find_checkpoint, open_checkpointed
from dist_qft.tuned_model.prompts import date_of

_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class LoadedModel:
    """A model held whole by this process, with its tokenizer.

    Attributes:
        trainables: None for a merged model.
        today: the date that the chat template prints, as in the run; None takes the day of each answer.
    """

    base: BaseModel
    tokenizer: PreTrainedTokenizerBase
    trainables: TrainableSet | None
    device: torch.device
    today: datetime.date | None = None

    @property
    def adapters(self) -> AdapterSet | None:
        """The trainables if they are tile adapters, else None."""
        return self.trainables if isinstance(self.trainables, AdapterSet) else None

    @overload
    def generate(self, prompts: str, max_new_tokens: int = 64, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompts: list[str], max_new_tokens: int = 64, **sampling: Any) -> list[str]: ...
    def generate(self, prompts: str | list[str], max_new_tokens: int = 64, **sampling: Any) -> str | list[str]:
        """Answers to one prompt or several; each is a user's turn if the tokenizer has a chat template.

        Args:
            sampling: fields of `Sampling`: temperature (0, greedy, by default), top_p, top_k, seed.
        """
        several = [prompts] if isinstance(prompts, str) else prompts
        settings = Sampling(max_new_tokens, **sampling)
        found = answers(self.base, self.tokenizer, several, settings, self.device, self.today)
        return found[0] if isinstance(prompts, str) else found

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) in float32 of token ids (batch, length)."""
        return self.base.model(input_ids=input_ids.to(self.device)).logits.float()


def load(path: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None) -> LoadedModel:
    """Load a run's folder (its newest checkpoint), a checkpoint, a GGUF file, or a quantized or dense folder.

    Weights stay in the formats of their files. In a process group every rank must call this, and each holds the whole.

    Args:
        dtype: compute dtype, float32 or bfloat16. Default: the run's, or for a model float32 on CPUs and bfloat16
            on CUDA.

    Raises:
        UserError: nothing of that kind is at `path`, or the adapter belongs to another base.
        CorruptFileError: a checkpoint or model file is damaged.
    """
    path, device, precision = Path(path), _device(device), _precision(dtype)
    if not path.exists():
        raise UserError(f"no file or folder '{path}'")
    with _process_group(device):
        if holds_model(path):
            base = open_base(path, device, precision=precision or "auto")
            return LoadedModel(base, load_tokenizer(ModelConfig(path=str(path))), None, device)
        checkpoint = find_checkpoint(path)
        parts, tokenizer = whole_on_this_rank(checkpoint, device, precision=precision)
        return LoadedModel(parts.base, tokenizer, parts.trainables, device, date_of(config_of(checkpoint)))


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device: got {device!r}, must be cpu or cuda") from error
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"device: got {device!r}, must be cpu or cuda")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise SetupError(f"device: got {device!r}, but PyTorch finds no CUDA device here; use cpu")
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found


def _precision(dtype: str | torch.dtype | None) -> str | None:
    """The value of `train.precision` for a compute dtype."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype: got {name}, must be float32 or bfloat16")
    return name


def holds_model(path: Path) -> bool:
    """True if a path holds a model, False if it may hold a run or a checkpoint."""
    if path.suffix == ".gguf":
        return True
    return (path / "config.json").is_file() and not (path / TRAINER_STATE).is_file() and not list_checkpoints(path)


def open_base(path: Path, device: torch.device, attention: str | None = None, precision: str = "auto") -> BaseModel:
    """Load a model's files as they are, whole on this rank. Collective; needs a process group.

    Args:
        attention: as `model.attention`; None takes sdpa, or eager for a family that has no sdpa.
        precision: as `train.precision`.
    """
    quantization, dtype = stored_quantization(), compute_dtype(precision, device)
    model = ModelConfig.model_validate({"path": str(path), "attention": attention or "sdpa"})
    try:
        base = build_skeleton(model, quantization, dtype)
    except UserError as error:
        if attention is not None or not str(error).startswith("model.attention"):
            raise
        model = model.model_copy(update={"attention": "eager"})
        base = build_skeleton(model, quantization, dtype)
    materialize(base, open_source(model), make_engine("replicated"), device)
    return base


def whole_on_this_rank(
    checkpoint: Checkpoint, device: torch.device, base_path: str | None = None, precision: str | None = None
) -> tuple[Assembled, PreTrainedTokenizerBase]:
    """Open a checkpoint on its base, whole on this rank whatever its run's engine. Collective; needs a process group.

    Args:
        base_path: where the base lies now, if not where it was.
        precision: as `train.precision`; None takes the run's.
    """
    config = config_of(checkpoint)
    config = config.model_copy(update={"sharding": ShardingConfig(engine="replicated")})
    if base_path is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": base_path})})
    if precision is not None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    return open_checkpointed(checkpoint, config, device)


@contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    """The caller's process group, or one of this process alone for as long as loading takes."""
    if dist.is_initialized():
        yield
        return
    alone = World(0, 1, 0, 1, "127.0.0.1", 0, "single")
    current = torch.cuda.current_device() if device.type == "cuda" else None
    try:
        with connect(alone, device, _TIMEOUT_SECONDS):
            yield
    finally:
        if current is not None:  # what the caller does next is its own business
            torch.cuda.set_device(current)
