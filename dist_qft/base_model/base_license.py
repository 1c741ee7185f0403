"""The license that a base's own files name."""

import re
from pathlib import Path

from dist_qft.base_model.gguf_header import read_header
from dist_qft.config.schema import ModelConfig
from dist_qft.errors import DistQFTError
from dist_qft.storage.run_folder import read_json_object

_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
# The Hub's identifiers, such as apache-2.0.
_LICENSE = re.compile(r"^license:\s*[\"']?([A-Za-z0-9][\w.-]*)", re.MULTILINE)


def base_license(model: ModelConfig) -> str | None:
    """The Hub's identifier of the base's license; None if its files do not name one. Uses no network.

    It stands in GGUF metadata, in config.json, or in the front matter of the base's own card.
    """
    path = Path(model.path)
    if path.suffix == ".gguf":
        try:
            return _identifier(read_header(path).metadata.get("general.license"))
        except (DistQFTError, OSError):
            return None
    config, card = (_file(model, name) for name in ("config.json", "README.md"))
    if config is not None and (found := _identifier(read_json_object(config).get("license"))):
        return found
    return _of_card(card) if card is not None else None


def _file(model: ModelConfig, name: str) -> Path | None:
    """A file of the base: of its folder, or of a Hub id if it is in the cache."""
    if Path(model.path).is_dir():
        return Path(model.path) / name
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model.path, name, revision=model.revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _of_card(card: Path) -> str | None:
    try:
        front = _FRONT.match(card.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    found = _LICENSE.search(front[1]) if front else None
    return found[1] if found else None


def _identifier(value: object) -> str | None:
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*", value) else None
