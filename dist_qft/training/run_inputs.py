"""All that is known of a run before any weight is read and any rank has met another."""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dist_qft.base_model.base_settings import BaseSettings
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.base_model.sources import TensorSource
from dist_qft.config.schema import RunConfig
from dist_qft.data.prepare import Prepared
from dist_qft.errors import DistQFTError
from dist_qft.merge.certificate_file import read_certificate
from dist_qft.merge.recipe import Recipe
from dist_qft.methods.trainable import TrainableSpec
from dist_qft.ranks.world import World
from dist_qft.sharding.engine import Engine
from dist_qft.sharding.engines import package_versions
from dist_qft.storage.checkpoint import ADAPTER_MODEL, Checkpoint, checkpoint_path
from dist_qft.storage.manifest import sha256_of
from dist_qft.storage.run_folder import result_step
from dist_qft.storage.trainer_state import BaseEvaluation
from dist_qft.training.best_evaluation import has_waited_enough
from dist_qft.training.exact_share import run_length
from dist_qft.training.summary import summarized_steps
from dist_qft.tuned_model.warm_start import StartingValues


@dataclass(frozen=True)
class LoadedBase:
    """A base that an earlier run of this process has loaded and left without trainables, for the next one."""

    tokenizer: PreTrainedTokenizerBase
    base: BaseModel
    source: TensorSource
    engine: Engine


@dataclass(frozen=True)
class RunInputs:
    """The parts of a run.

    Attributes:
        skeleton: the base on the meta device.
        source: where its weights will come from.
        spec: of the trainables.
        settings: of the base, besides its weights.
        checkpoint: where to continue from; None starts fresh.
        existing: names of the checkpoints in the run's folder when this was gathered.
        recipe: the merge that ends the run, if the config asks for one.
        notes: lines to tell the user at the start, such as a checkpoint that was refused.
        shard_group: ranks that share one base, as `sharding.group: auto` has chosen; None where it did not choose.
        start: values that the trainables of a new run begin with, if not their own.
        loaded: the base, if it need not be loaded any more; `skeleton` is then no longer on the meta device.
        base_evaluation: a result for the bare base; it counts where the held-out data are the same.
        keep_rows: the tuned model's evaluation scores every held-out row by itself, too.
    """

    config: RunConfig
    world: World
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    skeleton: BaseModel
    source: TensorSource
    spec: TrainableSpec[Any]
    settings: BaseSettings
    data: Prepared
    checkpoint: Checkpoint | None
    existing: tuple[str, ...]
    recipe: Recipe | None
    notes: list[str]
    loaded: LoadedBase | None = None
    start: StartingValues | None = None
    shard_group: int | None = None
    base_evaluation: BaseEvaluation | None = None
    keep_rows: bool = False

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    def placed(self) -> RunConfig:
        """The config with the number of ranks that `sharding.group: auto` stands for."""
        if self.shard_group is None:
            return self.config
        sharding = self.config.sharding.model_copy(update={"group": self.shard_group})
        return self.config.model_copy(update={"sharding": sharding})

    def must_match(self) -> dict[str, str]:
        """Inputs that must be the same on all ranks, by name."""
        state = self.checkpoint.state if self.checkpoint else None
        return {
            "choice of sharding.group: auto": f"{self.shard_group}",
            "config": self.config.model_dump_json(),
            "compute dtype": str(self.skeleton.dtype),
            "training data": self.data.train.digest,
            "held-out data": self.data.held_out_digest,
            "checkpoint": f"{state.step} {state.data_chain} {self.finished}" if state else "",
            "package versions": package_versions(self.config),
            "Python version": platform.python_version(),
        }

    @property
    def finished(self) -> bool:
        """True if there is nothing left to do: the last step is saved, the summary written, the merge there."""
        steps, _ = self.length()
        if self.checkpoint is None:
            return False
        state = self.checkpoint.state
        trained = state.step == steps or self.stopped_early
        return trained and state.step == summarized_steps(self.output_dir, state.run_id) and self._merged

    @property
    def _merged(self) -> bool:
        """True if the merge that the config asks for, if any, is there with the adapters of the run's result in it."""
        if self.recipe is None:
            return True
        path = self.recipe.request.path
        if self.checkpoint is None or not path.exists():
            return False
        try:
            said = read_certificate(path)[1]
        except DistQFTError:  # something else is there, or a damaged certificate
            return False
        result = result_step(self.output_dir, self.checkpoint.state.step)
        adapter = checkpoint_path(self.output_dir, result) / ADAPTER_MODEL
        return adapter.exists() and said.adapter.sha256 == sha256_of(adapter)

    @property
    def stopped_early(self) -> bool:
        """True if the checkpoint's run has waited for a better evaluation as long as the config asks for now."""
        return self.checkpoint is not None and has_waited_enough(self.checkpoint.state, self.config.evaluation)

    def length(self) -> tuple[int, int]:
        """Optimizer steps and data rows of the run."""
        return run_length(self.config.train, len(self.data.train))
