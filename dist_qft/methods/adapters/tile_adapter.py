"""The tile adapter: one trainable module for Q-BaRA, QA-HiRA, QLoRA and QA-LoRA, and the exact dW it stands for.

    y = base(x) + s * repeat( [B] A dropout( pool(x) ) )     <=>     dW = t * M (x) ones(k, p),  M = A or B A

`pool` averages (or sums) p neighbouring inputs, `repeat` copies each output k times, s = alpha / r, and t is s / p for
the mean and s for the sum: dW is constant on tiles of k outputs by p inputs. The matrices of a mixture's experts have
such a dW each, of values of their own. Sources: Q-BaRA and QA-HiRA, arXiv
2407.17029 with the authors' code (mean pool, repeat_interleave, nominal r in the scale); QA-LoRA, arXiv 2309.14717,
Algorithm 1; LoRA, arXiv 2106.09685. Not here: which layer gets which settings (`schedule`), hooks (`attach`).

The lower half of the file knows dW only by its formula, never through the forward pass, so merges and tests
may use it as an independent reference.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from dist_qft.errors import UserError
from dist_qft.methods.adapters.fused_update import Update, add_update
from dist_qft.methods.adapters.recomputed import Again, recomputation
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.methods.adapters.tiles import add_repeated, sum_neighbours, sum_repeated
from dist_qft.quant.frozen import FrozenLinear


class TileAdapter(nn.Module):
    """Trainable update of one linear layer d_in -> d_out, or of one product d_in -> d_out of E experts.

    Parameters, fp32 masters whatever the compute dtype is; those of experts lie below each other:
        A: (inner, d_in / p), or (d_out / k, d_in / p) when it is the single matrix.
        B: (d_out / k, inner), or None.

    Rows of inputs are sorted by their expert, and `sizes` says how many each expert has (`FrozenExperts.forward`). A
    gradient of an expert without rows is zero.

    Kept for backward per call: the pooled input (d_in / p per token), the inner activation, and copies of A and B
    if they had to be cast; never x itself unless p = 1, and then not if it is made again (`makes_inputs_again`).
    Dropout follows this module's own `training` flag.
    """

    A: nn.Parameter
    B: nn.Parameter | None
    cast: tuple[torch.Tensor, ...] | None = None  # A and B in the compute dtype, while `AdapterSet.cast_once` holds
    makes_inputs_again = False  # where that is cheap; not where all activations are computed again

    def __init__(self, settings: TileSettings, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.settings = settings
        shapes = settings.shapes()
        for name in ("A", "B"):
            values = nn.Parameter(torch.empty(shapes[name], dtype=torch.float32)) if name in shapes else None
            self.register_parameter(name, values)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start at dW = 0, as a pure function of the generator's state.

        With a B: A Kaiming uniform, B zero, PEFT's default. A single matrix is zero: QA-HiRA's published code has
        no working initialization, and zero is the only start at the base model. It still trains, because its
        gradient does not pass through another zero matrix.
        """
        if self.B is None:
            nn.init.zeros_(self.A)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(self.B)

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """B and A of each matrix that the adapter changes: one, or one for each expert. Only with a B."""
        assert self.B is not None
        matrices = self.settings.experts or 1
        return list(zip(self.B.chunk(matrices), self.A.chunk(matrices), strict=True))

    def delta(self, x: torch.Tensor, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """One value per tile of outputs: (..., d_in) -> (..., d_out / k), computed in x's dtype."""
        if again := self._recomputation(x):
            return _UpdateOfRecomputed.apply(x, self, again, *self.parameters())
        # The mean's 1 / p is in tile_scale.
        return self.of_pooled(sum_neighbours(x, self.settings.pool), sizes, *self.parameters())

    def _recomputation(self, x: torch.Tensor) -> Again | None:
        """A function that makes x again for the gradients of A and B; None if it, or what is pooled of it, is kept."""
        settings = self.settings
        dropped = settings.dropout and self.training
        if not (self.makes_inputs_again and settings.pool == 1 and settings.experts is None) or dropped:
            return None
        return recomputation(x) if torch.is_grad_enabled() else None

    def of_pooled(
        self, x: torch.Tensor, sizes: Sequence[int] | None, A: torch.Tensor, B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`delta` of inputs (..., d_in / p) that are pooled, with these values of A and B."""
        x = F.dropout(x, self.settings.dropout, self.training)
        if self.settings.experts is None:
            return self._update(x, A, B)
        assert sizes is not None, "experts need the number of rows of each"
        # Parts and values by split and chunk: their backward passes make one gradient, not one for each expert.
        matrices = self.settings.experts
        lefts, rights = A.chunk(matrices), [None] * matrices if B is None else B.chunk(matrices)
        hit = [expert for expert, size in enumerate(sizes) if size]
        *parts, rest = x.split([*(sizes[expert] for expert in hit), len(x) - sum(sizes)])
        updates = [self._update(part, lefts[e], rights[e]) for e, part in zip(hit, parts, strict=True)]
        tiles = self.settings.out_features // self.settings.repeat
        return torch.cat([*updates, rest.new_zeros(len(rest), tiles)])

    def _update(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor | None) -> torch.Tensor:
        update = self.update_by_A(x, A)
        return update if B is None else F.linear(update, B.to(x.dtype))

    def update_by_A(self, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """The scaled outputs of a matrix A, or of one expert's part of it: (..., d_in / p) -> (..., A's rows)."""
        scale, (outputs, inputs) = self.settings.tile_scale, A.shape
        # Scaled where the activation is narrowest.
        return F.linear(x * scale, A.to(x.dtype)) if inputs < outputs else F.linear(x, A.to(x.dtype)) * scale

    def gradients_of_pooled(self, x: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
        """The gradients of A and B, given that of `of_pooled(x)`: the bits that autograd finds, in fewer products.

        Of one linear layer, without dropout.
        """
        rows, by_delta = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]).to(x.dtype)
        update = None if self.B is None else self.update_by_A(rows, self.A)
        return self.gradients(rows, update, by_delta)[1]

    def gradients(
        self, rows: torch.Tensor, update: torch.Tensor | None, by_delta: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The gradient of A's outputs, and those of A and B.

        Args:
            rows: the pooled inputs (n, d_in / p).
            update: A's outputs (n, A's rows), which B's gradient needs; None without a B.
            by_delta: the gradient of `of_pooled(rows)`.
        """
        by_update, by_B = by_delta, []
        if self.B is not None:
            assert update is not None, "B's gradient is a product with what B was given"
            by_update, by_B = by_delta @ self.B.to(rows.dtype), [(by_delta.T @ update).to(self.B.dtype)]
        scale, (outputs, inputs) = self.settings.tile_scale, self.A.shape
        by_A = by_update.T @ (rows * scale) if inputs < outputs else (by_update * scale).T @ rows
        return by_update, [by_A.to(self.A.dtype), *by_B]

    def gradient_of_rows(self, by_update: torch.Tensor) -> torch.Tensor:
        """The gradient of the inputs (n, d_in / p), given that of A's outputs (n, A's rows)."""
        scale, (outputs, inputs), right = self.settings.tile_scale, self.A.shape, self.A.to(by_update.dtype)
        return (by_update @ right) * scale if inputs < outputs else (by_update * scale) @ right

    def add_to(
        self, y: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None = None, base: FrozenLinear | None = None
    ) -> torch.Tensor:
        """The adapted output (..., d_out) in y's dtype, from the base's output y and its input x (..., d_in).

        On CUDA y itself is changed, and the gradient by x is that of `base`, too, if it is the layer that computed y.
        """
        if y.device.type != "cuda" or sizes is not None:
            return add_repeated(y, self.delta(x, sizes).to(y.dtype), self.settings.repeat)
        settings = self.settings
        update = Update(self.A, self.B, self.cast, settings.tile_scale, settings.pool, settings.repeat)
        if not (self.training and settings.dropout):
            return add_update(y, x, update, base, self._recomputation(x))
        dropped = F.dropout(sum_neighbours(x, settings.pool), settings.dropout)
        return add_update(y, dropped, update._replace(pool=1))

    def add_gradient_to(self, y: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """y as it is, with the gradient that `add_to` would give A and B; y must have dW in it by other means.

        Straight through (arXiv 1308.3432): where y was computed from a rounded dW, A and B get the gradient of the
        exact one. x gets its gradient from y alone.
        """
        return _GradientOfAdded.apply(y, x.detach(), self, sizes, *self.parameters())


class _GradientOfAdded(torch.autograd.Function):
    """y unchanged, with the gradient of `TileAdapter.add_to` for A and B: nothing is added and taken off again.

    The adapter's activations are computed in the backward pass alone, for its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        adapter: "TileAdapter",
        sizes: Sequence[int] | None,
        *_: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(sum_neighbours(x, adapter.settings.pool))
        ctx.adapter, ctx.sizes = adapter, sizes
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (pooled,), adapter = ctx.saved_tensors, ctx.adapter
        summed = sum_repeated(gradient, adapter.settings.repeat)
        if ctx.sizes is None:
            return gradient, None, None, None, *adapter.gradients_of_pooled(pooled, summed)
        values = [parameter.detach().requires_grad_() for parameter in adapter.parameters()]
        with torch.enable_grad():
            delta = adapter.of_pooled(pooled, ctx.sizes, *values).to(gradient.dtype)
            found = torch.autograd.grad(delta, values, summed)
        return gradient, None, None, None, *found


class _UpdateOfRecomputed(torch.autograd.Function):
    """`TileAdapter.delta` of one linear layer, without pooling and dropout, with the bits that autograd finds.

    Keeps the inner activation and no input: `again` makes that once more.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, adapter: "TileAdapter", again: Again, A: torch.Tensor, B: torch.Tensor | None = None
    ) -> torch.Tensor:
        update = adapter.update_by_A(x, A)
        ctx.adapter, ctx.again = adapter, again
        ctx.save_for_backward(None if B is None else update.reshape(-1, update.shape[-1]))
        return update if B is None else F.linear(update, B.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (update,), adapter, x = ctx.saved_tensors, ctx.adapter, ctx.again()
        by_delta = gradient.reshape(-1, gradient.shape[-1])
        by_update, by_values = adapter.gradients(x.reshape(-1, x.shape[-1]), update, by_delta)
        return adapter.gradient_of_rows(by_update).view_as(x), None, None, *by_values


@torch.no_grad()
def tile_values(adapter: TileAdapter, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The value of each tile of dW, (d_out / k, d_in / p), computed in `dtype`; a merge adds it to a block.

    The values of experts lie below each other.
    """
    if adapter.B is None:
        matrix = adapter.A.to(dtype)
    else:
        matrix = torch.cat([left.to(dtype) @ right.to(dtype) for left, right in adapter.pairs()])
    return matrix * adapter.settings.tile_scale


@torch.no_grad()
def exact_dW(adapter: TileAdapter, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The whole update dW (d_out, d_in), computed in `dtype`, by its Kronecker form."""
    settings = adapter.settings
    values = tile_values(adapter, dtype)
    return torch.kron(values, values.new_ones(settings.repeat, settings.pool))


@torch.no_grad()
def lora_factors(adapter: TileAdapter) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain LoRA matrices A' (inner, d_in) and B' (d_out, inner), fp32, with dW = alpha / r * B' A'.

    Raises UserError for a single matrix: it is not a product of two narrow ones.
    """
    settings = adapter.settings
    if adapter.B is None:
        raise UserError("a single-matrix adapter (qahira) is not a LoRA pair; merge it, or export its own format")
    wide = adapter.A.repeat_interleave(settings.pool, dim=1)
    if settings.pool_mode == "mean":
        wide = wide / settings.pool
    return wide, adapter.B.repeat_interleave(settings.repeat, dim=0)
