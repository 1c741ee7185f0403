"""Looks at the model during a run: held-out loss and answers to prompts, of the base and of the tuned model."""

from dist_qft.data.batches import eval_batches
from dist_qft.ranks.preemption import StopSignal
from dist_qft.storage.trainer_state import BaseEvaluation
from dist_qft.training.monitor import Monitor
from dist_qft.training.run_inputs import RunInputs
from dist_qft.tuned_model.answer import Sampling, answers
from dist_qft.tuned_model.assemble import Assembled
from dist_qft.tuned_model.held_out import HeldOut, held_out_loss
from dist_qft.tuned_model.prompts import date_of


class Evaluations:
    """Evaluates one run's model and records the results. Every method is collective.

    Attributes:
        base, tuned: the latest results before and after training; None as long as there are none.
    """

    def __init__(self, inputs: RunInputs, parts: Assembled, monitor: Monitor) -> None:
        self.base: HeldOut | None = None
        self.tuned: HeldOut | None = None
        self._inputs, self._parts, self._monitor = inputs, parts, monitor
        self._data = inputs.data.eval
        self._newest: tuple[int, HeldOut] | None = None  # of the tuned model: after which step, and the result

    def evaluate_base(self, known: BaseEvaluation | None, step: int, stop: StopSignal, *, trained: bool) -> None:
        """Measure the bare base, or take a known result where the held-out data are the same.

        Args:
            known: an earlier result, if there is one.
            step: optimizer steps done.
            trained: the run has been here before: without held-out data there is nothing left to show of the base.
        """
        if (trained or known) and self._data_digest == (known.data_digest if known else None):
            self.base = HeldOut(known.loss, known.tokens, known.metrics) if known else None
            return
        with self._parts.bare():
            self.base = self.measure("base", step, stop)
            self.answer_prompts("base", step, stop)

    def base_record(self) -> BaseEvaluation | None:
        """The base's result as checkpoints keep it; None without held-out data."""
        if self.base is None or self._data_digest is None:
            return None
        return BaseEvaluation(self._data_digest, self.base.loss, self.base.tokens, self.base.metrics)

    def evaluate_tuned(self, step: int, stop: StopSignal, *, best: bool = False) -> None:
        """Measure the tuned model and have it answer the prompts, at the end of the run.

        Args:
            step: the run's last one.
            best: the trainables are those of an earlier step, whose record is there already.
        """
        if best or self._inputs.keep_rows:
            self.tuned = self.measure("best" if best else "tuned", step, stop)
        else:
            self.tuned = self.of_step(step, "tuned", stop)
        self.answer_prompts("tuned", step, stop)

    def of_step(self, step: int, which: str, stop: StopSignal) -> HeldOut | None:
        """The tuned model's result after that step; one that has just been measured is not measured again."""
        if self._newest is None or self._newest[0] != step:
            return self.measure(which, step, stop)
        self._tell(which, self._newest[1])
        return self._newest[1]

    def measure(self, which: str, step: int, stop: StopSignal) -> HeldOut | None:
        """Held-out loss of the model as it stands, recorded under `eval/` (`which` "base": `base/`, "best": nowhere).

        None without held-out data.

        Raises:
            NumericError: the loss is not finite.
            Preempted: some rank was asked to `stop`.
        """
        if self._data is None:
            return None
        micro, world = self._inputs.config.train.per_device_train_batch_size, self._inputs.world
        batches = eval_batches(self._data, micro, world.rank, world.world_size)
        with self._parts.evaluating():
            held_out = held_out_loss(
                self._parts.base,
                batches,
                self._inputs.device,
                self._parts.task,
                stop,
                keep_rows=self._inputs.keep_rows and which in ("tuned", "best"),
            )
        if which != "best":
            tag = "base" if which == "base" else "eval"
            values = {"loss": held_out.loss, **held_out.figures}
            self._monitor.scalars(step, {f"{tag}/{name}": value for name, value in values.items()})
        self._tell(which, held_out)
        if which not in ("base", "best"):
            self._newest = step, held_out
        return held_out

    def _tell(self, which: str, held_out: HeldOut) -> None:
        figures = "".join(f", {name} {value:.3f}" for name, value in held_out.figures.items())
        self._monitor.say(f"{which}: held-out loss {held_out.loss:.4f}{figures}")

    def answer_prompts(self, which: str, step: int, stop: StopSignal) -> None:
        """Have the model as it stands answer the config's prompts; `which` heads the answers.

        Raises:
            Preempted: some rank was asked to `stop`.
        """
        config, tokenizer, device = self._inputs.config, self._inputs.tokenizer, self._inputs.device
        prompts, sampling = config.evaluation.prompts, Sampling(config.evaluation.max_new_tokens)
        with self._parts.answering(device):
            texts = answers(self._parts.base, tokenizer, prompts, sampling, device, date_of(config), stop=stop)
        for prompt, text in zip(prompts, texts, strict=True):
            self._monitor.text(step, f"answer/{which}", f"{prompt}\n\n{text}")
            self._monitor.say(f"{which}: {prompt}\n    {text}")

    @property
    def _data_digest(self) -> str | None:
        return self._data.digest if self._data else None
