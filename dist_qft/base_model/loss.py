"""Cross entropy summed over target tokens, without ever forming the logits.

The frozen head needs no gradient of its own, so the loss and its gradient with respect to the hidden states
can both be computed in one sweep over slices of the vocabulary, as FlashAttention sweeps over keys (here keys
and values are both the head's rows): running maximum, running sum of exponentials, running weighted sum of
rows. Peak memory is one slice of dequantized rows and its logits. The head is therefore read once per
micro-batch, in the forward pass only, and a sharded head need not be gathered again in backward.

With p = softmax(z), z = W h and target t:   loss = logsumexp(z) - z_t,   dloss/dh = sum_v p_v W_v - W_t,
and where rows of W are trained (`method.train_tokens`)   dloss/dW_v = (p_v - [v = t]) h   of these rows alone.

The two terms of the gradient all but cancel where p_t is close to 1, which is most tokens of a text that fits well. So
they are never formed: the weighted sum, whose weights are rounded to the compute dtype, leaves the target's row out,
and that row has -(1 - p_t) in float32, from the sum of the other tokens' exponentials. The products give float32
whatever the compute dtype is: logits of 20 rounded to bfloat16 are off by up to 6 % in p.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dist_qft.base_model.row_gradient import RowGradient
from dist_qft.data.samples import IGNORED


class Rows(Protocol):
    """A vocabulary table that can hand out dequantized rows."""

    num_embeddings: int

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows start..stop, (stop - start, dim) in the compute dtype."""

    def rows_of(self, ids: Tensor) -> Tensor:
        """The rows of these ids (n,), (n, dim) in the compute dtype."""


