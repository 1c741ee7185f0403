"""The settings of a base that change a logit or a token but are no weights: its configuration and its tokenizer.

The fingerprint of a base covers its weights. A checkpoint records these settings beside it, so that another
`rope_theta` or another merge of the tokenizer is refused with its file and its key wherever the checkpoint is used.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from pydantic import TypeAdapter, ValidationError
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dist_qft.base_model.stop_tokens import GENERATION_CONFIG, stored_generation_config
from dist_qft.config.schema import ModelConfig
from dist_qft.errors import CorruptFileError
from dist_qft.storage.stored_faults import first_fault

CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"

# Keys that say how a model is stored, called or begun, not what it computes; and dropout, which a frozen base has not.
_OF_NO_EFFECT = {
    "architectures", "auto_map", "dtype", "finetuning_task", "gradient_checkpointing", "id2label", "label2id",
    "output_attentions", "output_hidden_states", "output_router_logits", "problem_type", "quantization_config",
    "return_dict", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
_NO_EFFECT = re.compile("^_|dropout|initializer|aux_loss")
_SPECIAL = ("bos_token", "eos_token", "unk_token")
_PACKAGES = ("transformers", "tokenizers")
_LONGEST_VALUE = 200


@dataclass(frozen=True)
class BaseSettings:
    """Settings by file and key. Long values, and all of the tokenizer but its special tokens, stand as digests.

    Attributes:
        versions: of the packages that read the files.
    """

    files: dict[str, dict[str, Any]]
    versions: dict[str, str] = field(default_factory=lambda: _versions())

    def described(self) -> dict[str, Any]:
        """JSON-able data for `adapter_config.json`."""
        return asdict(self)

    @classmethod
    def read(cls, stored: object, where: str) -> "BaseSettings":
        """The settings that `described` gave; CorruptFileError naming `where` for anything else."""
        try:
            return TypeAdapter(cls).validate_python(stored)
        except ValidationError as error:
            raise CorruptFileError(f"{where}: {first_fault(error)}") from error

    def differences(self, before: "BaseSettings", files: tuple[str, ...] | None = None) -> list[str]:
        """Each setting of these files (None: of all) that was another one `before`: file, key, what it is and was.

        A release of a library may read more keys out of a file than another: what one side alone knows counts only if
        the versions are the same.
        """
        found = []
        for file, settings in self.files.items():
            then = before.files.get(file)
            if then is None or (files is not None and file not in files):
                continue
            if file == GENERATION_CONFIG:  # records of earlier versions hold settings of sampling, too
                settings, then = _ends(settings), _ends(then)
            keys = settings.keys() & then.keys()
            if file == GENERATION_CONFIG or (file == CONFIG and before.versions == self.versions):
                keys = settings.keys() | then.keys()
            found += [
                f"{file}: {key}: got {_shown(settings, key)}, must be {_shown(then, key)}"
                for key in sorted(keys)
                if settings.get(key) != then.get(key)
            ]
        return found


def base_settings(
    model: ModelConfig, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, *, own_template: bool
) -> BaseSettings:
    """The settings of the base at `model.path`, as they are now.

    Args:
        config: as the model was built from it.
        own_template: whether the tokenizer has the base's own chat template; another one is no setting of the base.
    """
    special: dict[str, Any] = {name: _token(tokenizer, name) for name in _SPECIAL}
    if own_template:
        special["chat_template"] = _digest(tokenizer.chat_template)
    return BaseSettings(
        {
            CONFIG: _of_config(config),
            GENERATION_CONFIG: _ends(stored_generation_config(model)),
            TOKENIZER: _of_tokenizer(tokenizer),
            TOKENIZER_CONFIG: special,
        }
    )


def _ends(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The one setting of a generation_config.json that we use: how tokens are drawn is asked for at each answer."""
    return {key: value for key, value in generation_config.items() if key == "eos_token_id"}


def digest_of_config(config: PretrainedConfig) -> str:
    """A digest of the settings that change a hidden state, as this version of the library reads them."""
    return _digest([_of_config(config), _versions()])


def _of_config(config: PretrainedConfig) -> dict[str, Any]:
    """Every setting that has an effect, by its dotted key."""
    return dict(_flat(json.loads(config.to_json_string(use_diff=False))))


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a nested configuration that has an effect, with its dotted key."""
    for key, value in tree.items():
        if key in _OF_NO_EFFECT or _NO_EFFECT.search(key):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if len(json.dumps(value)) <= _LONGEST_VALUE else _digest(value)


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A digest of each part of the tokenizer."""
    if not tokenizer.is_fast:
        return {"vocabulary": _digest(tokenizer.get_vocab())}
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    model = tree.pop("model")
    # Padding and truncation are the last call's, and say nothing about tokens.
    parts = {key: value for key, value in tree.items() if key not in ("version", "padding", "truncation")}
    parts |= {f"model.{key}": value for key, value in model.items() if "dropout" not in key}
    return {key: _digest(value) for key, value in parts.items()}


def _token(tokenizer: PreTrainedTokenizerBase, name: str) -> str | None:
    token = getattr(tokenizer, name, None)
    return None if token is None else str(token)


def _digest(value: object) -> str:
    return "SHA-256 " + hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key], ensure_ascii=False) if key in settings else "nothing"
