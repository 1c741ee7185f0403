"""CUDA tensors without a GPU: PyTorch's fake tensors, which have a device, a shape and a dtype but no values.

A CPU build of PyTorch has no code behind the device, which autograd wants to ask. The forward pass gets by with a
stand-in for that code; autograd's engine does not, so `backward` walks through the recorded nodes itself.
"""

import ctypes
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
_CUDA, _PRIVATE, _DEVICE_TYPES = 1, 20, 22  # of c10/core/DeviceType.h
# Operators that CUDA has a kernel for and a CPU build takes apart. They are looked up alone: fakes need no kernel.
_KERNELS = ("silu_backward", "_fused_rms_norm", "_fused_rms_norm_backward")
_READS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero")
# Neither views by their schema nor kernels.
_FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_unsafe_view", "device")


@dataclass
class Counted:
    """Kernels, values that the host waited for, and copies that it waited for, each by name and place."""

    kernels: Counter[str]
    reads: Counter[str]
    blocking_copies: Counter[str]


class Launches(TorchDispatchMode):
    """Counts what a GPU would be asked for: kernels, waits for a value, copies that wait. Refuses mixed devices."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.blocking_copies: Counter[str] = Counter()

    def take(self) -> "Counted":
        """The counts since the last call."""
        found = Counted(self.kernels, self.reads, self.blocking_copies)
        self.kernels, self.reads, self.blocking_copies = Counter(), Counter(), Counter()
        return found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function.name()
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in _READS and any(tensor.device.type == "cuda" for tensor in given):
            self.reads[_place(name)] += 1
            return 0.0
        on = kwargs.get("device")
        if (on is None or torch.device(on).type != "cuda") and not any(isinstance(t, FakeTensor) for t in given):
            with unset_fake_temporarily():  # what happens on the CPU has its values
                return function(*args, **kwargs)
        found = function(*args, **kwargs)
        tensors = given + [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        waits = not (kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,)))
        if devices == {"cpu", "cuda"} and name in ("aten::_to_copy", "aten::copy_") and waits:
            self.blocking_copies[_place(name)] += 1
        if "cuda" in devices and not function.is_view and name.partition("::")[2].partition(".")[0] not in _FREE:
            self.kernels[name] += 1
        return found


def _place(name: str) -> str:
    """An operation with the line that it comes from."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    ours = [frame for frame in frames if f"{os.sep}torch{os.sep}" not in frame.filename]
    return f"{name} at {ours[-1].filename}:{ours[-1].lineno}"


