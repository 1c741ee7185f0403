"""A run's own checkpoints: restored at its start, written while it goes on."""

import uuid
from pathlib import Path

from torch import Tensor

from dist_qft.ranks.collectives import SideGroup, maximum, on_rank_0
from dist_qft.storage.checkpoint import Checkpoint, checkpoint_path, read_checkpoint
from dist_qft.storage.lock import FolderLock
from dist_qft.storage.saving import Saver
from dist_qft.storage.trainer_state import TrainerState
from dist_qft.training.monitor import Monitor
from dist_qft.training.optimizer_state import OptimizerState
from dist_qft.training.run_inputs import RunInputs
from dist_qft.training.train_step import TrainStep
from dist_qft.tuned_model.checkpointed import adapter_config


def first_state(inputs: RunInputs) -> TrainerState:
    """The state in which the run begins: its checkpoint's, or step 0 under a new run id."""
    checkpoint = inputs.checkpoint
    state = checkpoint.state if checkpoint else TrainerState(data_digest=inputs.data.train.digest)
    state.run_id = state.run_id or uuid.uuid4().hex
    state.stopped_early = inputs.stopped_early
    state.config, state.world_size = inputs.config.model_dump(), inputs.world.world_size
    return state


class Checkpointing:
    """Restores and saves one run. Public methods are collective; rank 0 writes.

    Args:
        trained: the trainables.
        optimizer: the state of their optimizer.
        state: of the run, which moves on as the run does.
        monitor: its records belong to a checkpoint, too.
        lock: of the run's folder, on rank 0.
    """

    def __init__(
        self,
        inputs: RunInputs,
        trained: TrainStep,
        optimizer: OptimizerState,
        state: TrainerState,
        monitor: Monitor,
        lock: FolderLock | None,
    ) -> None:
        self._inputs, self._trained, self._optimizer = inputs, trained, optimizer
        self._state, self._monitor = state, monitor
        newest = inputs.checkpoint.path if inputs.checkpoint else None
        keep = inputs.config.checkpoint.save_total_limit
        self._saver = Saver(inputs.output_dir, keep, newest, lock) if inputs.world.rank == 0 else None
        self._side_group = SideGroup(inputs.config.sharding.rank0_timeout_seconds)

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint of the run; known on rank 0."""
        return self._saver.newest if self._saver else None

    def restore(self) -> None:
        """Put the checkpoint that the run continues from, if any, into trainables and optimizer."""
        checkpoint, trained = self._inputs.checkpoint, self._trained
        if checkpoint is not None:
            trained.parts.load_tensors(checkpoint.trainables)
            self._optimizer.load(checkpoint.optimizer, str(checkpoint.path))
            checkpoint.drop_tensors()
        trained.flat.broadcast()

    def has(self, step: int) -> bool:
        """True on all ranks if rank 0 finds the checkpoint of that step."""
        path, rank = checkpoint_path(self._inputs.output_dir, step), self._inputs.world.rank
        return maximum(float(rank == 0 and path.exists()), self._inputs.device) > 0

    def take_back(self, step: int) -> None:
        """Put the trainables of an earlier checkpoint of this run back; rank 0 reads it. For a run that is at its end.

        Raises:
            CorruptFileError: the checkpoint fails verification; on all ranks.
        """
        path, trained = checkpoint_path(self._inputs.output_dir, step), self._trained
        on_rank_0(lambda: trained.parts.load_tensors(read_checkpoint(path).trainables), self._inputs.device)
        trained.flat.broadcast()

    def save(self) -> None:
        """Have rank 0 write a checkpoint of the present step while training goes on.

        Raises:
            NumericError: on all ranks, if the optimizer's state is not finite.
        """
        self._optimizer.require_finite(self._state.step)
        # All ranks wait for the save before: those that rank 0 kept waiting in a step would end by its timeout.
        self.wait()
        optimizer = self._optimizer.gather()
        if self._saver is not None:
            self._write(self._saver, optimizer)

    def _write(self, saver: Saver, optimizer: dict[str, Tensor]) -> None:
        trained, inputs = self._trained, self._inputs
        self._state.metrics_bytes, self._state.metrics_digest = self._monitor.flush()
        saver.start(
            Checkpoint(
                path=checkpoint_path(inputs.output_dir, self._state.step),
                adapter_config=adapter_config(inputs.config, trained.parts.base, inputs.spec, inputs.settings),
                trainables=dict(trained.parts.named_tensors()),
                optimizer=optimizer,
                state=self._state,
            )
        )

    def check(self) -> None:
        """Raise the error of a save that has failed meanwhile."""
        if self._saver is not None:
            self._saver.check()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        If another rank exited first, the launcher would kill rank 0 while it writes.
        """
        if self._saver is not None:
            self._saver.wait()
        self._side_group.barrier()

    def close(self) -> None:
        """Finish the save that is going on and give the waiting group up; also after a failure."""
        if self._saver is not None:
            self._saver.close()
        self._side_group.close()
