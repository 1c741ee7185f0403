"""The side network g of QST beside a base f of N layers (arXiv 2401.07159, section 3.2):

    h_g[0] = down_1(h_f[0])                                     h_f[0]: what enters the base's first layer
    h_g[i] = layer_i( (1 - b_i) down_i(h_f[i]) + b_i h_g[i-1] ),     b_i = sigmoid(gamma_i), gamma_i = 0 at the start
    h      = a norm_f(h_f[N]) + (1 - a) up(norm_g(h_g[N])),          a = 1 at the start, so that h is the base's

`h` goes to the base's frozen head. The side layers, their rotary embedding, masks and final norm are those of the
decoder's own class, built from a shrunken configuration (`sizes`): g is a whole narrow decoder and hooks mix the base's
states into the input of its layers. Nothing in f requires a gradient, so autograd records nothing of it.

Not here: sizes and counts (`plan`), the base's hidden states on disk (`hidden_cache`).
"""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)

from dist_qft.base_model import segment_attention
from dist_qft.base_model.wrapper import text_decoder
from dist_qft.data.segments import Segments
from dist_qft.errors import UserError
from dist_qft.methods.qst.downsample import make_downsample, pool
from dist_qft.methods.qst.settings import SideSettings
from dist_qft.methods.trainable import HookedTrainables


@dataclass(frozen=True)
class BaseStates:
    """The states that the side network reads of one forward pass of the base, in the compute dtype.

    layers: N + 1 tensors, the input of the first layer and the output of each: (batch, length, d), or (batch, length,
        d / r) if the downsample pools.
    last: (batch, length, D), the last hidden states behind the final norm.
    """

    layers: list[Tensor]
    last: Tensor