@dataclass(frozen=True)
class LogitMap:
    """A model family's map of its logits: z -> cap * tanh(scale * z / cap), or scale * z without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def slope(self, mapped: Tensor) -> Tensor | float:
        """Derivative of the mapped logit by the raw one, from the mapped value."""
        return self.scale if self.cap is None else self.scale * (1.0 - (mapped / self.cap) ** 2)


# Default of `train.loss_chunk_megabytes`, by device. On CPUs a step with 64 takes 5 % more time and 100 MiB more
# (docs/performance.md).
CHUNK_MEGABYTES = {"cuda": 64.0, "cpu": 8.0}
# Devices whose products of 16-bit matrices can keep the float32 in which they are summed.
SUMMED_IN_FLOAT32 = ("cuda",)


def slice_rows(tokens: int, dim: int, megabytes: float) -> int:
    """Vocabulary rows per slice such that their float32 logits, and the rows themselves, fit in `megabytes` each.

    At least 256: narrower slices only cost time.
    """
    return max(256, int(megabytes * 2**20 / 4 / max(tokens, dim)))


@torch.no_grad()
def token_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    head: Rows,
    *,
    logit_map: LogitMap,
    slice_size: int,
    with_gradient: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """-log softmax(map(W h + b))[target] of every token, and the gradient of their sum by `hidden`.

    Args:
        hidden: (tokens, dim), compute dtype; every token has a target.
        targets: (tokens,) int64 in [0, vocabulary).
        head: the table W of (vocabulary, dim), read slice by slice.
        slice_size: rows of W per slice.
        with_gradient: False skips the second matrix product (evaluation).
        bias: b of (vocabulary,), or None for 0.

    Returns:
        (tokens,) float32, and (tokens, dim) in hidden's dtype or None: row t is the gradient of token t's own.
    """
    tokens, _ = hidden.shape
    states = _as_factor(hidden)
    maximum = torch.full((tokens,), -torch.inf, device=hidden.device)
    others = torch.zeros(tokens, device=hidden.device)
    target_logit = torch.zeros(tokens, device=hidden.device)
    mean_row = hidden.new_zeros(hidden.shape if with_gradient else (0,), dtype=torch.float32)
    for start in range(0, head.num_embeddings, slice_size):
        stop = min(start + slice_size, head.num_embeddings)
        rows = _as_factor(head.rows(start, stop))
        products = float32_product(states, rows.T)
        logits = logit_map(products if bias is None else products + bias[start:stop])
        new_maximum = torch.maximum(maximum, logits.amax(dim=1))
        shrink = torch.exp(maximum - new_maximum)
        # By masks, not by `nonzero`, which on a GPU would wait for the device once per slice.
        inside = (targets >= start) & (targets < stop)
        local = (targets - start).clamp(0, stop - start - 1)[:, None]
        target_logit = torch.where(inside, logits.gather(1, local)[:, 0], target_logit)
        slope = logit_map.slope(logits) if with_gradient else 1.0
        weights = logits.sub_(new_maximum[:, None]).exp_()
        weights.scatter_(1, local, weights.gather(1, local).masked_fill_(inside[:, None], 0.0))
        others.mul_(shrink).add_(weights.sum(dim=1))
        if with_gradient:
            mean_row.mul_(shrink[:, None]).add_(float32_product(weights.mul_(slope).to(rows.dtype), rows))
        maximum = new_maximum
    total = others + torch.exp(target_logit - maximum)
    losses = (maximum - target_logit) + total.log()  # neither term is below 0
    if not with_gradient:
        return losses, None
    share = others.mul_(logit_map.slope(target_logit))[:, None]
    gradient = mean_row.addcmul_(head.rows_of(targets).float(), share, value=-1.0).div_(total[:, None])
    return losses, gradient.to(hidden.dtype)


@torch.no_grad()
def row_factors(
    hidden: Tensor,
    targets: Tensor,
    losses: Tensor,
    head: Rows,
    *,
    ids: Tensor,
    logit_map: LogitMap,
    bias: Tensor | None = None,
) -> Tensor:
    """The derivative of each token's loss by the raw logits of some rows: (p - [target]) * slope of the map.

    Args:
        hidden, targets, head, logit_map, bias: as `token_cross_entropy` had them.
        losses: (tokens,), its result.
        ids: (n,) int64, the rows.

    Returns:
        (tokens, n) float32.
    """
    logits = float32_product(_as_factor(hidden), _as_factor(head.rows_of(ids)).T)
    target_logit = (hidden.float() * head.rows_of(targets).float()).sum(1)
    if bias is not None:
        logits, target_logit = logits + bias[ids], target_logit + bias[targets]
    logits = logit_map(logits)
    # log p of the target is -loss, which spares a second sum over the vocabulary.
    chances = torch.exp(logits - (logit_map(target_logit) + losses)[:, None])
    # p - 1 of the target by its loss: close to p = 1 the difference would have few digits left.
    by_logit = torch.where(targets[:, None] == ids, torch.expm1(-losses)[:, None], chances)
    return by_logit * logit_map.slope(logits)


def _as_factor(matrix: Tensor) -> Tensor:
    """The matrix as `float32_product` takes it: as it is where a product of 16-bit matrices gives float32."""
    return matrix if matrix.device.type in SUMMED_IN_FLOAT32 else matrix.float()


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32, not rounded to the factors' dtype in between."""
    left, right = _as_factor(left), _as_factor(right)
    if left.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)


class _KnownGradientContext(FunctionCtx):
    """The context of a `_KnownGradient`."""

    shape: torch.Size
    saved_tensors: tuple[Tensor, Tensor]


