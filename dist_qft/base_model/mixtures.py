"""Mixtures of experts: the library's stacked experts replaced by packed tables, the routing left to the library.

transformers dispatches the forward pass of an experts module by name (`ExpertsInterface`), as it does attention. The
one that is registered here sorts the chosen (token, expert) pairs by expert and computes those experts that were
chosen at all. Router and shared experts are ordinary modules of the layer.

Llama 4 has no such dispatch: its block gives every expert every token, scaled by a score that is 0 where the expert was
not chosen. Its block's forward pass is replaced by one that leaves those zeros out.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dist_qft.quant.contract import Format
from dist_qft.quant.experts import FrozenExperts

_NAME = "dist_qft"
_GATE = re.compile(r"(.*_)?(gate|router)")
_LLAMA4_BLOCK, _LLAMA4_EXPERTS = "Llama4TextMoe", "Llama4TextExperts"


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
        if not (_is_dispatched(module) or type(module).__name__ == _LLAMA4_EXPERTS):
            continue
        transposed = bool(getattr(module, "is_transposed", True))
        for name in ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"):
            stack = getattr(module, name, None)
            if isinstance(stack, nn.Parameter) and stack.dim() == 3:
                experts, rows, columns = stack.shape
                shape = (experts, columns, rows) if transposed else (experts, rows, columns)
                yield ExpertStack(f"{path}.{name}", module, shape, transposed)


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


def _is_dispatched(module: nn.Module) -> bool:
    """True if a module has the attributes that the library's decorator `use_experts_implementation` sets."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def compute_packed_experts(causal: PreTrainedModel) -> None:
    """Let a model's experts modules, all of them frozen, compute with their packed tables."""
    modules = list(causal.modules())
    if any(map(_is_dispatched, modules)):
        causal.set_experts_implementation(_NAME)
    for block in modules:
        if type(block).__name__ == _LLAMA4_BLOCK:
            block.forward = partial(_llama4_forward, block)


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
    order, sizes = _by_expert(chosen, first.experts)
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
    return _by_token(states, order, tokens).sum(dim=1).to(hidden_states.dtype)


def _llama4_forward(block: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Shared expert and chosen experts, whose inputs are scaled by their scores; and the router's logits.

    Args:
        block: the library's mixture block, its experts frozen.
        hidden_states: (..., hidden) in the compute dtype.

    Returns:
        (tokens, hidden), and (tokens, experts).
    """
    hidden_states = hidden_states.reshape(-1, block.hidden_dim)
    scores, logits = block.router(hidden_states)
    scores, chosen = scores.topk(block.top_k, dim=1)
    experts = block.experts
    order, sizes = _by_expert(chosen.reshape(-1), experts.gate_up_proj.experts)
    states = hidden_states[order // block.top_k] * scores.reshape(-1)[order].unsqueeze(-1)
    gate, up = experts.gate_up_proj(states, sizes).chunk(2, dim=-1)
    states = experts.down_proj(up * experts.act_fn(gate), sizes)
    return block.shared_expert(hidden_states) + _by_token(states, order, len(hidden_states)).sum(dim=1), logits


def _by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """The order that sorts (token, choice) pairs (pairs,) by their expert, and each expert's number of pairs."""
    order = torch.argsort(chosen, stable=True)
    return order, torch.bincount(chosen, minlength=experts)[:experts].tolist()


def _by_token(states: Tensor, order: Tensor, tokens: int) -> Tensor:
    """Rows (pairs, hidden) that `order` has sorted, as (tokens, choices, hidden)."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return states[place].view(tokens, -1, states.shape[-1])


ALL_EXPERTS_FUNCTIONS.register(_NAME, _forward)
