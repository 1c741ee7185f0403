"""The running part of a training run: its loop, its evaluations, its checkpoints, its report."""

import time
from typing import NoReturn

import psutil
import torch
import torch.distributed as dist

from dist_qft.config.load import CONFIG_FILE, save_config
from dist_qft.data.batches import Batches, eval_batches
from dist_qft.errors import Preempted, SetupError
from dist_qft.ranks.collectives import SideGroup
from dist_qft.ranks.preemption import StopSignal
from dist_qft.storage.atomic import remove_leftovers
from dist_qft.storage.checkpoint import BaseEvaluation, TrainerState
from dist_qft.storage.saving import Saver
from dist_qft.training.fixed_tree import FixedTree
from dist_qft.training.flat_parameters import FlatParameters
from dist_qft.training.monitor import Monitor
from dist_qft.training.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors
from dist_qft.training.resume import chain_rows
from dist_qft.training.run_inputs import RunInputs
from dist_qft.training.summary import Summary
from dist_qft.training.train_step import RANK_STATS, StepResult, train_step
from dist_qft.tuned_model.answer import answer
from dist_qft.tuned_model.assemble import Assembled, make_forward
from dist_qft.tuned_model.checkpointed import adapter_config
from dist_qft.tuned_model.held_out import HeldOut, held_out_loss


