"""The data files of a folder: those of one split, by their names or by the metadata that `datasets` wrote.

Three kinds of folder are known: plain ones, clones of a Hub repository (files in `data/`), and those that
`save_to_disk` writes (Arrow files named in `state.json`, and for several splits a folder each).
"""

import glob
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_qft.errors import UserError

# Splits by the names that files give them, as the Hub reads them.
_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_JSON = {".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz"}
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class FolderFiles:
    """Data files in the order in which they are read, and lines that tell which of several were taken."""

    files: list[Path]
    notes: list[str] = field(default_factory=list)


def kind_of(path: Path) -> str:
    """The file type that a name says: its last suffix, for compressed files the last two."""
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def files_of_folder(folder: Path, split: str, kinds: Sequence[Sequence[str]], key: str) -> FolderFiles:
    """The data files of `split` in `folder`, sorted by name; none if the folder holds no data files at all.

    Args:
        kinds: groups of file types that can be read. A group counts only where there are no files of those before it.
        key: the config section to blame, such as `data.train`.

    Raises:
        UserError: the folder has other splits only, or its own metadata cannot be read.
    """
    if (folder / "dataset_dict.json").is_file():
        names = _read(folder / "dataset_dict.json", key).get("splits")
        splits = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
        chosen = [name for name in splits if name == split] or [name for name in splits if _same(name, split)]
        if not chosen:
            raise _no_split(folder, split, splits, key)
        return FolderFiles(_saved_files(folder / chosen[0], key), [f"{key}: split {chosen[0]} of {folder}"])
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        held = _read(folder / "state.json", key).get("_split")
        if split != "train" and not (isinstance(held, str) and _same(held, split)):
            raise _no_split(folder, split, [held] if isinstance(held, str) else [], key)
        return FolderFiles(_saved_files(folder, key))
    places = [folder, folder / "data"] if (folder / "data").is_dir() else [folder]
    found = (_data_files(place, group) for group in kinds for place in places)
    files = next(filter(None, found), [])
    return _of_split(folder, files, split, key) if files else FolderFiles([])


def _data_files(folder: Path, kinds: Sequence[str]) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if kind_of(file) in kinds and not file.name.startswith(".") and file.name not in _DESCRIPTIONS
    )


def _of_split(folder: Path, files: list[Path], split: str, key: str) -> FolderFiles:
    """Those of `files` whose names say `split`; for train, those that name no split if none says train."""
    named = {file: name for file in files if (name := _split_in(file.name))}
    chosen = [file for file, name in named.items() if _same(name, split)]
    if not chosen and split not in _NAMES:
        chosen = [file for file in files if _word(split).search(file.name)]
    if not chosen and split == "train":
        chosen = [file for file in files if file not in named]
    if not chosen:
        raise _no_split(folder, split, sorted(set(named.values())), key)
    _require_one_kind(folder, files, chosen, split, key)
    others = [file.name for file in files if file not in chosen]
    if not others:
        return FolderFiles(chosen)
    taken, left = (_few(names) for names in ([file.name for file in chosen], others))
    return FolderFiles(chosen, [f"{key}: split {split} of {folder} is {taken}; left out: {left}"])


def several_kinds(files: Sequence[Path]) -> str:
    """The types of files that may hold the same rows twice, with their counts, for a message; else empty.

    They may if they have several types, other than JSON and lines of JSON under different names.
    """
    kinds = Counter(kind_of(file) for file in files)
    stems = {file.name.removesuffix(kind_of(file)) for file in files}
    if len(kinds) == 1 or (kinds.keys() <= _JSON and len(stems) == len(files)):
        return ""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _require_one_kind(folder: Path, files: list[Path], chosen: list[Path], split: str, key: str) -> None:
    """Refuse a split in files of several types, which would be trained on twice and be held out from itself."""
    if not (kinds := several_kinds(chosen)):
        return
    kind = max(map(kind_of, chosen))
    wanted, alike = ([file for file in group if kind_of(file) == kind] for group in (chosen, files))
    first, last = wanted[0].name.removesuffix(kind), wanted[-1].name.removesuffix(kind)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    beginning = "".join(one for one, _ in same)
    if alike == wanted:
        pattern = f"*{kind}"
    elif [file for file in alike if file.name.startswith(beginning)] == wanted:
        pattern = f"{glob.escape(beginning)}*{kind}"
    else:  # what tells them from files of other splits is not at the beginning of their names
        pattern = wanted[0].name
    unset = "" if split == "train" else ", without a split"
    raise UserError(
        f"{key}.path: split {split} of {folder} has files of several types ({kinds}), which may hold the same rows; "
        f"must be of one, such as '{wanted[0].parent / pattern}'{unset}"
    )


def _split_in(file_name: str) -> str | None:
    """The split that a file's name says, if any: `train.jsonl`, `test-00000-of-00001.parquet`, `my_dev.csv`."""
    stem = file_name.rpartition(".")[0]
    for split, names in _NAMES.items():
        if any(_word(name).search(stem) for name in names):
            return split
    return None


def _word(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z]){re.escape(name)}(?![A-Za-z])", re.IGNORECASE)


def _same(name: str, split: str) -> bool:
    return _canonical(name) == _canonical(split)


def _canonical(name: str) -> str:
    return next((split for split, names in _NAMES.items() if name in names), name)


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _saved_files(folder: Path, key: str) -> list[Path]:
    """The Arrow files of a folder that `save_to_disk` wrote, in their order."""
    entries = _read(folder / "state.json", key).get("_data_files")
    names = [entry.get("filename") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    files = [folder / name for name in names if isinstance(name, str) and name == Path(name).name]
    if not files or len(files) != len(names):
        raise UserError(f"{key}.path: {folder / 'state.json'} does not name the folder's data files")
    return files


def _read(path: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{key}.path: cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{key}.path: {path} is not what datasets writes there")
    return content


def _no_split(folder: Path, split: str, splits: list[str], key: str) -> UserError:
    there = f"it has {', '.join(splits)}" if splits else "its files name no splits"
    return UserError(f"{key}.split: {folder} has no split {split!r}; {there}")
