"""A tile adapter's update with its scale and its sums inside the products: for GPUs, where each kernel is launched.

    y += s * repeat( [B] A pool(x) )

The bits are not those of the plain expression: a product, its scale and its sum are rounded together, once, and the
gradients of A and B leave their products in float32. CPUs keep the plain expression, whose bits they have always had.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_qft.base_model.loss import float32_product
from dist_qft.methods.adapters.recomputed import Again
from dist_qft.methods.adapters.tiles import sum_repeated
from dist_qft.quant.frozen import FrozenLinear


class Update(NamedTuple):
    """The values and sizes of an update.

    A, B: float32; (inner, d_in / pool) and (d_out / repeat, inner), or (d_out / repeat, d_in / pool) and None.
    cast: the same in the compute dtype, if they are kept there; else None, and they are cast for each use.
    """

    A: Tensor
    B: Tensor | None
    cast: tuple[Tensor, ...] | None
    scale: float
    pool: int
    repeat: int


def add_update(
    y: Tensor, x: Tensor, update: Update, base: FrozenLinear | None = None, again: Again | None = None
) -> Tensor:
    """`y` with the update added in place; x, A and B get their gradients.

    Args:
        y: (..., d_out), contiguous, and not saved by whatever computed it.
        x: (..., d_in), the update's input.
        base: if it has computed y from x. Its part of the gradient by x is then computed here, and the update's is
            added to it in place.
        again: makes x once more for the gradients; x itself is not kept then. Only without pooling.
    """
    cast = update.cast or tuple(value.detach().to(y.dtype) for value in (update.A, update.B) if value is not None)
    given = y if base is None else y.detach()
    return _AddUpdate.apply(given, x, base, again, update.A, update.B, cast, update.scale, update.pool, update.repeat)


class _AddUpdate(torch.autograd.Function):
    """Keeps the pooled x, unless it can be made again, the inner activation, and A and B as they were cast."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        base: FrozenLinear | None,
        again: Again | None,
        A: Tensor,
        B: Tensor | None,
        cast: tuple[Tensor, ...],
        scale: float,
        pool: int,
        repeat: int,
    ) -> Tensor:
        rows, whole = sum_repeated(x.reshape(-1, x.shape[-1]), pool), y.view(-1, y.shape[-1])
        left, factor = rows, scale
        if B is not None:
            left, factor = _scaled_product(rows, cast[0].T, scale), 1.0
        if repeat == 1:
            whole.addmm_(left, cast[-1].T, alpha=factor)
        else:
            whole.unflatten(-1, (-1, repeat)).add_((left @ cast[-1].T).unsqueeze(-1), alpha=factor)
        right = None if B is None else cast[1]
        ctx.save_for_backward(cast[0], right, None if B is None else left, None if again else rows)
        ctx.base, ctx.again, ctx.scale, ctx.pool, ctx.repeat, ctx.shape = base, again, scale, pool, repeat, x.shape
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        A, B, left, rows = ctx.saved_tensors
        if rows is None:
            rows = ctx.again().reshape(-1, ctx.shape[-1])
        flat = gradient.reshape(-1, gradient.shape[-1])
        summed, by_B = sum_repeated(flat, ctx.repeat), None
        if B is None:
            inner, factor, by_A = summed, ctx.scale, float32_product(summed.T, rows).mul_(ctx.scale)
        else:
            inner, factor = _scaled_product(summed, B, ctx.scale), 1.0
            by_A, by_B = float32_product(inner.T, rows), float32_product(summed.T, left)
        by_x = None
        if ctx.needs_input_grad[1]:
            by_x = None if ctx.base is None else flat @ ctx.base.dequantize()
            by_x = _add_spread(by_x, inner, A, factor, ctx.pool).view(ctx.shape)
        return None if ctx.base is not None else gradient, by_x, None, None, by_A, by_B, None, None, None, None


def _add_spread(total: Tensor | None, left: Tensor, right: Tensor, scale: float, pool: int) -> Tensor:
    """scale * left @ right with each column given to `pool` neighbours, added to `total` in place if there is one."""
    if total is None:
        product = _scaled_product(left, right, scale)
        return product if pool == 1 else product.repeat_interleave(pool, dim=1)
    if pool == 1:
        return total.addmm_(left, right, alpha=scale)
    total.unflatten(-1, (-1, pool)).add_((left @ right).unsqueeze(-1), alpha=scale)
    return total


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right, in one kernel."""
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=scale)
