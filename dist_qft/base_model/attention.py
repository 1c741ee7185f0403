"""`model.attention`: the names that transformers accepts, checked before a model is built.

Some of them stand for code on the Hub, which transformers would download and run: only with `model.attention_from_hub`.
"""

from importlib.util import find_spec

from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dist_qft.base_model import segment_attention
from dist_qft.config.schema import ModelConfig
from dist_qft.errors import UserError

_FLASH = "flash_attention_"


def check_attention(model: ModelConfig) -> None:
    """Refuse an implementation that transformers does not know, whose package is missing, or that needs the Hub.

    Raises:
        UserError: one of these.
    """
    name = model.attention
    got = f"model.attention: got '{name}'"
    if "/" in name:
        _require_hub(model, f"{got}, which is code on the Hub")
        return
    others = [key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in key and key != segment_attention.NAME]
    known = ["eager", *others]
    if name not in known:
        raise UserError(f"{got}, must be {', '.join(sorted(known))}, or owner/name of a kernel on the Hub")
    version = name.removeprefix(_FLASH)
    entry = FLASH_ATTENTION_COMPATIBILITY_MATRIX.get(int(version)) if version.isdecimal() else None
    if entry is not None and not entry["general_availability_check"]():
        _require_hub(model, f"{got}, whose package is not installed, or not for this device")


def _require_hub(model: ModelConfig, reason: str) -> None:
    """Refuse code of the Hub unless it is asked for, and the package that runs it is there."""
    if not model.attention_from_hub:
        raise UserError(f"{reason}; set model.attention_from_hub to true to download and run code of the Hub for it")
    if find_spec("kernels") is None:
        raise UserError(f"{reason}; that needs the package 'kernels'")
