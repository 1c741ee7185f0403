"""The place of a result: refused before anything is loaded if something would be lost there.

A result never takes the place of the run, a checkpoint or the base, nor of a folder around them, and never goes into a
checkpoint or the base's folder. `--overwrite` replaces results of a merge and nothing else.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.merge.certificate import certificate_place
from dist_qft.merge.certificate_file import is_certificate, require_own
from dist_qft.merge.model_card import is_companion, names_beside
from dist_qft.merge.recipe import MergeRequest, Recipe
from dist_qft.merge.targets import TARGETS, request_at_end
from dist_qft.merge.writers.gguf_files import BLOCK_BYTES
from dist_qft.storage.checkpoint import TRAINER_STATE, is_checkpoint_name, require_space, require_writable
from dist_qft.storage.reach import require_reachable

KEY = "-o (merge.path)"


def require_place_at_end(config: RunConfig) -> None:
    """Refuse a config whose merge would end where something would be lost; see `require_place`."""
    request = request_at_end(config)
    if request is None:
        return
    require_place(request, Path(config.output_dir), config.model.path)
    if request.overwrite:
        require_own(request.path)


def require_place(request: MergeRequest, run: Path, base: str, checkpoint: Path | None = None) -> None:
    """Refuse a place that belongs to something else, whether or not it is to be replaced. Symbolic links are followed.

    Args:
        run: the run's folder, which need not be there yet.
        base: `model.path`; a Hub id is nowhere on this machine.
        checkpoint: the checkpoint that is merged, if it is known.

    Raises:
        UserError: the place is, holds or lies in what must be kept, or is a file where a folder is written or the
            other way round.
        SetupError: one of them is below a folder that this user may not enter.
    """
    path, target = request.path, TARGETS[request.target]
    for folder, key in ((run, "output_dir"), (base, "model.path"), (path, KEY)):
        require_reachable(folder, key)
    target.require_name(path)
    if path.name in ("", ".."):
        raise UserError(f"{KEY}: got '{path}', must end with the name of a file or folder")
    for place in (_real(path), _real(path.parent) / path.name):
        for reason in _losses(place, run, base, checkpoint):
            raise UserError(f"{KEY}: got '{path}', must be another place: it {reason}")
    if path.is_symlink() and not path.exists():
        raise UserError(f"{KEY}: got '{path}', must be another place: it is a symbolic link to nothing")
    if path.exists() and path.is_dir() == target.is_file:
        there, written = ("folder", "file") if target.is_file else ("file", "folder")
        raise UserError(f"{KEY}: got '{path}', which is a {there}, must be a {written}: {target.name} writes one")


def require_free(request: MergeRequest) -> None:
    """Refuse to write where something is already, unless it may and can be replaced.

    Raises:
        UserError: something is there that was not asked to be replaced, or that no merge has written.
        SetupError: nothing can be written there.
    """
    path = request.path
    if path.exists() and not request.overwrite:
        raise UserError(
            f"'{path}' exists already; --overwrite (merge.overwrite) replaces it, -o (merge.path) chooses another place"
        )
    require_own(path)
    if TARGETS[request.target].is_file:
        _require_room_beside(path)
    require_writable(path.parent, KEY)


def require_room(recipe: Recipe, base: BaseModel) -> None:
    """Refuse a result that its disk cannot hold for sure, before the base is loaded and the merge computed.

    Args:
        base: its shapes, on any device.

    Raises:
        SetupError: see `require_space`.
    """
    needed = 0
    if recipe.dtype is not None:
        needed = recipe.dtype.itemsize * sum(math.prod(weight.weight_shape) for weight in base.weights().values())
    elif recipe.request.target == "gguf":
        # The adapted tensors as Q4_1; the others may be in fewer bits.
        needed = recipe.adapted_weights // 32 * BLOCK_BYTES
    require_space(recipe.request.path.parent, needed, KEY, "the result")


def _losses(place: Path, run: Path, base: str, checkpoint: Path | None) -> Iterator[str]:
    """The reasons why a result must not be at `place`, a path without symbolic links."""
    kept = {"run's folder": run} | ({"checkpoint": checkpoint} if checkpoint is not None else {})
    if Path(base).exists():
        kept["base"] = Path(base)
    for name, path in kept.items():
        if _within(_real(path), place):
            yield f"{'is' if _same(_real(path), place) else 'holds'} the {name} '{path}'"
    if Path(base).is_dir() and _within(place, _real(Path(base))):
        yield f"lies in the base '{base}'"
    for folder in (place, *place.parents):
        own = is_checkpoint_name(folder.name) and _same(folder.parent, _real(run))  # it may be yet to come
        if own or (folder / TRAINER_STATE).is_file():
            yield f"{'is' if folder == place else 'lies in'} the checkpoint '{folder}'"


def _require_room_beside(path: Path) -> None:
    """Refuse a new file whose certificate and texts would replace other files beside it."""
    place = certificate_place(path, folder=False)
    if is_certificate(place):
        return
    beside = [file for file in map(path.with_name, names_beside(path.name)) if not is_companion(file, path.name)]
    for file in (place, *beside):
        if file.exists():
            raise UserError(
                f"'{file}' would be replaced together with '{path}', and no merge wrote it; {KEY} chooses another place"
            )


def _real(path: Path) -> Path:
    """The path without symbolic links, as far as it is there."""
    return Path(os.path.realpath(path))


def _within(inner: Path, outer: Path) -> bool:
    """True if `inner` is `outer` or lies in it."""
    return any(_same(folder, outer) for folder in (inner, *inner.parents))


def _same(first: Path, second: Path) -> bool:
    """True for one file or folder, also under two spellings on a file system that knows no case."""
    return first == second or (first.exists() and second.exists() and first.samefile(second))
