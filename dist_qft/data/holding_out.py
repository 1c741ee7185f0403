"""The choice of samples that are held out of the training data."""

import hashlib

from dist_qft.errors import UserError


def held_out_indices(count: int, wanted: int) -> set[int]:
    """`wanted` of `count` sample indices, chosen by a hash of the index alone: no seed moves a sample across."""
    require_some_left(count, wanted)
    ranked = sorted(range(count), key=lambda index: hashlib.sha256(f"held out {index}".encode()).digest())
    return set(ranked[:wanted])


def require_some_left(count: int, wanted: int) -> None:
    """UserError if holding `wanted` samples out leaves none of `count` to train on."""
    if wanted >= count:
        raise UserError(f"data.eval_samples: got {wanted}, must be at most {count - 1} of the {count} samples")