class SideNetwork(HookedTrainables):
    """A side network and its hooks on the base; every parameter fp32, whatever the compute dtype.

    Args:
        config: the shrunken configuration.
        width, out_width: of the base's layers (d) and of its last hidden states (D; OPT-350m's differ).

    Attributes:
        observer: called with the base's states of every forward pass, if set.
    """

    leaves_base_states = True

    def __init__(self, settings: SideSettings, config: PretrainedConfig, width: int, out_width: int) -> None:
        super().__init__()
        self.settings = settings
        self.observer: Callable[[BaseStates], None] | None = None
        self.decoder = _narrow_decoder(config)
        self.layers = list(decoder_layers(self.decoder))  # in a list: not registered a second time
        depth, narrow = len(self.layers), config.hidden_size
        released = settings.compat == "released"
        self.gates = nn.Parameter(torch.full((depth, narrow), 0.5) if released else torch.zeros(depth))
        self.downsamples = nn.ModuleList(make_downsample(settings, width) for _ in range(depth))
        self.upsample = nn.Linear(narrow, out_width)
        self.alpha = nn.Parameter(torch.ones(out_width) if released else torch.ones(()))
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(self._mix_hook(index))
        # Of the forward pass that is going on, and the side network's state below its first layer.
        self._states: BaseStates | None = None
        self._below: Tensor | None = None
        self._collected: list[Tensor] = []

    @classmethod
    def build(
        cls, settings: SideSettings, config: PretrainedConfig, *, width: int, out_width: int, seed: int
    ) -> "SideNetwork":
        """A fresh side network on the CPU, as a pure function of the seed."""
        digest = hashlib.sha256(f"{seed}:side network".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest[:4], "little"))
            return cls(settings, config, width, out_width)

    def named_tensors(self) -> list[tuple[str, nn.Parameter]]:
        """Every trainable in the order of the forward pass, layer by layer; the gates, which all layers use, first."""
        named = [("gates", self.gates)]
        for index, (downsample, layer) in enumerate(zip(self.downsamples, self.layers, strict=True)):
            named += [(f"downsamples.{index}.{name}", parameter) for name, parameter in downsample.named_parameters()]
            named += [(f"layers.{index}.{name}", parameter) for name, parameter in layer.named_parameters()]
        listed = {id(parameter) for _, parameter in named}
        rest = [(name, p) for name, p in self.decoder.named_parameters() if id(p) not in listed]  # the final norm
        return [*named, *rest, *self.upsample.named_parameters(prefix="upsample"), ("alpha", self.alpha)]

    def attach(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Hook onto the decoder of `model`: its last hidden states become the mix. Returns the hooks' handles.

        Raises UserError if that decoder has another number of layers.
        """
        if self._handles:
            raise RuntimeError("SideNetwork.attach: already attached")
        decoder = text_decoder(model)
        wide = decoder_layers(decoder)
        if len(wide) != len(self.layers):
            raise UserError(f"side network of {len(self.layers)} layers does not fit a base of {len(wide)}")
        self._handles = [wide[0].register_forward_pre_hook(self._collect_input)]
        self._handles += [layer.register_forward_hook(self._collect_output) for layer in wide]
        self._handles.append(decoder.register_forward_hook(self._tune, with_kwargs=True))
        return self._handles

    def forward(
        self,
        states: BaseStates,
        position_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """The tuned last hidden states (batch, length, D), in the dtype of the base's.

        position_ids, attention_mask, segments: as the base was given them. cache: the side network's own.
        """
        more: dict[str, Any] = {"attention_mask": attention_mask}
        if segments is not None and segment_attention.in_use(self.decoder.config):
            more = segment_attention.arguments(segments)
        dtype = states.last.dtype
        self._states = states
        # Products in the compute dtype; the narrow residual stream, norms and the mix stay fp32.
        with nullcontext() if dtype == torch.float32 else torch.autocast(states.last.device.type, dtype=dtype):
            self._below = self._narrow(0, states.layers[0])
            output = self.decoder(
                inputs_embeds=self._below,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
                **more,
            )
            side = self.upsample(output.last_hidden_state)
        self._states = self._below = None
        share = torch.sigmoid(self.alpha) if self.settings.compat == "released" else self.alpha
        return (share * states.last.float() + (1.0 - share) * side.float()).to(dtype)

    def _narrow(self, index: int, states: Tensor) -> Tensor:
        """down_(index + 1) of a layer's states, fp32."""
        return self.downsamples[index](states).float()

    def _mix_hook(self, index: int) -> Callable[..., tuple[Tensor, ...]]:
        def mix_in(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # Whatever the decoder did to its input embeddings (scale, positions) is the base's business.
            states = self._states
            below = args[0] if index else self._below
            assert states is not None and below is not None, "the side decoder runs only inside forward"
            gate = torch.sigmoid(self.gates[index])
            return ((1.0 - gate) * self._narrow(index, states.layers[index + 1]) + gate * below, *args[1:])

        return mix_in

    def _collect_input(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._enabled:
            self._collected = [pool(self.settings, args[0])]

    def _collect_output(self, layer: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        if self._enabled:
            hidden = output[0] if isinstance(output, tuple) else output
            self._collected.append(pool(self.settings, hidden))

    def _tune(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not self._enabled:
            return
        states = BaseStates(self._collected, output.last_hidden_state)
        self._collected = []
        if self.observer is not None:
            self.observer(states)
        cache = self._cache_beside(output.past_key_values)
        given = {name: kwargs.get(name) for name in ("position_ids", "attention_mask", "segments")}
        output.last_hidden_state = self(states, cache=cache, **given)

    def _cache_beside(self, base: Cache | None) -> Cache | None:
        """The side network's key-value cache: further layers of the base's own.

        So operations of generation (reorder for beams, crop, repeat) apply to both.
        """
        if base is None:
            return None
        if not isinstance(base, DynamicCache):
            raise UserError(f"generate: a side network needs a DynamicCache, got {type(base).__name__}")
        depth = len(self.layers)
        own = DynamicCache(config=self.decoder.config)
        if len(base.layers) == depth:
            base.layers += own.layers
        own.layers = base.layers[depth:]
        return own


class _Zero(nn.Module):
    """A stand-in for an embedding that is never looked up, or whose result is not used."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())


def decoder_layers(decoder: nn.Module) -> nn.ModuleList:
    """The decoder layers of a decoder of transformers."""
    layers = decoder.layers
    assert isinstance(layers, nn.ModuleList), "a base without such layers is refused when its skeleton is built"
    return layers


def _narrow_decoder(config: PretrainedConfig) -> PreTrainedModel:
    """A decoder of the family's own class without its embeddings, randomly initialized as the family does it."""
    attention = config._attn_implementation
    # The text part of a multimodal model may have no causal LM of its own.
    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
    model = auto.from_config(config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=False)
    decoder = text_decoder(model)
    assert isinstance(decoder, PreTrainedModel), "the library's decoders are"
    for name, child in list(decoder.named_children()):
        if isinstance(child, nn.Embedding):
            setattr(decoder, name, _Zero())
    return decoder
