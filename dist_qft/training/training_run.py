"""The running part of a training run: its loop, its checkpoints, its end."""

import time
from typing import NoReturn

from dist_qft.config.load import CONFIG_FILE, keep_config
from dist_qft.data.ahead import BatchesAhead
from dist_qft.data.batches import Batches
from dist_qft.errors import Preempted
from dist_qft.ranks.collectives import maximum
from dist_qft.ranks.device import compute_reproducibly
from dist_qft.ranks.groups import leave_group, new_group
from dist_qft.ranks.preemption import StopSignal
from dist_qft.storage.lock import FolderLock
from dist_qft.storage.trainer_state import chain_step
from dist_qft.training.activations import choose_activations
from dist_qft.training.best_evaluation import compare, compares, gain, why_stopped
from dist_qft.training.checkpointing import Checkpointing, first_state
from dist_qft.training.evaluations import Evaluations
from dist_qft.training.monitor import Monitor
from dist_qft.training.opening import opening_lines
from dist_qft.training.optimizer_state import OptimizerState
from dist_qft.training.resume import chain_rows
from dist_qft.training.run_inputs import RunInputs
from dist_qft.training.step_meter import StepMeter, held_bytes, peak_bytes, step_scalars
from dist_qft.training.summary import SummaryFigures
from dist_qft.training.train_step import StepResult, make_train_step
from dist_qft.tuned_model.assemble import Assembled, make_forward


