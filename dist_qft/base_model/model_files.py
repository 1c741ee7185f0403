"""The safetensors files of a folder's model."""

import json
from pathlib import Path

from dist_qft.errors import CorruptFileError, UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def model_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder's model: model.safetensors, those of an index, or all there are.

    Which comes first is as in transformers: an index beside model.safetensors is not looked at.

    Raises:
        UserError: there are none, or not all that the index names.
        CorruptFileError: the index is none, or names files elsewhere.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return [single]
    if index.is_file():
        names = indexed_files(index)
        unsafe = [name for name in names if Path(name).name != name or "\0" in name]
        if unsafe:
            raise CorruptFileError(f"{index}: file name '{unsafe[0][:80]}' leaves the folder")
        there = {path.name for path in folder.iterdir()}
        missing = [name for name in names if name not in there]
        if missing:
            name, count = missing[0][:80], len(missing)
            raise UserError(f"{index}: names {name}, which is not in the folder ({count} missing)")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"model.path: '{folder}' has no *.safetensors file (pickled .bin weights are not read)")
    return files


def indexed_files(index: Path) -> list[str]:
    """The file names of a `model.safetensors.index.json`, each once; CorruptFileError if it is none."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError("weight_map must give a file name for each tensor")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFileError(f"{index}: not a safetensors index: {error}") from error
    return sorted(set(weight_map.values()))
