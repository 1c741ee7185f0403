"""The tasks that prefer answers to others: DPO, ORPO and KTO, with the losses and figures of TRL's trainers.

A loss is a sum over pairs (KTO: rated answers), which the step divides once by their number over all ranks and
micro-batches. Log-probabilities come from the sliced loss of the frozen head: no logits are ever held.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_qft.base_model.loss import token_losses_at
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.data_schema import TaskConfig
from dist_qft.data.batches import MicroBatch
from dist_qft.methods.reference import Reference
from dist_qft.tuned_model.preference_losses import Ratios, kto_losses, odds_ratio, pair_losses
from dist_qft.tuned_model.task import LanguageTask, TaskLoss

TOKENS = "target_tokens"  # the first sum of every task here
_PAIR_FIGURES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


class _Preference(LanguageTask):
    """Parts that all tasks on answers share.

    Args:
        reference: the base beside the tuned model; None for a task that does without.
    """

    names: tuple[str, ...]

    def __init__(self, config: TaskConfig, base: BaseModel, reference: Reference | None) -> None:
        super().__init__(base)
        self.config, self.reference = config, reference
        self.needs_base = reference is not None
        self.sums = 1 + len(self.names)

    def figures(self, sums: Sequence[float], terms: int) -> dict[str, float]:
        """Means over pairs."""
        return {name: total / max(terms, 1) for name, total in zip(self.names, sums[1:], strict=True)}

    def detach(self) -> None:
        """Take the reference off the base."""
        if self.reference is not None:
            self.reference.detach()

    def _log_probabilities(
        self, hidden: Tensor, batch: MicroBatch, with_gradient: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Of every target, (tokens,): of the tuned model, and of the reference.

        with_gradient: targets, the first ones, that are differentiable; all by default.
        """
        reference = None if self.reference is None else self.reference.take()
        positions, targets = batch.target_positions, batch.target_ids
        own, beside = token_losses_at(hidden, reference, positions, targets, self.base.head, with_gradient)
        return -own, None if beside is None else -beside

    def _sums(self, batch: MicroBatch, figures: Sequence[Tensor], trained: int | None = None) -> Tensor:
        """`TOKENS` and the sums of the figures; so many targets are trained on, or all of them."""
        count = batch.num_targets if trained is None else trained
        tokens = torch.full((), float(count), device=batch.target_ids.device)
        return torch.stack([tokens, *(figure.detach().sum().float() for figure in figures)])


class Dpo(_Preference):
    """Direct preference optimization (arXiv 2305.18290) and its relatives on pairs."""

    names = _PAIR_FIGURES

    def loss(self, hidden: Tensor, batch: MicroBatch) -> TaskLoss:
        """See `Task`."""
        own, beside = self._log_probabilities(hidden, batch)
        assert beside is not None, "made with a reference"
        chosen, rejected = _pairs(per_row(own, hidden, batch), batch)
        base_chosen, base_rejected = _pairs(per_row(beside, hidden, batch), batch)
        lengths = _pairs(per_row(torch.ones_like(beside), hidden, batch), batch)
        ratios = Ratios(chosen - base_chosen, rejected - base_rejected, *lengths)
        losses = pair_losses(self.config.loss, ratios, self.config.beta, self.config.label_smoothing)
        rewards = self.config.beta * ratios.chosen.detach(), self.config.beta * ratios.rejected.detach()
        return TaskLoss(losses.sum(), sums=self._sums(batch, pair_figures(*rewards, chosen, rejected)))


