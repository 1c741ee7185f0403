"""Multimodal models, `...ForConditionalGeneration`: their text decoder with its LM head, and nothing else of them.

The class is the library's wrapper, so that weights, adapters and results carry the names that the wrapper gives them.
Its vision and audio parts are built without memory, tell which tensors of the files are theirs, and are taken out.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from dist_qft.errors import UserError

AutoClass = type[AutoModelForCausalLM] | type[AutoModelForMultimodalLM]

# What a forward pass over text hands on to the text decoder; and to a causal LM inside a model.
_TEXT_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache")
_CAUSAL_INPUTS = (*_TEXT_INPUTS, "logits_to_keep")


def auto_class(config: PretrainedConfig) -> AutoClass:
    """The door of transformers to build a model of this configuration by: as a wrapper, or as a causal LM.

    A configuration with a text part is a wrapper's, unless its `architectures` name the text model alone.

    Raises:
        UserError: an encoder-decoder.
    """
    wrapper = _class_name(MODEL_FOR_MULTIMODAL_LM_MAPPING, config)
    if config.get_text_config() is config or wrapper is None:
        return AutoModelForCausalLM
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"model.path: model type '{config.model_type}' is an encoder-decoder; must be a decoder alone")
    named = config.architectures or [wrapper]
    alone = wrapper not in named and _class_name(MODEL_FOR_CAUSAL_LM_MAPPING, config) in named
    return AutoModelForCausalLM if alone else AutoModelForMultimodalLM


def _class_name(mapping: Any, config: PretrainedConfig) -> str | None:
    """The class that a mapping of transformers has for a configuration, by name."""
    return mapping[type(config)].__name__ if type(config) in mapping else None


def attention_by_part(config: PretrainedConfig, attention: str) -> str | dict[str, str]:
    """The attention of the text decoder; the other parts, which never run, get what every class has."""
    parts = [key for key in config.sub_configs if getattr(config, key, None) is not None]
    if not parts or config.get_text_config() is config:
        return attention
    text = config.get_text_config()
    return {"": attention} | {key: attention if getattr(config, key) is text else "eager" for key in parts}


def text_decoder(causal: PreTrainedModel) -> nn.Module:
    """The part of a model from token ids to last hidden states. Of a causal LM inside the model, its body."""
    decoder: nn.Module = causal.get_decoder()
    head = causal.get_output_embeddings()
    while head is not None and any(module is head for module in decoder.modules()):
        inner = [child for child in decoder.children() if isinstance(child, PreTrainedModel)]
        if len(inner) != 1:
            break
        decoder = inner[0]
    return decoder


def is_wrapper(causal: PreTrainedModel) -> bool:
    """True if a model is a multimodal one, with parts beside its text decoder."""
    config = causal.config
    return config.get_text_config() is not config and auto_class(config) is AutoModelForMultimodalLM


def keep_text_alone(causal: PreTrainedModel, decoder: nn.Module) -> None:
    """Take everything out of a wrapper that is neither its text decoder nor its LM head.

    Its body, which would look for images among the token ids, then hands its inputs on to the text decoder. A wrapper
    of a whole causal LM (Llama 4) hands them on to that.
    """
    head, table = causal.get_output_embeddings(), causal.get_input_embeddings()
    kept = [part for part in (decoder, head, table) if part is not None]
    _take_out(causal, kept)
    body = causal.base_model
    if body is not causal and body is not decoder and any(module is decoder for module in body.modules()):
        body.forward = _text_forward(decoder, _TEXT_INPUTS)
    if body is causal:
        inner = [child for child in causal.children() if any(module is head for module in child.modules())]
        if len(inner) == 1 and isinstance(inner[0], PreTrainedModel):
            causal.forward = _text_forward(inner[0], _CAUSAL_INPUTS)


def _take_out(parent: nn.Module, kept: list[nn.Module]) -> None:
    for name, _ in list(parent.named_parameters(recurse=False)):
        setattr(parent, name, None)
    for name, child in list(parent.named_children()):
        if any(child is part for part in kept):
            continue
        inside = set(child.modules())
        if any(part in inside for part in kept):
            _take_out(child, kept)
        elif any(True for _ in child.parameters()) or any(True for _ in child.buffers()):
            setattr(parent, name, None)


def _text_forward(part: nn.Module, names: tuple[str, ...]) -> Callable[..., "_TextOutput"]:
    """A forward pass that hands the inputs of these names on to a part of the model."""

    def forward(input_ids: Tensor | None = None, **inputs: Any) -> "_TextOutput":
        inputs["input_ids"] = input_ids
        given = {key: inputs[key] for key in names if inputs.get(key) is not None}
        return _TextOutput(part(**given))

    forward.__signature__ = inspect.signature(part.forward)  # type: ignore[attr-defined]  # which `generate` reads
    return forward


class _TextOutput:
    """A text decoder's output, with None for what a wrapper's body returns beside it."""

    def __init__(self, output: Any) -> None:
        self._output = output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name, None)

    def __getitem__(self, index: Any) -> Any:
        return self._output[index]