class TrainingRun:
    """One run on one rank: holds the parts and walks through the steps. Every public method is collective."""

    def __init__(self, inputs: RunInputs, parts: Assembled, stop: StopSignal) -> None:
        config, world = inputs.config, inputs.world
        self.inputs, self.stop = inputs, stop
        self.config, self.world, self.device = config, world, inputs.device
        self.parts, self.base, self.engine = parts, parts.base, parts.engine
        self.data, self.output_dir = inputs.data, inputs.output_dir
        self.total_steps, total_rows = inputs.length()
        self.batches = Batches(
            self.data.train,
            seed=config.train.seed,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.per_device_train_batch_size,
            rank=world.rank,
            world_size=world.world_size,
            total_rows=total_rows,
        )
        # A group of its own: these reductions and the engine's gathers need no common order.
        self._group = dist.new_group()
        invariant = config.sharding.reduction == "invariant"
        self.flat = FlatParameters(
            parts.named_tensors(),
            bucket_bytes=int(config.sharding.bucket_megabytes * 2**20),
            group=self._group,
            rank_stats_size=RANK_STATS,
            tree=FixedTree(self.batches.accumulation, self._group) if invariant else None,
        )
        self.side_group = SideGroup(config.sharding.rank0_timeout_seconds)
        self.optimizer = make_optimizer(config.train, self.flat.values)
        self.forward = make_forward(config, parts, inputs.plan, self.data.train, self.device)
        checkpoint = inputs.checkpoint
        self.state = checkpoint.state if checkpoint else TrainerState(data_digest=self.data.train.digest)
        self.state.config, self.state.world_size = config.model_dump(), world.world_size
        newest, keep = checkpoint.path if checkpoint else None, config.checkpoint.save_total_limit
        self.saver = Saver(self.output_dir, keep, newest) if world.rank == 0 else None
        self.base_eval: HeldOut | None = None
        self.tuned_eval: HeldOut | None = None
        self.doing = "start-up"
        self._process = psutil.Process()
        self.monitor = Monitor(
            self.output_dir,
            active=world.rank == 0,
            total_steps=self.total_steps,
            first_step=self.state.step,
        )
        self.summary = Summary(self)

    def prepare(self) -> None:
        """Restore a checkpoint if there is one, make the replicas equal, say what is about to happen."""
        checkpoint = self.inputs.checkpoint
        if checkpoint is not None:
            self.parts.load_tensors(checkpoint.trainables)
            load_optimizer_tensors(self.optimizer, self.flat.values, checkpoint.optimizer, str(checkpoint.path))
        self.flat.broadcast()
        if self.config.train.gradient_checkpointing:
            self.base.model.gradient_checkpointing_enable({"use_reentrant": False})
            # transformers makes the embedding's output require a gradient, which only reentrant checkpointing needs.
            self.base.model.disable_input_require_grads()
            self.base.model.train()
        if self.world.rank == 0:
            remove_leftovers(self.output_dir)
            self._save_config()
        for note in [*self.inputs.notes, *self.base.notes, *self.summary.opening_lines(checkpoint)]:
            self.monitor.say(note)

    def evaluate_base(self) -> None:
        """Held-out loss and answers of the bare base, unless a checkpoint or an earlier run here has them."""
        if self.inputs.checkpoint is None and self.inputs.loaded is not None:
            self.state.base_eval = self.inputs.loaded.evaluation
        known = self.state.base_eval
        digest = self.data.eval.digest if self.data.eval else None
        if (self.inputs.checkpoint is not None or known) and digest == (known.data_digest if known else None):
            self.base_eval = HeldOut(known.loss, known.tokens, known.metrics) if known else None
            return
        with self.parts.trainables.disabled():
            self.base_eval = held_out = self.evaluate("base")
            self._sample("base")
        if held_out is not None:
            self.state.base_eval = BaseEvaluation(digest, held_out.loss, held_out.tokens, held_out.metrics)

    def train(self) -> None:
        """Steps until the end, or until some rank was asked to stop.

        Raises:
            Preempted: a signal came; the state is saved.
        """
        self.parts.trainables.train()
        self.monitor.start()
        self._evaluate_if_due()  # one that a signal cut short
        while self.state.step < self.total_steps:
            result = self._step()
            if result.stop and self.state.step < self.total_steps:
                self._leave()
            self._evaluate_if_due()
            if self._save_due(self.state.step) and self.state.best_step != self.state.step:
                self.save()
        self.wait_for_save()

    def finish(self) -> None:
        """Evaluate and sample the tuned model, write `summary.json`, say where things are."""
        self.doing = "the final evaluation"
        self.tuned_eval = self.evaluate("tuned")
        self._sample("tuned")
        self.summary.write()
        self.monitor.flush()

    def close(self) -> None:
        """Finish what is being written, close the records and the groups; also after a failure."""
        if self.saver is not None:
            self.saver.close()
        self.monitor.close()
        self.side_group.close()
        self.flat.close()
        dist.destroy_process_group(self._group)  # each keeps threads that wake up a hundred times a second

    def evaluate(self, which: str) -> HeldOut | None:
        """Held-out loss as it stands, recorded under `eval/` (`which` "base": under `base/`); None without data."""
        if self.data.eval is None:
            return None
        doing, self.doing = self.doing, "evaluation"
        self.parts.trainables.eval()
        batches = eval_batches(
            self.data.eval,
            self.config.train.per_device_train_batch_size,
            self.world.rank,
            self.world.world_size,
        )
        try:
            held_out = held_out_loss(self.base, batches, self.device, self.parts.task, self.stop)
        except Preempted:
            self._leave()
        self.parts.trainables.train()
        self.doing = doing
        tag = "base" if which == "base" else "eval"
        values = {"loss": held_out.loss, **held_out.figures}
        self.monitor.scalars(self.state.step, {f"{tag}/{name}": value for name, value in values.items()})
        figures = "".join(f", {name} {value:.3f}" for name, value in held_out.figures.items())
        self.monitor.say(f"{which}: held-out loss {held_out.loss:.4f}{figures}")
        return held_out

    def save(self) -> None:
        """Have rank 0 write a checkpoint of this step while training goes on."""
        self.doing = f"saving step {self.state.step}"
        if self.saver is not None:
            self.monitor.flush()
            self.saver.start(
                adapter_config=adapter_config(self.config, self.base, self.inputs.plan),
                trainables=dict(self.parts.named_tensors()),
                optimizer=optimizer_tensors(self.optimizer, self.flat.values),
                state=self.state,
            )

    def wait_for_save(self) -> None:
        """Wait until the last checkpoint is on the disk: by leaving first, others would have rank 0 cleared away."""
        self.doing = f"saving step {self.state.step}"
        if self.saver is not None:
            self.saver.wait()
        self.side_group.barrier()

    def _leave(self) -> NoReturn:
        step = self.state.step
        if step == 0:
            raise Preempted("stopped by a signal before the first step; start it again")
        self.save()
        self.wait_for_save()
        raise Preempted(f"stopped by a signal after step {step}, which is saved; continue with --resume auto")

    def _evaluate_if_due(self) -> None:
        state, every = self.state, self.config.evaluation.eval_steps
        if not every or state.step % every or state.step in (0, self.total_steps, state.evaluated_step):
            return
        held_out = self.evaluate("eval")
        self._sample("eval")
        state.evaluated_step = state.step
        if self.config.checkpoint.keep_best and (state.best_loss is None or held_out.loss < state.best_loss):
            state.best_loss, state.best_step = held_out.loss, state.step
            self.save()

    def _save_due(self, step: int) -> bool:
        every = self.config.checkpoint.save_steps
        return step == self.total_steps or bool(every and step % every == 0)

    def _step(self) -> StepResult:
        config, step = self.config, self.state.step
        self.doing = f"step {step + 1}"
        if self.saver is not None:
            self.saver.check()
        started = time.perf_counter()
        gathered, gather_seconds = self.engine.traffic.gathered_bytes, self.engine.traffic.seconds
        reduced = self.flat.reduced_bytes
        micro_batches = self.batches.micro_batches(step)
        data_seconds = time.perf_counter() - started
        digest_steps = config.sharding.digest_steps
        # Also before each save: a checkpoint of replicas that drifted apart would be worth nothing.
        check_digest = bool(digest_steps) and (step % digest_steps == 0 or self._save_due(step + 1))
        result = train_step(
            self.forward,
            self.parts.task,
            self.engine,
            self.flat,
            self.optimizer,
            config.train,
            micro_batches,
            step=step,
            total_steps=self.total_steps,
            check_digest=check_digest,
            stop=self.stop,
            memory_mebibytes=self._memory_bytes() / 2**20,
        )
        ids = self.batches.row_ids(step)
        self.state.data_chain = chain_rows(self.state.data_chain, ids)
        self.state.rows_seen += len(ids)
        self.state.step = step + 1
        seconds = time.perf_counter() - started
        self.state.history.append(
            {"step": step + 1, "loss": result.loss, "lr": result.learning_rate, "grad_norm": result.grad_norm}
        )
        self.summary.add_step(result.tokens, seconds, self.engine.traffic.gathered_bytes - gathered)
        if (step + 1) % config.train.logging_steps == 0 or step + 1 == self.total_steps:
            traffic = {
                "traffic/gathered_bytes": self.engine.traffic.gathered_bytes - gathered,
                "traffic/reduced_bytes": self.flat.reduced_bytes - reduced,
                "time/gather(s)": self.engine.traffic.seconds - gather_seconds,
                "time/data(s)": data_seconds,
                "time/step(s)": seconds,
                "replicas/digest_checked": float(check_digest),
            }
            self._log(result, traffic, seconds)
        return result

    def _log(self, result: StepResult, traffic: dict[str, float], seconds: float) -> None:
        step = self.state.step
        tokens_per_second = result.tokens / seconds
        compute = [seconds for _, seconds in result.rank_stats]
        values = {
            "train/loss": result.loss,
            "train/learning_rate": result.learning_rate,
            "train/grad_norm": result.grad_norm,
            "train/epoch": self.state.rows_seen / len(self.data.train),
            "train/target_tokens": result.tokens,
            "train/target_tokens_per_second": tokens_per_second,
            "time/compute(s)": result.compute_seconds,
            "time/reduce(s)": result.reduce_seconds,
            "time/straggler_gap(s)": max(compute) - min(compute),
            **{f"memory/rank{rank}(MiB)": memory for rank, (memory, _) in enumerate(result.rank_stats)},
            **traffic,
        }
        self.monitor.scalars(step, values)
        note = f"loss {result.loss:.4f}  lr {result.learning_rate:.2e}  {seconds:.2f} s  {tokens_per_second:.0f} tok/s"
        self.monitor.progress(step, self.total_steps, note)

    def _memory_bytes(self) -> int:
        """What the device has held at most, or the process holds now where the device is the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return self._process.memory_info().rss

    def _save_config(self) -> None:
        path = self.output_dir / CONFIG_FILE
        try:
            save_config(self.config, path)
        except OSError as error:
            raise SetupError(f"{path}: cannot write the config: {error.strerror}") from error

    def _sample(self, which: str) -> None:
        self.parts.trainables.eval()
        for prompt in self.config.evaluation.prompts:
            text = answer(
                self.base,
                self.inputs.tokenizer,
                prompt,
                max_new_tokens=self.config.evaluation.max_new_tokens,
                device=self.device,
            )
            self.monitor.text(self.state.step, f"answer/{which}", f"{prompt}\n\n{text}")
            self.monitor.say(f"{which}: {prompt}\n    {text}")
        self.parts.trainables.train()
