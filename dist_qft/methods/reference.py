"""The reference of preference tuning: the base with its trainables off, run beside the tuned model.

Both read the same rows, so each decoder layer, gathered once, computes twice: with adapters for the tuned model, and
without adapters or gradient for the reference, whose states go from layer to layer beside the others. A side network
leaves the base's own states as they are: there the reference costs nothing.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dist_qft.base_model.dry_run import choose_attention
from dist_qft.base_model.meta_model import build_on_meta
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.base_model.wrapper import text_decoder
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.methods.trainable import HookedTrainables, TrainableSet, TrainableSpec
from dist_qft.ranks.collectives import everywhere


class Reference(Protocol):
    """The reference's last hidden states of the tuned model's newest forward pass."""

    def take(self) -> Tensor:
        """(b, L, D), without gradient. Each pass has them once."""

    def detach(self) -> None:
        """Leave the base as it was."""


def reference_beside(base: BaseModel, trainables: TrainableSet) -> Reference:
    """The reference of a loaded base that these trainables are hooked onto."""
    if trainables.leaves_base_states:
        return OwnStates(base)
    embedding = base.embedding if trainables.changes_embedding else None
    return SecondStream(base.decoder, base.layers, trainables, base.config.model_type, embedding)


def require_reference(config: RunConfig, base: BaseModel, spec: TrainableSpec[Any]) -> None:
    """Refuse a task that compares with the base where a decoder of this family cannot run both. No weight is read.

    Raises:
        UserError: the decoder changes its states between layers.
    """
    if not config.task.has_reference or not spec.backward_through_base:
        return
    # Of a copy: building chooses the attention in the configuration that it is given.
    causal = build_on_meta(deepcopy(base.config), config.model, base.dtype)
    decoder = text_decoder(causal)
    layers = [causal.get_submodule(f"{base.layers_path}.{index}") for index in range(len(base.layers))]
    embedding = causal.get_input_embeddings() if config.method.tokens_to_train else None
    stream = SecondStream(decoder, layers, HookedTrainables(), base.config.model_type, embedding)
    _, called = choose_attention(causal, decoder, len(layers))
    if called is not None:  # else the code depends on values, and the first pass with data tells
        stream.require_complete()


class OwnStates:
    """The base's own last hidden states, before trainables that only read the base replace them."""

    def __init__(self, base: BaseModel) -> None:
        self._states: Tensor | None = None
        # In front of the trainables' hook, which puts its own states in their place.
        self._handle = base.decoder.register_forward_hook(self._keep, with_kwargs=True, prepend=True)

    def take(self) -> Tensor:
        """See `Reference`."""
        return _taken(self)

    def detach(self) -> None:
        """Remove the hook."""
        self._handle.remove()

    def _keep(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._states = output.last_hidden_state.detach() if _is_whole_pass(kwargs) else None


class SecondStream:
    """States that go through every decoder layer, and what follows the last one, beside the tuned model's.

    Each module's `forward` is called a second time inside of its own call, where an engine has its weights gathered.
    The arguments besides the states are the same, since the rows are. A module continues the stream if its input is the
    output of the one before it.

    Args:
        family: the model's type, for messages.
        embedding: the decoder's, if trainables change what it returns; else the states begin alike.
    """

    def __init__(
        self,
        decoder: nn.Module,
        layers: Sequence[nn.Module],
        trainables: TrainableSet | HookedTrainables,
        family: str,
        embedding: nn.Module | None = None,
    ) -> None:
        self._trainables, self._family = trainables, family
        self._begins = False
        self._last: tuple[Tensor, int] | None = None  # the tuned model's newest states, and how often they were changed
        self._broken = False
        self._states: Tensor | None = None  # the reference's
        self._kept: list[tuple[nn.Module, Any]] = []
        self._handles: list[RemovableHandle] = [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end),
        ]
        behind = [child for child in decoder.children() if not isinstance(child, nn.ModuleList)]
        self._two_embeddings = embedding is not None
        self._embedded: tuple[Tensor, int, Tensor] | None = None  # the tuned model's, as `_last`, and the reference's
        for module in [*layers, *behind]:
            self._kept.append((module, vars(module).get("forward")))
            module.forward = (
                self._embedded_twice(module.forward)
                if module is embedding
                else self._twice(module.forward, may_begin=module is layers[0])
            )

    def take(self) -> Tensor:
        """See `Reference`."""
        self.require_complete()
        self._last = None
        return _taken(self)

    def require_complete(self) -> None:
        """UserError, alike on all ranks, if the newest pass changed states where no module was called with them."""
        if self._broken or self._states is None:
            raise everywhere(
                UserError(
                    f"task.name: got a task that compares with the base, must be another for model type "
                    f"'{self._family}', whose decoder changes its states between layers"
                )
            )

    def detach(self) -> None:
        """Give every module its own `forward` back."""
        for handle in self._handles:
            handle.remove()
        for module, own in self._kept:
            if own is None:
                del module.forward
            else:
                module.forward = own
        self._handles, self._kept = [], []

    def _begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._begins = _is_whole_pass(kwargs)
        self._last = self._states = self._embedded = None
        self._broken = False

    def _end(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._broken = not _is_same(output.last_hidden_state, self._last)

    def _twice(self, forward: Callable[..., Any], *, may_begin: bool) -> Callable[..., Any]:
        def both(*args: Any, **kwargs: Any) -> Any:
            states = args[0] if args else kwargs.get("hidden_states")
            before = self._states
            if may_begin and self._begins and isinstance(states, Tensor):
                before, self._begins = self._first_states(states), False
                if before is None:
                    return forward(*args, **kwargs)
            elif before is None or not _is_same(states, self._last):
                return forward(*args, **kwargs)
            output = forward(*args, **kwargs)
            with torch.no_grad(), self._trainables.disabled():
                if args:
                    reference = forward(before, *args[1:], **kwargs)
                else:
                    reference = forward(**{**kwargs, "hidden_states": before})
            newest = _states_of(output)
            self._last, self._states = (newest, newest._version), _states_of(reference)
            return output

        return both

    def _first_states(self, states: Tensor) -> Tensor | None:
        """The reference's input of the first layer, from the tuned model's; None if no module made the difference."""
        if not self._two_embeddings:
            return states.detach()
        embedded, self._embedded = self._embedded, None
        return embedded[2] if embedded is not None and _is_same(states, embedded[:2]) else None

    def _embedded_twice(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Look the ids up a second time, in the base's own rows."""

        def both(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if self._begins and kwargs.get("use") is None:
                with torch.no_grad(), self._trainables.disabled():
                    self._embedded = (output, output._version, forward(*args, **kwargs))
            return output

        return both


def _is_same(states: Any, before: tuple[Tensor, int] | None) -> bool:
    """True for the same values in the same place: engines hand on a view, for their hooks in the backward pass."""
    if before is None or not isinstance(states, Tensor) or states._version != before[1]:
        return False
    tensor, _ = before
    if states is tensor or states.device.type == "meta":  # without data, nothing but the tensor itself can tell
        return states is tensor
    return states.shape == tensor.shape and states.data_ptr() == tensor.data_ptr()


def _states_of(output: Any) -> Tensor:
    states = output[0] if isinstance(output, tuple) else output
    assert isinstance(states, Tensor), "decoder layers return states first"
    return states


def _is_whole_pass(kwargs: dict[str, Any]) -> bool:
    """True unless a key-value cache takes part, as in generation, whose entries are the tuned model's."""
    return kwargs.get("use_cache") is False and kwargs.get("past_key_values") is None


def _taken(reference: OwnStates | SecondStream) -> Tensor:
    states, reference._states = reference._states, None
    assert states is not None, "take follows a forward pass"
    return states
