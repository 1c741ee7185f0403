"""All adapters of a model: a module tree of its own that hooks onto the base's matrices from outside.

The base's module tree never holds a trainable, so any engine may shard it whole, and the adapters stay ordinary
parameters under every engine. Attach before anything renames the base's modules (checkpoint wrappers, compile).
Not here: the flat fp32 buffer that the parameters become views of, and reading or writing files.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dist_qft.errors import UserError
from dist_qft.methods.adapters.exact_fold import with_folded_zeros
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.methods.adapters.tile_adapter import TileAdapter
from dist_qft.methods.adapters.token_rows import TokenRows, TrainedTokens
from dist_qft.methods.trainable import HookedTrainables
from dist_qft.quant.contract import Format
from dist_qft.quant.frozen import FrozenLinear, FrozenWeight


class AdapterSet(HookedTrainables):
    """Adapters by the path of the linear layer, or of the product of experts, that they change, in model order.

    Train and eval mode are this module's own: `model.eval()` does not reach the adapters' dropout.

    Attributes:
        token_rows: trained rows of the vocabulary tables; None without.
    """

    def __init__(self, adapters: Mapping[str, TileAdapter], token_rows: TokenRows | None = None) -> None:
        super().__init__()
        if not adapters:
            raise UserError("method: no layer has an adapter, there is nothing to train")
        # A ModuleDict key may not hold a dot; a module path never holds a slash.
        self._adapters = nn.ModuleDict({path.replace(".", "/"): adapter for path, adapter in adapters.items()})
        self._by_path = dict(adapters)
        self.token_rows = token_rows
        self.changes_embedding = token_rows is not None
        self._changed: list[tuple[FrozenWeight, TileAdapter]] = []  # those that are merge-aware
        self._dtypes: list[tuple[TileAdapter, torch.dtype]] = []  # compute dtypes of the linear layers
        self._casts: list[tuple[TileAdapter, tuple[torch.Tensor, ...]]] | None = None
        self._written = False  # the base's zeros have dW in them already

    @classmethod
    def build(cls, plan: Mapping[str, TileSettings], seed: int, tokens: TrainedTokens | None = None) -> "AdapterSet":
        """Fresh adapters on the CPU for `plan` (from `plan_adapters`), and rows of `tokens`.

        Each adapter's values depend on (seed, path) alone: not on order, device, world size or the other adapters.
        """
        adapters = {path: TileAdapter(settings, _generator(seed, path)) for path, settings in plan.items()}
        return cls(adapters, None if tokens is None else TokenRows(tokens))

    @property
    def by_path(self) -> dict[str, TileAdapter]:
        """The adapters by layer path, in model order."""
        return dict(self._by_path)

    def named_tensors(self) -> list[tuple[str, nn.Parameter]]:
        """("model.layers.0.self_attn.q_proj.A", parameter) for every trainable.

        The order is part of the checkpoint contract: the plan's order of layers, which is model order, and within
        a layer A before B. Rows of the embedding come first, those of an LM head of its own last.
        """
        tensors = [
            (f"{path}.{name}", parameter)
            for path, adapter in self.by_path.items()
            for name, parameter in adapter.named_parameters()
        ]
        return tensors if self.token_rows is None else self.token_rows.around(tensors)

    def make_inputs_again(self) -> None:
        """Let adapters keep no input for their gradients that is cheap to make again (`adapters/recomputed.py`)."""
        for adapter in self._by_path.values():
            adapter.makes_inputs_again = True

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Hook every adapter onto the module of `model` at its path; returns the hooks' handles.

        A hooked module is called with its input x (..., in_features) as the first positional argument, experts with
        the number of rows of each as the second, and returns (..., out_features); the hook returns that output with
        the adapter's added. Raises UserError for a path
        that the model lacks or a module of other sizes, before any hook is placed.
        """
        if self._handles:
            raise RuntimeError("AdapterSet.attach: already attached; call detach() first")
        modules = dict(model.named_modules())
        adapters = self.by_path
        faults = [fault for path, adapter in adapters.items() if (fault := _misfit(path, adapter, modules.get(path)))]
        if faults:
            raise UserError(f"adapters do not fit this model: {'; '.join(faults)}")
        if self.token_rows is not None:
            self._handles += self.token_rows.attach(model)
        for path, adapter in adapters.items():
            self._handles.append(modules[path].register_forward_hook(self._hook(adapter)))
            if isinstance(modules[path], FrozenLinear) and not adapter.settings.merge_aware:
                self._dtypes.append((adapter, modules[path].dtype))
            if adapter.settings.merge_aware:
                modules[path].in_use = partial(self._folded, modules[path].format, adapter)
                self._changed.append((modules[path], adapter))
        return self._handles

    def detach(self) -> None:
        """Remove the hooks: the base computes as if it had never been touched."""
        for handle in self._handles:
            handle.remove()
        for module, _ in self._changed:
            module.in_use = None
        if self.token_rows is not None:
            self.token_rows.detach_tables()
        self._handles, self._changed, self._dtypes, self._casts = [], [], [], None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Context in which the hooked model is the base model."""
        with super().disabled(), nullcontext() if self.token_rows is None else self.token_rows.off():
            yield

    @property
    def folded_at_use(self) -> list[tuple[FrozenWeight, TileAdapter]]:
        """The layers that fold dW into their zeros at each use: those that are merge-aware, unless it is in them."""
        return self._changed if self._enabled and not self._written else []

    @contextmanager
    def folded_already(self) -> Iterator[None]:
        """Inside, the base's own zeros have dW in them, and layers take them as they are. Not to be `disabled`."""
        self._written = True
        try:
            yield
        finally:
            self._written = False

    @contextmanager
    def cast_once(self) -> Iterator[None]:
        """Inside, where no adapter changes, those of linear layers on a GPU are cast to the compute dtype once.

        In one kernel for all of them, and not in two for each use.
        """
        if self._casts is None:
            pairs = [(a, d) for a, d in self._dtypes if a.A.device.type == "cuda" and d != a.A.dtype]
            with torch.inference_mode(False), torch.no_grad():  # later calls write over them in any mode
                self._casts = [(a, tuple(torch.empty_like(p, dtype=d) for p in a.parameters())) for a, d in pairs]
        if self._casts:
            values = [value.detach() for adapter, _ in self._casts for value in adapter.parameters()]
            torch._foreach_copy_([copy for _, copies in self._casts for copy in copies], values)
        for adapter, copies in self._casts:
            adapter.cast = copies
        try:
            yield
        finally:
            for adapter, _ in self._casts:
                adapter.cast = None

    def _hook(self, adapter: TileAdapter) -> Callable[..., torch.Tensor | None]:
        def add_adapter(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
            if not self._enabled:
                return None
            if adapter.settings.merge_aware:  # the output has it already, by the layer's own zeros
                return adapter.add_gradient_to(output, *args) if torch.is_grad_enabled() else None
            sizes = args[1] if len(args) > 1 else None
            return adapter.add_to(output, args[0], sizes, module if isinstance(module, FrozenLinear) else None)

        return add_adapter

    def _folded(self, format: Format, adapter: TileAdapter, packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self._written:
            assert self._enabled, "the zeros have dW in them, which cannot be left out before they are put back"
            return packed
        return with_folded_zeros(format, packed, adapter) if self._enabled else packed


def _generator(seed: int, path: str) -> torch.Generator:
    """A generator for one adapter: the seed and the path hashed together."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    # 32 bits: torch's CPU generator keeps no more of its seed.
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def _misfit(path: str, adapter: TileAdapter, module: nn.Module | None) -> str | None:
    """The reason why an adapter cannot sit on a module; None if it can."""
    if module is None:
        return f"{path} does not exist"
    sizes = [getattr(module, "in_features", None), getattr(module, "out_features", None)]
    if None in sizes:
        return f"{path} is a {type(module).__name__}, not a linear layer"
    experts = getattr(module, "experts", None)
    if experts != adapter.settings.experts:
        return f"{path} has {experts or 'no'} experts, the adapter {adapter.settings.experts or 'none'}"
    wanted = [adapter.settings.in_features, adapter.settings.out_features]
    return None if sizes == wanted else f"{path} maps {sizes[0]} -> {sizes[1]}, the adapter {wanted[0]} -> {wanted[1]}"
