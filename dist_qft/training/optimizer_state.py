"""The optimizer's state as checkpoints hold it: whole and flat, however it is spread over the ranks of a run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_qft.errors import CorruptFileError, NumericError, UserError
from dist_qft.training.slices import BLOCK, Slices

_MESSAGE = 1 << 24  # elements that rank 0 receives at a time: its device never holds the whole state


class OptimizerState:
    """The state of one rank's optimizer over its parts of the flat buffer.

    Args:
        optimizer: of `make_optimizer`, over `parts`.
        slices: the place of `parts` in the flat buffer; their world is 1 if every rank keeps the whole state.
        group: the process group that the state is gathered in.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parts: Sequence[nn.Parameter],
        slices: Slices,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._optimizer, self._parts, self._slices, self._group = optimizer, parts, slices, group

    def gather(self) -> dict[str, Tensor]:
        """The whole state as named tensors (moments, step count), ready for safetensors.

        Collective if it is spread over the ranks: on the CPU of rank 0 then, and empty elsewhere.
        """
        first = self._states()[0]
        if self._slices.world == 1:
            return first
        gathered = {key: self._gathered(key) if _values_each(key) else first[key] for key in sorted(first)}
        return {key: tensor for key, tensor in gathered.items() if tensor is not None}

    def _states(self) -> list[dict[str, Tensor]]:
        return [
            {key: value if isinstance(value, Tensor) else torch.tensor(value) for key, value in state.items()}
            for state in (self._optimizer.state[part] for part in self._parts)
        ]

    def _gathered(self, key: str) -> Tensor | None:
        """The tensor of all values, on rank 0, from those of the ranks' slices."""
        slices, each, parts = self._slices, _values_each(key), [state[key] for state in self._states()]
        device = self._parts[0].device
        receives = slices.rank == 0
        whole = torch.empty(-(-slices.count // each), dtype=parts[0].dtype) if receives else None
        limit = max(1, _MESSAGE // slices.world)
        for bucket, (start, stop), part in zip(slices.buckets, slices.own, parts, strict=True):
            part = torch.nn.functional.pad(part, (0, (stop - start) // each - part.numel()))
            for offset in range(0, part.numel(), limit):
                # To the device of the values: paged moments are CPU tensors, which NCCL takes none of.
                sent = part[offset : offset + limit].to(device, copy=True)
                received = [torch.empty_like(sent) for _ in range(slices.world)] if receives else None
                dist.gather(sent, received, dst=0, group=self._group)
                for rank, piece in enumerate(received or []):
                    first = slices.piece(bucket, rank)[0] // each + offset
                    assert whole is not None, "rank 0 receives"
                    there = whole[first : first + piece.numel()]  # without the padding at the end
                    there.copy_(piece[: there.numel()])
        return whole

    def require_finite(self, step: int) -> None:
        """Refuse to save a state that would spoil every later step. `step` is for the message.

        Raises:
            NumericError: a moment is not finite, such as the square of a very large gradient; on all ranks.
        """
        states = self._states()
        keys = sorted(states[0])
        bad = next((number for number, key in enumerate(keys) if not all(_finite(s[key]) for s in states)), len(keys))
        if self._slices.world > 1:
            first = torch.tensor(bad, device=self._parts[0].device)
            dist.all_reduce(first, dist.ReduceOp.MIN, group=self._group)
            bad = int(first)
        if bad < len(keys):
            raise NumericError(f"step {step}: the optimizer's {keys[bad]} is not finite; the step is not saved")

    def load(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Put a whole saved state back into an optimizer that has not stepped yet; each rank takes its parts.

        Raises:
            UserError: the state is another optimizer's.
            CorruptFileError: a tensor's shape is not the one this optimizer needs.
        """
        fresh = [_fresh_state(self._optimizer, part) for part in self._parts]
        self._optimizer.state.clear()  # of what making it fresh has left there: a refusal changes nothing
        if set(fresh[0]) != set(tensors):
            raise UserError(
                f"{where}: saved with another train.optim: its state has {', '.join(sorted(tensors))}, "
                f"{type(self._optimizer).__name__} needs {', '.join(sorted(fresh[0]))}"
            )
        for key, blank in fresh[0].items():
            self._require_sound(tensors[key], key, blank, where)
        for part, own, state in zip(self._parts, self._slices.updated, fresh, strict=True):
            self._optimizer.state[part] = {key: _filled(blank, tensors[key], key, own) for key, blank in state.items()}

    def _require_sound(self, saved: Tensor, key: str, blank: Tensor | int, where: str) -> None:
        """CorruptFileError unless a saved tensor has the shape and dtype needed here, and finite values."""
        each = _values_each(key)
        needed = list(blank.shape) if isinstance(blank, Tensor) else []
        if each:
            needed = [-(-self._slices.count // each)]
        if list(saved.shape) != needed:
            raise CorruptFileError(f"{where}: {key} has shape {list(saved.shape)}, the trainables need {needed}")
        if isinstance(blank, Tensor) and saved.dtype != blank.dtype:
            raise CorruptFileError(f"{where}: {key}: got {saved.dtype}, must be {blank.dtype}")
        if not _finite(saved):
            raise CorruptFileError(f"{where}: {key}: holds values that are not finite")


def _values_each(key: str) -> int:
    """The trainables that one element of a state's tensor belongs to; 0 if the tensor belongs to all of them."""
    if key == "step" or key.startswith("qmap"):
        return 0
    return BLOCK if key.startswith("absmax") else 1


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return math.isfinite(float(torch.linalg.vector_norm(tensor.float(), ord=math.inf)))


def _filled(blank: Tensor | int, saved: Tensor, key: str, own: tuple[int, int]) -> Tensor | int | float:
    """`blank` with the part of a whole saved tensor that belongs to the values `own`."""
    if not isinstance(blank, Tensor):
        return saved.item()
    if each := _values_each(key):
        saved = saved[own[0] // each : -(-own[1] // each)]
        blank[: saved.numel()].copy_(saved)  # into what is there: bitsandbytes' lies in paged memory
        return blank
    return blank.copy_(saved)


def _fresh_state(optimizer: torch.optim.Optimizer, values: nn.Parameter) -> dict[str, Any]:
    if isinstance(optimizer, torch.optim.AdamW):
        # As the fused kernel wants it: the step count is a float32 scalar on the parameter's device.
        step = torch.zeros((), device=values.device)
        return {"step": step, "exp_avg": torch.zeros_like(values), "exp_avg_sq": torch.zeros_like(values)}
    from bitsandbytes.optim.optimizer import Optimizer2State

    assert isinstance(optimizer, Optimizer2State), "make_optimizer makes no others"
    optimizer.init_state(optimizer.param_groups[0], values, 0, 0)
    return dict(optimizer.state[values])