class TrainingRun:
    """One run on one rank: holds the parts and walks through the steps. Every public method is collective.

    Args:
        lock: of the run's folder, held by rank 0; None for a run that shares its folder with nobody.
    """

    def __init__(self, inputs: RunInputs, parts: Assembled, stop: StopSignal, lock: FolderLock | None = None) -> None:
        config, world = inputs.config, inputs.world
        self.inputs, self.config, self.world, self.parts = inputs, config, world, parts
        self.doing = "start-up"
        self._stop, self._started = stop, time.perf_counter()
        self.total_steps, total_rows = inputs.length()
        self.batches = Batches(
            inputs.data.train,
            seed=config.train.seed,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.per_device_train_batch_size,
            rank=world.rank,
            world_size=world.world_size,
            total_rows=total_rows,
        )
        self._ahead = BatchesAhead(self.batches, pin=True) if inputs.device.type == "cuda" else self.batches
        # A group of its own: nobody's timeout but this one's, and no queue behind the engine's gathers.
        self._group = new_group(inputs.device, config.sharding.timeout_seconds)
        compute_reproducibly(inputs.device, config.sharding.gradient_sum == "invariant")
        self._step_of_run = make_train_step(
            config,
            parts,
            make_forward(config, parts, inputs.spec, inputs.data.train, inputs.device),
            accumulation=self.batches.accumulation,
            total_steps=self.total_steps,
            group=self._group,
        )
        self.flat, self.optimizer = self._step_of_run.flat, self._step_of_run.optimizer
        self.meter = StepMeter(parts.engine, self.flat)
        self.state = first_state(inputs)
        self.monitor = Monitor(
            config,
            active=world.rank == 0,
            total_steps=self.total_steps,
            first_step=self.state.step,
            metrics_bytes=self.state.metrics_bytes,
            metrics_digest=self.state.metrics_digest,
        )
        self.evaluations = Evaluations(inputs, parts, self.monitor)
        kept = OptimizerState(self.optimizer, self.flat.parts, self.flat.slices, self._group)
        self.result_step = self.state.step  # whose trainables are the run's; see `finish`
        self.checkpoints = Checkpointing(inputs, self._step_of_run, kept, self.state, self.monitor, lock)

    def prepare(self) -> None:
        """Restore a checkpoint if there is one, make the replicas equal, print the opening lines."""
        self.checkpoints.restore()
        choose_activations(self.parts.base.model, self.parts.trainables, self.config.train, self.inputs.device)
        if self.world.rank == 0:
            aside = keep_config(self.config, self.inputs.output_dir / CONFIG_FILE)
            if aside is not None:
                self.monitor.say(f"'{self.inputs.output_dir / CONFIG_FILE}' as it was before is kept as '{aside.name}'")
        opening = opening_lines(self.inputs, self.parts, self.flat, self.batches.accumulation)
        for note in [*self.inputs.notes, *self.monitor.notes, *self.parts.base.notes, *opening]:
            self.monitor.say(note)

    def evaluate_base(self) -> None:
        """Held-out loss and answers of the bare base, unless a checkpoint or an earlier run here has them."""
        trained = self.inputs.checkpoint is not None
        known = self.state.base_eval
        if not trained and self.inputs.base_evaluation is not None:
            known = self.inputs.base_evaluation
        self.doing = "evaluation"
        try:
            self.evaluations.evaluate_base(known, self.state.step, self._stop, trained=trained)
        except Preempted:
            self._leave()
        self.state.base_eval = self.evaluations.base_record() or known

    def train(self) -> None:
        """Steps until the end, or until some rank was asked to stop.

        Raises:
            Preempted: a signal came; the state is saved.
        """
        self.parts.trainables.train()
        self.monitor.start()
        self._evaluate_if_due()  # one that a signal cut short
        if self.state.stopped_early:
            self.save()
        while self.state.step < self.total_steps and not self.state.stopped_early:
            result = self.run_step()
            if result.stop and self.state.step < self.total_steps:
                self._leave()
            self._evaluate_if_due()
            if self._save_due(self.state.step) and not self._saved_as_best():
                self.save()
        self._wait_for_save()
        if self.state.stopped_early and self.state.step < self.total_steps:
            self.monitor.say(why_stopped(self.state))

    def run_step(self) -> StepResult:
        """The next optimizer step, counted and logged."""
        step = self.state.step
        self.doing = f"step {step + 1}"
        self.checkpoints.check()
        self.meter.begin()
        micro_batches = self._ahead.micro_batches(step)
        self.meter.data_is_ready()
        digest_steps = self.config.sharding.digest_steps
        # Also before each save: a checkpoint of replicas that drifted apart would be worth nothing.
        check_digest = bool(digest_steps) and (step % digest_steps == 0 or self._save_due(step + 1))
        result = self._step_of_run.run(
            step,
            micro_batches,
            check_digest=check_digest,
            stop=self._stop,
            memory_mebibytes=held_bytes(self.inputs.device) / 2**20,
        )
        self._count(result)
        costs = self.meter.end(result.tokens)
        if (step + 1) % self.config.train.logging_steps == 0 or step + 1 == self.total_steps:
            epoch = self.state.rows_seen / len(self.inputs.data.train)
            values = step_scalars(result, costs, epoch, check_digest)
            self.monitor.scalars(step + 1, values)
            speed = f"{costs.seconds:.2f} s  {values['train/target_tokens_per_second']:.0f} tok/s"
            note = f"loss {result.loss:.4f}  lr {result.learning_rate:.2e}  {speed}"
            self.monitor.progress(step + 1, self.total_steps, note)
        return result

    def _count(self, result: StepResult) -> None:
        """Move the state on by one step."""
        state, ids = self.state, self.batches.row_ids(self.state.step)
        state.data_chain = chain_rows(state.data_chain, ids)
        state.rows_seen += len(ids)
        state.step += 1
        state.last_loss = result.loss
        state.history_digest = chain_step(
            state.history_digest, state.step, result.loss, result.learning_rate, result.grad_norm
        )

    def finish(self) -> None:
        """Evaluate and sample the tuned model, write `summary.json`, say where things are."""
        self.doing = "evaluation"
        try:
            self.result_step = self._take_best_back()
            best = self.result_step != self.state.step
            self.evaluations.evaluate_tuned(self.state.step, self._stop, best=best)
        except Preempted:
            self._leave()
        self.doing = "the summary"
        figures = self._figures()
        if self.world.rank == 0:
            path = figures.write(self.inputs.output_dir)
            settings = {**self.config.method.model_dump(), **self.config.train.model_dump()}
            settings |= {"engine": figures.engine, "world_size": figures.world_size}
            self.monitor.hparams(settings, {f"result/{key}": value for key, value in figures.results().items()})
            self.monitor.say(f"checkpoint  {self.checkpoints.newest}")
            self.monitor.say(f"summary     {path}")
        self.monitor.flush()

    def _take_best_back(self) -> int:
        """Make the best evaluation's trainables the run's, if the config asks for it; returns the step they are of."""
        state, best, metric = self.state, self.state.best_step, self.config.evaluation.metric
        if not self.config.checkpoint.keep_best or best in (0, state.step) or not self.checkpoints.has(best):
            return state.step
        last = self.evaluations.of_step(state.step, "eval", self._stop)
        assert state.best_loss is not None, "there is a best step"
        if last is None or gain(last, state.best_loss, metric) >= 0:
            return state.step
        named = f"checkpoint-{best}, {metric} {state.best_loss:.4f}"
        if not self.config.checkpoint.load_best_at_end:
            self.monitor.say(f"the best evaluation was that of {named}; eval, chat and merge take its folder, too")
            return state.step
        self.checkpoints.take_back(best)
        self.monitor.say(f"the run's result is {named}, and not the last step's")
        return best

    def close(self) -> None:
        """Finish the save that is going on, close the records and the groups; also after a failure."""
        self.checkpoints.close()
        self.monitor.close()
        if isinstance(self._ahead, BatchesAhead):
            self._ahead.close()
        self.flat.close()
        leave_group(self.inputs.device, self._group)  # each keeps threads that wake up a hundred times a second

    def save(self) -> None:
        """Have rank 0 write a checkpoint of this step while training goes on."""
        self.doing = f"saving step {self.state.step}"
        self.checkpoints.save()

    def _wait_for_save(self) -> None:
        self.doing = f"saving step {self.state.step}"
        self.checkpoints.wait()

    def _leave(self) -> NoReturn:
        """Save, and end the run as preempted."""
        step = self.state.step
        if step == 0:
            raise Preempted("stopped by a signal before the first step; start it again")
        self.save()
        self._wait_for_save()
        raise Preempted(f"stopped by a signal after step {step}, which is saved; continue with --resume auto")

    def _evaluate_if_due(self) -> None:
        state, every = self.state, self.config.evaluation.eval_steps
        if not every or state.step % every or state.step in (0, self.total_steps, state.evaluated_step):
            return
        self.doing = "evaluation"
        try:
            held_out = self.evaluations.measure("eval", state.step, self._stop)
            self.evaluations.answer_prompts("eval", state.step, self._stop)
        except Preempted:
            self._leave()
        state.evaluated_step = state.step
        if held_out is not None and compares(self.config):
            better = compare(state, held_out, self.config, self.inputs.data.held_out_digest)
            if better and self.config.checkpoint.keep_best:
                self.save()

    def _saved_as_best(self) -> bool:
        return self.config.checkpoint.keep_best and self.state.best_step == self.state.step

    def _save_due(self, step: int) -> bool:
        every = self.config.checkpoint.save_steps
        return step == self.total_steps or self.state.stopped_early or bool(every and step % every == 0)

    def _figures(self) -> SummaryFigures:
        base, tuned, engine, device = (
            self.evaluations.base,
            self.evaluations.tuned,
            self.parts.engine,
            self.inputs.device,
        )
        peak_rss, peak_device = peak_bytes(device)
        return SummaryFigures(
            run_id=self.state.run_id,
            method=self.config.method.name,
            engine=engine.name,
            world_size=self.world.world_size,
            steps=self.state.step,
            result_step=self.result_step,
            base_eval_loss=base.loss if base else None,
            tuned_eval_loss=tuned.loss if tuned else None,
            base_eval_metrics=base.metrics if base else {},
            tuned_eval_metrics=tuned.metrics if tuned else {},
            eval_tokens=tuned.tokens if tuned else 0,
            final_train_loss=self.state.last_loss,
            trainable_parameters=self.flat.count,
            base_bytes_per_rank=int(maximum(engine.resident_bytes(), device)),
            gather_bytes_per_step=self.meter.gathered_bytes_per_step,
            reduce_bytes_per_step=self.meter.reduced_bytes_per_step,
            tokens_per_second=self.meter.tokens_per_second,
            load_peak_rss_bytes=int(maximum(self.parts.base.load_peak_bytes, device)),
            peak_rss_bytes=peak_rss,
            peak_device_bytes=peak_device,
            seconds=time.perf_counter() - self._started,
            base_fingerprint=self.parts.base.fingerprint,
        )
