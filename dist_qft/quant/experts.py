"""The frozen weights of a mixture's experts: one packed table, of which only the rows of experts in use are converted.

A layer's experts hold one matrix each for every product (gate and up together, down). Stacked they are one matrix of
E * out rows, which any format holds, any engine shards and any merge writes as it does a linear layer's.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_qft.quant.contract import Format
from dist_qft.quant.frozen import FrozenWeight


class FrozenExperts(FrozenWeight):
    """One product of every expert of a layer, x @ W_e^T, with packed W_e (out_features, in_features).

    W_e is the rows e * out_features to (e + 1) * out_features of the table. `transposed` says that the library's own
    model has each W_e the other way round. Raises UserError if the format cannot hold one expert's matrix.
    """

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        format: Format,
        dtype: torch.dtype,
        *,
        transposed: bool = False,
        device: torch.device | str = "meta",
    ) -> None:
        format.check((out_features, in_features), type(self).__name__)  # so that no block crosses experts
        super().__init__((experts * out_features, in_features), format, dtype, device)
        self.experts, self.in_features, self.out_features = experts, in_features, out_features
        self.transposed = transposed

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Experts, outputs and inputs of one expert."""
        return self.experts, self.out_features, self.in_features

    def forward(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """The products of rows that are sorted by their expert.

        Args:
            x: (rows, in_features) in the compute dtype; only it receives a gradient.
            sizes: for each expert the number of its rows. Rows behind these belong to no expert.

        Returns:
            (rows, out_features); rows of no expert are zero, as are their gradients.
        """
        if self.fuses(max(sizes), x):
            return self.products_of_few(x, sizes)
        return _ExpertProducts.apply(x, sizes, self)

    def products_of_few(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """`forward` by the format's own `product`: no weight is dequantized, and x receives no gradient."""
        packed, product = self._packed_in_use(), x.new_zeros(len(x), self.out_features)
        for expert, rows in rows_by_expert(sizes):
            format, part = self._packed_rows(packed, expert * self.out_features, (expert + 1) * self.out_features)
            product[rows] = format.product(part, (self.out_features, self.in_features), x[rows], None)
        return product

    def hit(self, sizes: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
        """The rows of each expert that has any, and its weight, dequantized when it is asked for."""
        packed = self._packed_in_use()
        whole = None if self.rows_alone else self.format.dequantize(packed, self.weight_shape, self.dtype)
        for expert, rows in rows_by_expert(sizes):
            first, last = expert * self.out_features, (expert + 1) * self.out_features
            yield rows, self._rows_of(packed, first, last) if whole is None else whole[first:last]


def rows_by_expert(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Each expert that has any rows, and these, where rows are sorted by their expert."""
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            yield expert, slice(start, start + size)
        start += size


class _ExpertProducts(torch.autograd.Function):
    """A product that dequantizes an expert, again for its gradient, and saves no tensor in between.

    The context keeps the module, not its packed tensors, as the frozen linear layer's does and for the same reason.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sequence[int], module: FrozenExperts) -> Tensor:
        ctx.module, ctx.sizes = module, sizes
        product = x.new_zeros(len(x), module.out_features)
        for rows, weight in module.hit(sizes):
            torch.mm(x[rows], weight.t(), out=product[rows])
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        grad_input = grad_output.new_zeros(len(grad_output), ctx.module.in_features)
        for rows, weight in ctx.module.hit(ctx.sizes):
            torch.mm(grad_output[rows], weight, out=grad_input[rows])
        return grad_input, None, None
