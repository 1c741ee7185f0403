"""The gradient that a loss computed outside autograd has by the changed rows of the LM head.

Row r of the head enters the loss of token t by its logit alone, so the gradient by that row is a sum over tokens of
factor(t, r) * h_t. The factors are known when the loss is (`loss.row_factors`), the weight of each token's loss only in
backward.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dist_qft.quant.row_update import RowUpdate


class RowGradient(NamedTuple):
    """The parts of the gradient by the differences of `update`.

    factors: (tokens, n) float32, derivatives of each token's loss by the raw logits of the n rows.
    states: (tokens, dim), the last hidden states that they were computed from.
    """

    update: RowUpdate
    factors: Tensor
    states: Tensor

    def given_to(self, losses: Tensor) -> Tensor:
        """The losses, (tokens,) or their sum, with this gradient in their backward pass."""
        return _ByRows.apply(losses, self.update.delta, self.factors, self.states)


class _ByRowsContext(FunctionCtx):
    """The context of a `_ByRows`."""

    saved_tensors: tuple[Tensor, Tensor]


class _ByRows(torch.autograd.Function):
    """Losses unchanged, with their gradient by rows."""

    @staticmethod
    def forward(ctx: _ByRowsContext, losses: Tensor, delta: Tensor, factors: Tensor, states: Tensor) -> Tensor:
        ctx.save_for_backward(factors, states)
        return losses.clone()

    @staticmethod
    def backward(ctx: _ByRowsContext, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        factors, states = ctx.saved_tensors
        weighted = factors * grad_output.unsqueeze(-1)
        return grad_output, weighted.T @ states.to(weighted.dtype), None, None