@contextmanager
def fake_cuda() -> Iterator[Launches]:
    """Tensors made inside on `DEVICE` are fake ones, of a card of compute capability 9.0; counts what is launched."""
    counts = Launches()
    with ExitStack() as stack:
        stack.enter_context(_stand_in_guard())
        stack.enter_context(_known_kernels())
        stack.enter_context(patch("torch.cuda.get_device_capability", lambda *_: (9, 0)))
        stack.enter_context(patch("torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available", bool))
        stack.enter_context(patch("torch.cuda.is_bf16_supported", lambda *_: True))
        stack.enter_context(patch("torch.cuda.Event", _Event))
        stack.enter_context(patch("torch.cuda.current_stream", lambda *_: None))
        stack.enter_context(patch("torch.cuda._exchange_device", lambda _: DEVICE.index))
        stack.enter_context(patch("torch.cuda._maybe_exchange_device", lambda _: DEVICE.index))
        stack.enter_context(patch("torch.autograd.grad", _grad))
        stack.enter_context(patch.object(Tensor, "backward", backward))
        stack.enter_context(patch.object(nn.Module, "to", _moved))
        stack.enter_context(patch.object(FakeTensor, "tolist", _zeros(counts)))
        stack.enter_context(patch.object(triton.JITFunction, "run", _kernel(counts)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(counts)
        yield counts


class _Event:
    """An event of a stream that does nothing."""

    def __init__(self, enable_timing: bool) -> None:
        pass

    def record(self, stream: None) -> None:
        """Nothing."""

    def synchronize(self) -> None:
        """Nothing."""

    def elapsed_time(self, end: "_Event") -> float:
        """A millisecond."""
        return 1.0


def _moved(module: nn.Module, device: torch.device) -> nn.Module:
    """`Module.to`, which cannot swap the contents of a tensor for those of a fake one."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            moved = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
            part.register_parameter(name, moved)
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty_like(buffer, device=device))
    return module


def _zeros(counts: Launches) -> Callable[[Tensor], list[float]]:
    def tolist(tensor: Tensor) -> list[float]:
        counts.reads["tolist"] += tensor.device.type == "cuda"
        return [0.0] * tensor.numel()

    return tolist


def _kernel(counts: Launches) -> Callable[..., None]:
    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> None:
        assert all(arg.device == DEVICE for arg in args if isinstance(arg, Tensor)), kernel
        counts.kernels[f"triton::{kernel.__name__}"] += 1

    return run


@contextmanager
def _known_kernels() -> Iterator[None]:
    """Inside, PyTorch knows that these operators need not be taken apart on CUDA."""
    library = torch.library.Library("aten", "IMPL")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::silu_backward", "CUDA"):
        for name in _KERNELS:
            library.impl(name, lambda *_: None, "CUDA")
    try:
        yield
    finally:
        library._destroy()


@contextmanager
def _stand_in_guard() -> Iterator[None]:
    """PyTorch's guard of a device that is written in Python, in the place of CUDA's."""
    from torch.utils.backend_registration import _DummyDeviceGuard

    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    guards = (ctypes.c_void_p * _DEVICE_TYPES).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if guards[_CUDA]:  # a CUDA build
        yield
        return
    if not guards[_PRIVATE]:
        torch._C._acc.register_python_privateuseone_device_guard(_DummyDeviceGuard())
    guards[_CUDA] = guards[_PRIVATE]
    try:
        yield
    finally:
        guards[_CUDA] = None


@torch.no_grad()
def backward(loss: Tensor, gradient: Tensor | None = None, inputs: Sequence[Tensor] = ()) -> list[Tensor | None]:
    """Add the gradients to the leaves, as `loss.backward()` does; of `inputs`, return them instead."""
    start = loss.grad_fn
    assert start is not None, "nothing to differentiate"
    gradients: dict[Any, list[Tensor | None]] = {}
    wanted = [id(tensor) for tensor in inputs]
    found: list[Tensor | None] = [None] * len(wanted)
    _collect(gradients, start, loss.output_nr, torch.ones_like(loss) if gradient is None else gradient)
    for node in _in_order(start):
        if node not in gradients:
            continue
        incoming = gradients.pop(node)
        incoming += [None] * (len(node._input_metadata) - len(incoming))
        if hasattr(node, "variable"):  # AccumulateGrad
            if wanted:
                found[wanted.index(id(node.variable))] = incoming[0]
            else:
                node(*incoming)
            continue
        targets = node.next_functions
        if callable(node):
            outgoing = node(*incoming)
            outgoing = outgoing if isinstance(outgoing, tuple) else (outgoing,)
        else:  # a function written in Python, which has a result for each argument, whether it is a tensor or not
            results = node.apply(*incoming)
            results = results if isinstance(results, tuple) else (results,)
            outgoing = [part for part, needed in zip(results, node.needs_input_grad, strict=False) if needed]
            targets = [target for target in targets if target[0] is not None]
        for (target, number), part in zip(targets, outgoing, strict=True):
            if target is not None and part is not None:
                shape = target._input_metadata[number].shape
                _collect(gradients, target, number, part if part.shape == shape else part.sum_to_size(shape))
    return found


def _grad(outputs: Tensor, inputs: Sequence[Tensor], grad_outputs: Tensor) -> list[Tensor | None]:
    return backward(outputs, grad_outputs, list(inputs))


def _collect(gradients: dict[Any, list[Tensor | None]], node: Any, number: int, part: Tensor) -> None:
    known = gradients.setdefault(node, [])
    known += [None] * (number + 1 - len(known))
    before = known[number]
    known[number] = part if before is None else before + part


def _in_order(start: Any) -> list[Any]:
    """The nodes behind `start`, each before those that it gives gradients to."""
    waiting, seen = [start], {start}
    while waiting:
        for target, _ in waiting.pop().next_functions:
            if target is not None and target not in seen:
                seen.add(target)
                waiting.append(target)
    missing = Counter(target for node in seen for target, _ in node.next_functions if target is not None)
    ready, order = [start], []
    while ready:
        node = ready.pop()
        order.append(node)
        for target, _ in node.next_functions:
            if target is not None:
                missing[target] -= 1
                if not missing[target]:
                    ready.append(target)
    return order