class _KnownGradient(torch.autograd.Function):
    """An autograd function that ties losses computed outside autograd to their input by a known gradient.

    The loss is a sum over tokens, or one of each token.
    """

    @staticmethod
    def forward(
        ctx: _KnownGradientContext, hidden: Tensor, loss: Tensor, positions: Tensor, gradient: Tensor
    ) -> Tensor:
        ctx.save_for_backward(positions, gradient)
        ctx.shape = hidden.shape
        return loss.clone()

    @staticmethod
    def backward(ctx: _KnownGradientContext, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        positions, gradient = ctx.saved_tensors
        full = gradient.new_zeros(ctx.shape)
        full.view(-1, ctx.shape[-1])[positions] = gradient * grad_output.to(gradient.dtype).unsqueeze(-1)
        return full, None, None, None


class HeadLosses(NamedTuple):
    """The losses of a head, outside autograd.

    losses: of each token, or their sum. gradient: of each token's own by its hidden state, or None. by_rows: the
    gradient by rows of the head that are trained, or None.
    """

    losses: Tensor
    gradient: Tensor | None
    by_rows: RowGradient | None = None

    def of(self, hidden: Tensor, positions: Tensor, count: int | None = None) -> Tensor:
        """The losses as a function of `hidden` (batch, length, dim), of tokens the first `count`, at `positions`.

        Those behind the tokens that have a gradient are constants.
        """
        losses = self.losses if count is None else self.losses[:count]
        if self.gradient is None:
            return losses
        rest = losses.new_empty(0)
        if losses.dim() and len(self.gradient) < len(losses):
            losses, rest = losses[: len(self.gradient)], losses[len(self.gradient) :]
            positions = positions[: len(self.gradient)]
        losses = _KnownGradient.apply(hidden, losses, positions, self.gradient)
        losses = losses if self.by_rows is None else self.by_rows.given_to(losses)
        return torch.cat([losses, rest]) if len(rest) else losses


HeadLoss = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None] | HeadLosses]


def token_loss(hidden: Tensor, targets: Tensor, head_loss: HeadLoss) -> Tensor:
    """`loss_at` all positions of `targets` (batch, length) that are not IGNORED; a GPU that holds them waits."""
    positions = (targets.flatten() != IGNORED).nonzero().squeeze(1)
    ids = targets.flatten()[positions]
    return loss_at(hidden, positions.to(hidden.device), ids.to(hidden.device), head_loss)


def loss_at(hidden: Tensor, positions: Tensor, targets: Tensor, head_loss: HeadLoss) -> Tensor:
    """Loss summed over the tokens that have a target, differentiable by `hidden`.

    Args:
        hidden: (batch, length, dim) last hidden states.
        positions: (tokens,) int64, in the rows of `hidden` one behind the other.
        targets: (tokens,) int64, what each of them has to predict; both on the device of `hidden`.
        head_loss: called once as head_loss((tokens, dim), (tokens,), with_gradient), also for no tokens at
            all: on a sharded base every rank must take part in gathering the head.

    Returns:
        float32 scalar; exactly 0 (with zero gradient) when no token has a target.
    """
    chosen = hidden.detach().reshape(-1, hidden.shape[-1])[positions]
    needs_gradient = torch.is_grad_enabled() and hidden.requires_grad
    return HeadLosses(*head_loss(chosen, targets, needs_gradient)).of(hidden, positions)


class TokenHead(Protocol):
    """A head that tells the loss of each token."""

    def token_losses(self, hidden: Tensor, targets: Tensor, with_gradient: int, reference: int = 0) -> HeadLosses:
        """See `OutputHead`."""


def token_losses_at(
    hidden: Tensor,
    reference: Tensor | None,
    positions: Tensor,
    targets: Tensor,
    head: TokenHead,
    with_gradient: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Cross entropy of each token that has a target, differentiable by `hidden`; of `reference` as well.

    The head is asked once for both, so that a sharded one is gathered once.

    Args:
        hidden, reference: (batch, length, dim) last hidden states of two models, or of one.
        positions: (tokens,) int64, in the rows of `hidden` one behind the other.
        targets: (tokens,) int64.
        with_gradient: the first so many tokens, at least one, are differentiable; by default all are.

    Returns:
        (tokens,) float32 each; None without a reference.
    """
    count, width = len(positions), hidden.shape[-1]
    chosen = hidden.detach().reshape(-1, width)[positions]
    differentiable = 0
    if torch.is_grad_enabled() and hidden.requires_grad:
        differentiable = count if with_gradient is None else with_gradient
    if reference is not None:
        chosen = torch.cat([chosen, reference.reshape(-1, width)[positions]])
        targets = torch.cat([targets, targets])
    found = head.token_losses(chosen, targets, differentiable, len(chosen) - count)
    return found.of(hidden, positions, count), None if reference is None else found.losses[count:]
