"""Norms of the flat gradient: the usual one, and one whose bits do not depend on who computed which part."""

import torch
from torch import Tensor

_PIECE = 1 << 22  # values per piece: bounds the float64 copy to 32 MiB
_CHUNKS = 1 << 16  # that a large gradient is cut into, at least
_SMALLEST_CHUNK = 256


def gradient_norm(*gradients: Tensor) -> Tensor:
    """L2 norm of flat gradients taken together, a float64 scalar on their device."""
    # In float64, because squares of finite float32 values overflow float32: clipping by inf would zero the step.
    parts = [part for gradient in gradients for part in gradient.split(_PIECE)]
    return torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]).norm()


def chunk_size(count: int) -> int:
    """Values of a chunk of `chunk_squares` for a gradient of `count` values: a power of two, so slices can begin there.

    A chunk is at most 1/65,536 of the gradient, or 256 values. So chunks divide evenly over ranks, and their sums are
    few beside the gradient.
    """
    return max(_SMALLEST_CHUNK, 1 << max(count // _CHUNKS, 1).bit_length() - 1)


def chunk_squares(gradient: Tensor, chunk: int) -> Tensor:
    """Sums of squares of each chunk, float64; the last chunk may be short.

    Halves are added to halves, element by element. So a chunk's bits depend neither on threads nor on the number of
    chunks that are summed with it, as those of a library's reduction do.
    """
    sums = []
    for part in gradient.split(max(_PIECE, chunk)):
        rows = torch.nn.functional.pad(part, (0, -part.numel() % chunk)).view(-1, chunk)
        sums.append(_row_sums(rows.double().square_()))
    return torch.cat(sums)


def norm_of_chunks(squares: Tensor) -> Tensor:
    """L2 norm of a gradient from its chunks' sums of squares, in the order of the buffer; a float64 scalar."""
    width = 1 << (squares.numel() - 1).bit_length()
    return _row_sums(torch.nn.functional.pad(squares, (0, width - squares.numel()))[None])[0].sqrt()


def _row_sums(rows: Tensor) -> Tensor:
    while rows.shape[1] > 1:
        left, right = rows.chunk(2, dim=1)
        rows = left + right
    return rows[:, 0]
