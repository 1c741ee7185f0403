"""Our quantized folder (`quantized_folder`) as transformers loads it: a registered quantizer, for inference.

`config.json` of such a folder names the method `dist_qft`, the file of the weights, and the format of each weight. The
quantizer puts frozen layers in place of the model's own, and transformers reads their packed tensors by name. A
transformers without it finds no weights, because the file is not called `model.safetensors`.

Importing this module registers the quantizer. That happens while transformers itself is being imported, so the methods
import the other parts of transformers that they need.
"""

from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dist_qft.base_model.quantized_folder import METHOD, SINGLE_FILE, described_weights

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


@register_quantization_config(METHOD)
class DistQFTConfig(QuantizationConfigMixin):
    """The `quantization_config` of a quantized folder.

    Attributes:
        weights_file: the safetensors file of the weights, or the index of several.
        weights: format and shape of each packed weight by module path, as in quantization.json.
    """

    def __init__(self, weights_file: str = SINGLE_FILE, weights: dict[str, Any] | None = None, **others: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # an enumeration, which has none of the registered ones
        self.weights_file = weights_file
        self.weights = weights or {}
        vars(self).update(others)


@register_quantizer(METHOD)
class DistQFTQuantizer(HfQuantizer):
    """A quantizer that builds frozen layers for the weights that `quantization_config` describes."""

    quantization_config: DistQFTConfig

    def update_attn_implementation(self, config: "PretrainedConfig") -> "PretrainedConfig":
        # Nothing about attention: of the calls that see the configuration this one comes before the files are looked
        # for, as `update_tp_plan` did in older versions.
        config.transformers_weights = self.quantization_config.weights_file
        return config

    update_tp_plan = update_attn_implementation

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", dtype: "torch.dtype | None" = None, **kwargs: Any
    ) -> "PreTrainedModel":
        from dist_qft.base_model.frozen_model import freeze_described

        where = f"config.json of '{model.name_or_path}'"
        freeze_described(model, described_weights(self.quantization_config.weights, where), dtype or model.dtype)
        return model

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        return model.requires_grad_(False)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
