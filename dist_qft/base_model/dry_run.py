"""The decoder's own code run once without data: a decoder that cannot work is refused before a weight is read.

A `config.json` may pass every check of its own and still describe a decoder that fails in its first forward pass, such
as one whose heads do not divide its width. A pass over tensors that have shapes only costs no memory and shows the
fault. It also tells which linear layers are called as layers: a family's code may read a layer's weight instead, which
a packed layer has not.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, masking_utils
from transformers.pytorch_utils import Conv1D

from dist_qft.base_model import segment_attention
from dist_qft.base_model.model_config import library_refusal
from dist_qft.data.segments import Segments
from dist_qft.errors import UserError

_TOKENS = 4


def choose_attention(causal: PreTrainedModel, decoder: nn.Module, layers: int) -> tuple[bool, set[nn.Module] | None]:
    """Let a decoder of so many layers have its samples' borders in place of a mask, if its code hands them on.

    Returns:
        Whether it does, and the linear layers as of `called_linears`.

    Raises:
        UserError: the forward pass fails.
    """
    if segment_attention.may_take_segments(causal):
        segment_attention.choose(causal, segment_attention.NAME)
        two = Segments(torch.zeros(3, dtype=torch.int32), (0, 1, _TOKENS), 1)
        try:
            with segment_attention.windows_given() as windows:
                called = called_linears(causal, decoder, **segment_attention.arguments(two))
            if len(windows) >= layers and segment_attention.gives_windows(causal.config, windows.values()):
                return True, called
        except UserError:
            pass  # with its masks it may work
        segment_attention.choose(causal, segment_attention.SDPA)
    return False, called_linears(causal, decoder)


@torch.no_grad()
def called_linears(causal: PreTrainedModel, decoder: nn.Module, **arguments: Any) -> set[nn.Module] | None:
    """The linear layers that a forward pass of the (not yet frozen) decoder calls.

    `arguments` are further ones of the decoder's. Returns None if its code depends on the values of tensors, so that it
    cannot run without data.

    Raises:
        UserError: the forward pass fails.
    """
    called: set[nn.Module] = set()
    place = f"model.path: a decoder of model type '{causal.config.model_type}' with these sizes cannot run"
    try:
        with ExitStack() as stack:
            stack.enter_context(library_refusal(place))
            stack.enter_context(_state_on_meta(decoder))
            stack.enter_context(_experts_without_data(causal))
            stack.enter_context(masks_without_data())
            for module in decoder.modules():
                if isinstance(module, nn.Linear | Conv1D):
                    hook = module.register_forward_hook(lambda layer, *_: called.add(layer))
                    stack.callback(hook.remove)
            stack.enter_context(torch.device("meta"))  # for tensors that the decoder's code makes
            decoder(input_ids=torch.zeros(1, _TOKENS, dtype=torch.int64), use_cache=False, **arguments)
    except UserError as error:
        if needs_data(error.__cause__):
            return None
        raise
    return called


def needs_data(cause: BaseException | None) -> bool:
    """True if a forward pass failed because there are no values, and not because it cannot work."""
    return isinstance(cause, NotImplementedError) or "meta tensor" in str(cause)


@contextmanager
def _state_on_meta(decoder: nn.Module) -> Iterator[None]:
    """Context in which buffers and other tensors of the modules are on meta too; what the pass changes is undone.

    Torch refuses to compute with tensors of different devices. Rotary embeddings keep the frequencies of long inputs,
    for one, as plain attributes that a first pass sets.
    """
    modules = list(decoder.modules())
    kept = [(module, dict(vars(module)), dict(module.named_buffers(recurse=False))) for module in modules]
    for module, attributes, buffers in kept:
        for name, value in [*attributes.items(), *buffers.items()]:
            if isinstance(value, torch.Tensor):
                setattr(module, name, value.to("meta"))
    try:
        yield
    finally:
        for module, attributes, buffers in kept:
            for name, _ in list(module.named_buffers(recurse=False)):
                if name in buffers:
                    setattr(module, name, buffers[name])
                else:
                    delattr(module, name)
            vars(module).clear()
            vars(module).update(attributes)


@contextmanager
def masks_without_data() -> Iterator[None]:
    """Context in which masks do not look for packed samples among the position ids, which need data for that."""
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


@contextmanager
def _experts_without_data(causal: PreTrainedModel) -> Iterator[None]:
    """Context in which mixtures gather the weights of every chosen expert, an operation that looks at no value."""
    config = causal.config.get_text_config()
    before = config._experts_implementation
    config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        config._experts_implementation = before
