"""The frozen LM head: logits for generation, summed loss with its gradient for training.

All reading of weights happens inside the table's own `forward`, because engines gather a module's weights
around its call: for a tied head that is the embedding's, called a second time.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from dist_qft.base_model.loss import HeadLosses, LogitMap, row_factors, slice_rows, token_cross_entropy
from dist_qft.base_model.row_gradient import RowGradient
from dist_qft.quant.frozen import FrozenEmbedding
from dist_qft.quant.row_update import RowUpdate

_TOKENS_SCORED = 256  # of a vocabulary of 128k their logits take 128 MiB in float32


class OutputHead(nn.Module):
    """Head over `own`, or over the input embedding when `own` is None (tied).

    Args:
        embedding: the input embedding; kept outside the module tree, it belongs to the decoder.
        own: the head's own table, or None when tied.
        loss_map: the model family's scale and cap on logits, applied in `loss` (generation leaves them to
            the Hugging Face class).
    """

    def __init__(self, embedding: FrozenEmbedding, own: FrozenEmbedding | None, *, loss_map: LogitMap) -> None:
        super().__init__()
        self.table = own
        self.tied = own is None
        self.loss_map = loss_map
        self.loss_megabytes = 64.0
        self._weights = [own if own is not None else embedding]  # in a list: not registered a second time

    @property
    def weight(self) -> Tensor:
        """The table's `stand_in`, for code of the library that asks for a head's dtype."""
        return self._weights[0].stand_in()

    def forward(self, hidden: Tensor) -> Tensor:
        """Raw logits (..., vocabulary) of hidden states (..., dim)."""
        return self._weights[0](hidden, use=project)

    def likelihoods(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each of (tokens,) after (tokens, dim), and whether it is the likeliest token.

        The logits are those of generation, of a few tokens at a time, though the table is asked for once.
        """

        def use(table: FrozenEmbedding, states: Tensor) -> Tensor:
            found = []
            for part, ids in zip(states.split(_TOKENS_SCORED), targets.split(_TOKENS_SCORED), strict=True):
                logits = self.loss_map(project(table, part).float())
                values = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
                found.append(torch.stack([values, (logits.argmax(-1) == ids).float()]))
            return torch.cat(found, dim=1)

        values, greedy = self._weights[0](hidden, use=use)
        return values.detach(), greedy.bool()

    def loss(self, hidden: Tensor, targets: Tensor, with_gradient: bool) -> HeadLosses:
        """Summed cross entropy of (tokens, dim) against (tokens,), and its gradients; no autograd inside."""
        found = self.token_losses(hidden, targets, len(targets) if with_gradient else 0)
        sums = [part.sum() for part in found.losses.split(_tokens_at_a_time(hidden))]
        total = torch.stack(sums).sum() if len(sums) > 1 else sums[0]
        return found._replace(losses=total, gradient=found.gradient if with_gradient else None)

    def token_losses(self, hidden: Tensor, targets: Tensor, with_gradient: int, reference: int = 0) -> HeadLosses:
        """Cross entropy of each of (tokens, dim) against (tokens,); no autograd inside.

        Args:
            with_gradient: the first so many tokens' own losses have gradients.
            reference: the last so many are the base's, which has its own rows only.

        Returns:
            (tokens,) float32, and the gradient (with_gradient, dim), None for 0.
        """
        gradients: list[Tensor] = []
        factors: list[Tensor] = []
        update = self._row_update()

        def sweep(table: FrozenEmbedding, states: Tensor, targets: Tensor, gradient: bool) -> list[Tensor]:
            losses = []
            step, dim = _tokens_at_a_time(states), states.shape[1]
            for part, part_targets in zip(states.split(step), targets.split(step), strict=True):
                loss, by_state = token_cross_entropy(
                    part,
                    part_targets,
                    table,
                    logit_map=self.loss_map,
                    slice_size=slice_rows(part.shape[0], dim, self.loss_megabytes),
                    with_gradient=gradient,
                    bias=table.bias,
                )
                losses.append(loss)
                gradients.extend([] if by_state is None else [by_state])
                if gradient and update is not None:
                    by_row = row_factors(
                        part, part_targets, loss, table, ids=update.ids, logit_map=self.loss_map, bias=table.bias
                    )
                    factors.append(by_row)
            return losses

        def use(table: FrozenEmbedding, states: Tensor) -> Tensor:
            first, last = slice(with_gradient), slice(with_gradient, None)
            losses: list[Tensor] = []
            if with_gradient or not len(states):  # no tokens at all go through the first
                losses += sweep(table, states[first], targets[first], True)
            if update is not None and reference:
                own = slice(with_gradient, len(states) - reference)
                losses += sweep(table, states[own], targets[own], False) if own.start < own.stop else []
                last = slice(len(states) - reference, None)
            if len(states[last]):
                with update.off() if update is not None and reference else nullcontext():
                    losses += sweep(table, states[last], targets[last], False)
            return torch.cat(losses) if len(losses) > 1 else losses[0]

        with torch.no_grad():
            # detach: a hook on a tied embedding may have asked for a gradient of what it returned.
            losses = self._weights[0](hidden, use=use).detach()
        by_state = torch.cat(gradients) if len(gradients) > 1 else next(iter(gradients), None)
        if update is None or not factors:
            return HeadLosses(losses, by_state)
        return HeadLosses(losses, by_state, RowGradient(update, torch.cat(factors), hidden[:with_gradient]))

    def _row_update(self) -> RowUpdate | None:
        """The trained differences of the table's rows, if there are any and they count."""
        changed = self._weights[0].changed
        return changed if isinstance(changed, RowUpdate) and changed.enabled else None


def _tokens_at_a_time(states: Tensor) -> int:
    """Tokens whose loss is computed in one sweep over the vocabulary.

    A sweep passes over (tokens, dim) float32 values once per slice, and the more tokens the narrower the slices, which
    hold their logits: of 32k tokens it would move a terabyte. With as many tokens as a row has values both are least.
    On a CPU the sums keep one order, whatever else is tuned.
    """
    return max(states.shape[0], 1) if states.device.type == "cpu" else max(states.shape[1], 1024)


def project(table: FrozenEmbedding, hidden: Tensor) -> Tensor:
    """Logits (..., vocabulary) of hidden states (..., dim): products with the rows of the table, some at a time."""
    step = 16384  # rows dequantized at a time: bounds the dense copy of a quantized head
    starts = range(0, table.num_embeddings, step)
    logits = torch.cat([hidden @ table.rows(s, min(s + step, table.num_embeddings)).T for s in starts], dim=-1)
    return logits if table.bias is None else logits + table.bias
