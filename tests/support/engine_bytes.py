"""Bytes of every kind through an engine: stored in parts, gathered to rank 0, and seen whole by a forward pass."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_qft.sharding.engine import Engine, Units, parameter_owners
from dist_qft.sharding.engines import make_engine

# Sizes that four ranks do not divide, fewer rows than ranks, vectors, and every dtype a format stores.
SHAPES = {
    "codes": ((9, 5), torch.uint8),
    "signed": ((1, 7), torch.int8),
    "scale": ((3, 2), torch.float16),
    "absmax": ((6,), torch.float32),
    "offset": ((1,), torch.float32),
    "weight": ((5, 4), torch.bfloat16),
    "even": ((8, 3), torch.uint8),
}


class Holder(nn.Module):
    """Parameters on meta; its call returns the bytes of all of them, as the engine shows them at that time."""

    def __init__(self, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        super().__init__()
        for name, (shape, dtype) in shapes.items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x, {name: as_bytes(parameter) for name, parameter in self.named_parameters(recurse=False)}


class Root(Holder):
    def __init__(self, layers: int) -> None:
        super().__init__({"norm": ((5,), torch.float32)})
        self.table = Holder(SHAPES)
        self.layers = nn.ModuleList(Holder(SHAPES) for _ in range(layers))

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [unit(x)[1] for unit in [self.table, *self.layers]] + [super().forward(x)[1]]


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().contiguous().view(-1).view(torch.uint8)


def content(index: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random bits, among them NaNs, infinities and signed zeros."""
    generator = torch.Generator().manual_seed(index)
    count = dtype.itemsize * math.prod(shape)
    bits = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    if dtype.is_floating_point:
        bits[-dtype.itemsize :] = torch.tensor([0] * (dtype.itemsize - 1) + [0x80], dtype=torch.uint8)  # -0.0
        bits[: dtype.itemsize] = 0xFF  # a NaN with all payload bits set
    return bits.view(dtype).view(shape)


def filled(engine: Engine, device: torch.device) -> tuple[Root, list[tuple[nn.Module, str]]]:
    root = Root(layers=2)
    engine.shard(Units(tables=[root.table], layers=list(root.layers), root=root), device)
    owners = parameter_owners(Units([root.table], list(root.layers), root))
    for index, (module, name) in enumerate(owners):
        parameter = getattr(module, name)
        first, stop = engine.rows(parameter)
        whole = content(index, tuple(parameter.shape), parameter.dtype)
        # More rows than this rank keeps, as a loader may have read them.
        first = max(0, first - 1)
        engine.store(parameter, first, whole[first : stop + 1])
    return root, owners


def round_trip(name: str, device: torch.device) -> dict[str, Any]:
    """Ranges of rows and numbers of bytes of an engine's parts; AssertionError where a bit is another. Collective."""
    engine = make_engine(name)
    root, owners = filled(engine, device)
    parameters = [getattr(module, attribute) for module, attribute in owners]
    expected = [as_bytes(content(i, tuple(each.shape), each.dtype)) for i, each in enumerate(parameters)]
    rows = [engine.rows(parameter) for parameter in parameters]
    for (first, stop), parameter in zip(rows, parameters, strict=True):
        assert tuple(engine.local(parameter).shape) == (stop - first, *parameter.shape[1:])

    gathered = [engine.gather(parameter) for parameter in parameters]
    if dist.get_rank() == 0:
        assert all(torch.equal(as_bytes(g), e) for g, e in zip(gathered, expected, strict=True)), "gather changed a bit"
        for copy in gathered:
            copy.zero_()  # the base below does not notice
    else:
        assert gathered == [None] * len(parameters)

    shown = root(torch.zeros(1, device=device))
    for (module, attribute), bits in zip(owners, expected, strict=True):
        unit = [root.table, *root.layers, root].index(module)
        assert torch.equal(shown[unit][attribute].cpu(), bits), "a forward pass saw other bits"
    total = sum(parameter.nbytes for parameter in parameters)
    return {"rows": rows, "resident": engine.resident_bytes(), "total": total}
