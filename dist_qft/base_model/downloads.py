"""A model's files fetched from the Hub: those that are read here, and no others.

Repositories hold further copies of the weights (`original/`, `consolidated.safetensors`), adapters, and other
programs' files.
"""

from collections.abc import Sequence
from pathlib import Path

from dist_qft.base_model.model_files import INDEX, SINGLE, indexed_files
from dist_qft.config.schema import ModelConfig
from dist_qft.errors import UserError

_JSON = "*.json"


def fetch_json(model: ModelConfig) -> Path:
    """The snapshot's folder in the Hugging Face cache, with the JSON files at the repository's root.

    Raises:
        UserError: no such repository or revision, or no network.
    """
    return _fetched(model.path, model.revision, [_JSON])


def fetch_weights(model: ModelConfig, folder: Path) -> None:
    """Fetch the safetensors files that `model_files` chooses into a snapshot's folder, which has the JSON files.

    Raises:
        UserError: the Hub cannot be reached.
        CorruptFileError: the index is none.
    """
    commit = folder.name  # whatever the branch is by now
    _fetched(model.path, commit, [_JSON, SINGLE])  # JSON again, or the library would warn that nothing was found
    if not (folder / SINGLE).is_file():
        index = folder / INDEX
        _fetched(model.path, commit, indexed_files(index) if index.is_file() else [_JSON, "*.safetensors"])


def _fetched(repository: str, revision: str | None, names: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(repository, revision=revision, allow_patterns=list(names), ignore_patterns=["*/*"])
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(f"model.path: cannot fetch '{repository}' from the Hub: {error}") from error
    return Path(found)