class Orpo(_Preference):
    """Odds ratio preference optimization (arXiv 2403.07691): no reference; better answers are trained on as text."""

    names = (*_PAIR_FIGURES, "nll_loss", "log_odds_ratio", "log_odds_chosen")

    def loss(self, hidden: Tensor, batch: MicroBatch) -> TaskLoss:
        """See `Task`."""
        answers = batch.answers
        assert answers is not None, "rows of pairs"
        own, _ = self._log_probabilities(hidden, batch)
        in_answer = answers.in_answer
        sums = per_row(own * in_answer, hidden, batch)
        lengths = per_row(in_answer.to(own.dtype), hidden, batch).clamp(min=1)
        chosen, rejected = _pairs(sums / lengths, batch)
        log_odds = odds_ratio(chosen, rejected)
        ratio = torch.nn.functional.logsigmoid(log_odds)
        first = batch.target_positions < (hidden.shape[0] // 2) * hidden.shape[1]
        nll = -(own * first).sum() * answers.share
        beta = self.config.beta
        rewards = beta * chosen.detach(), beta * rejected.detach()
        figures = [*pair_figures(*rewards, chosen, rejected), nll, ratio, log_odds]
        return TaskLoss(nll - beta * ratio.sum(), sums=self._sums(batch, figures))


class Kto(_Preference):
    """Kahneman-Tversky optimization (arXiv 2402.01306) on rated answers.

    The KL that rewards are compared with is measured in each micro-batch, whose rows no number of ranks changes.
    """

    names = ("chosen", "rejected", "logps_chosen", "logps_rejected", "wanted", "kl", "measured")

    def loss(self, hidden: Tensor, batch: MicroBatch) -> TaskLoss:
        """See `Task`."""
        answers, config = batch.answers, self.config
        assert answers is not None and answers.desirable is not None, "rows of rated answers"
        # The KL's rows are measured, not trained on: as a constant of the loss it needs none of the head's gradient.
        own, beside = self._log_probabilities(hidden, batch, answers.first_targets)
        assert beside is not None, "made with a reference"
        sums = per_row(own, hidden, batch)
        ratios, half = sums - per_row(beside, hidden, batch), len(sums) // 2
        drift = ratios[half : half + answers.cycled].detach()
        kl = drift.mean().clamp(min=0) if answers.cycled else drift.new_zeros(())
        ratios, wanted = ratios[: answers.count], answers.desirable
        losses = kto_losses(config.loss, ratios, wanted, kl, config.beta)
        weights = torch.where(wanted, config.desirable_weight, config.undesirable_weight)
        log_probabilities = sums[: answers.count]
        rewards = config.beta * ratios
        figures = [
            *(rewards * wanted, rewards * ~wanted),
            *(log_probabilities * wanted, log_probabilities * ~wanted),
            *(wanted, kl * answers.count, torch.full_like(kl, float(answers.count))),
        ]
        return TaskLoss((losses * weights).sum(), sums=self._sums(batch, figures, answers.first_targets))

    def figures(self, sums: Sequence[float], terms: int) -> dict[str, float]:
        """Means over the answers of each kind; none for a kind that there was none of."""
        chosen, rejected, log_chosen, log_rejected, wanted, kl, measured = sums[1:]
        found = {"kl": kl / max(measured, 1.0)}
        for name, reward, log_probability, count in (
            ("chosen", chosen, log_chosen, wanted),
            ("rejected", rejected, log_rejected, terms - wanted),
        ):
            if count:
                found |= {f"rewards/{name}": reward / count, f"logps/{name}": log_probability / count}
        if wanted and terms > wanted:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


def per_row(values: Tensor, hidden: Tensor, batch: MicroBatch) -> Tensor:
    """Sums over each row's targets, (b,), of values (targets,)."""
    rows, length = hidden.shape[:2]
    # Every place once, so that no device adds in an order of its own.
    laid_out = values.new_zeros(rows * length).index_copy(0, batch.target_positions, values)
    return laid_out.view(rows, length).sum(1)


def _pairs(values: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Of values (2b,), those of the better answers and those of the others, (count,) each."""
    assert batch.answers is not None, "rows of pairs"
    first, second = values.chunk(2)
    return first[: batch.answers.count], second[: batch.answers.count]


def pair_figures(better: Tensor, worse: Tensor, chosen: Tensor, rejected: Tensor) -> list[Tensor]:
    """The figures of `_PAIR_FIGURES` of each pair, from rewards and log-probabilities (count,)."""
    return [better, worse, (better > worse).float(), better - worse, chosen, rejected]


PREFERENCES: dict[str, type[Dpo] | type[Orpo] | type[Kto]] = {"dpo": Dpo, "orpo": Orpo, "kto": Kto}
