"""Mixtures of experts: the library's stacked experts replaced by packed tables, the routing left to the library.

transformers dispatches the forward pass of an experts module by name (`ExpertsInterface`), as it does attention. The
one that is registered here sorts the chosen (token, expert) pairs by expert and computes those experts that were
chosen at all. Router and shared experts are ordinary modules of the layer.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dist_qft.quant.contract import Format
from dist_qft.quant.experts import FrozenExperts

_NAME = "dist_qft"
_GATE = re.compile(r"(.*_)?(gate|router)")


@dataclass(frozen=True)
class ExpertStack:
    """The matrices of all experts of a layer for one product, as the library's model has them.

    Attributes:
        path: the parameter's path.
        owner: the experts module, whose attribute it is.
        shape: experts, outputs and inputs of one expert.
        transposed: whether the parameter has inputs before outputs.
    """

    path: str
    owner: nn.Module
    shape: tuple[int, int, int]
    transposed: bool

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    def freeze(self, format: Format, dtype: torch.dtype) -> FrozenExperts:
        """Put a packed table in the parameter's place."""
        experts, rows, columns = self.shape
        frozen = FrozenExperts(experts, columns, rows, format, dtype, transposed=self.transposed)
        delattr(self.owner, self.name)
        self.owner.register_module(self.name, frozen)
        return frozen


def expert_stacks(causal: PreTrainedModel) -> Iterator[ExpertStack]:
    """The expert stacks of a model, which are not frozen yet, in model order."""
    for path, module in causal.named_modules():
        if not _is_experts(module):
            continue
        for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
            stack = getattr(module, name, None)
            if isinstance(stack, nn.Parameter) and stack.dim() == 3:
                experts, rows, columns = stack.shape
                shape = (experts, columns, rows) if module.is_transposed else (experts, rows, columns)
                yield ExpertStack(f"{path}.{name}", module, shape, bool(module.is_transposed))


def gates(causal: PreTrainedModel) -> set[nn.Module]:
    """The linear layers that decide about experts, which stay floats: routers, and gates of shared experts.

    They lie in the block that holds the experts, have one output for each expert or one in all, and are called a gate
    or a router, or are part of one.
    """
    found: set[nn.Module] = set()
    for block, experts in {stack.path.rsplit(".", 2)[0]: stack.shape[0] for stack in expert_stacks(causal)}.items():
        for path, module in causal.get_submodule(block).named_modules():
            named = any(_GATE.fullmatch(part) for part in path.split("."))
            if named and isinstance(module, nn.Linear) and module.out_features in (1, experts):
                found.add(module)
    return found


def _is_experts(module: nn.Module) -> bool:
    """True if a module has the attributes that the library's decorator `use_experts_implementation` sets."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def compute_packed_experts(causal: PreTrainedModel) -> None:
    """Let a model's experts modules, all of them frozen, compute with their packed tables."""
    causal.set_experts_implementation(_NAME)


def _forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The sum of the chosen experts' results, each times its weight.

    Args:
        experts: an experts module of the library whose stacks are frozen.
        hidden_states: (tokens, hidden) in the compute dtype.
        top_k_index: (tokens, k) numbers of the chosen experts; the number of experts stands for none.
        top_k_weights: (tokens, k).

    Returns:
        (tokens, hidden) in the compute dtype. Sums over k are made in the order of `top_k_index`, so that a token's
        result does not depend on the tokens beside it.
    """
    first, second = experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj
    tokens, choices = top_k_index.shape
    chosen = top_k_index.reshape(-1)
    order = torch.argsort(chosen, stable=True)
    sizes = torch.bincount(chosen, minlength=first.experts)[: first.experts].tolist()
    expert_of = chosen[order].clamp(max=first.experts - 1)
    states = first(hidden_states[order // choices], sizes)
    if experts.has_bias:
        states = states + getattr(experts, "gate_up_proj_bias" if experts.has_gate else "up_proj_bias")[expert_of]
    states = experts._apply_gate(states) if experts.has_gate else experts.act_fn(states)
    states = second(states, sizes)
    if experts.has_bias:
        states = states + experts.down_proj_bias[expert_of]
    if experts.has_post_expert_norm:
        states = experts.post_expert_norm(states)
    weights = top_k_weights.masked_fill(top_k_index >= first.experts, 0.0).reshape(-1)
    states = states * weights[order].unsqueeze(-1)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return states[place].view(tokens, choices, -1).sum(dim=1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(_NAME, _forward)
