"""A model's files fetched from the Hub: those that are read here, and no others.

Repositories hold further copies of the weights (`original/`, `consolidated.safetensors`), adapters, and other
programs' files.
"""

from collections.abc import Sequence
from pathlib import Path

from dist_qft.base_model.model_files import INDEX, SINGLE, indexed_files, model_files
from dist_qft.config.schema import ModelConfig
from dist_qft.errors import DistQFTError, UserError

_JSON = "*.json"


def fetch_json(model: ModelConfig) -> Path:
    """The snapshot's folder in the Hugging Face cache, with the JSON files at the repository's root.

    Raises:
        UserError: no such repository or revision, or no network.
    """
    return _fetched(model.path, model.revision, [_JSON])


def snapshot_here(model: ModelConfig) -> Path | None:
    """The folder of a Hub id's snapshot in the cache if all its weights are in it; asks no network.

    Weights that neither an index nor their name completes are left out: a part of them may be missing.
    """
    try:
        folder = _fetched(model.path, model.revision, [_JSON], local_files_only=True)
        names = {path.name for path in model_files(folder)}
    except DistQFTError:
        return None
    return folder if SINGLE in names or (folder / INDEX).is_file() else None


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


def _fetched(repository: str, revision: str | None, names: Sequence[str], *, local_files_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(names),
            ignore_patterns=["*/*"],
            local_files_only=local_files_only,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(f"model.path: cannot fetch '{repository}' from the Hub: {error}") from error
    return Path(found)
