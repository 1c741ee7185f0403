"""The verb `push`: everything local is checked first, then one upload."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from dist_qft.errors import SetupError, UserError
from dist_qft.hub.contents import Contents, contents_of, stale_files
from dist_qft.storage.atomic import publishing


def run_push(source: str, repository: str, *, private: bool, dry_run: Path | None, replace: bool = False) -> None:
    """Send a run's adapters or a merged result to a repository of the Hub, or write them to a folder instead.

    Args:
        repository: `owner/name`; it is made if it is not there.
        private: visibility of a repository that is made; one that is there keeps its own.
        dry_run: a folder that must not exist yet; nothing is sent then.
        replace: delete what the repository holds of another model.

    Raises:
        UserError: there is nothing to send, the name is none, or the repository holds another model.
        CorruptFileError: a file differs from its manifest or certificate.
        SetupError: there is no token, or the Hub cannot be reached or refuses.
    """
    require_repository_name(repository)
    contents = contents_of(Path(source), repository)
    if dry_run is not None:
        if dry_run.exists():
            raise UserError(f"--dry-run: '{dry_run}' exists, must be a new folder")
        with publishing(dry_run, overwrite=False) as temporary:
            contents.write(temporary)
        _tell(contents, f"written to {dry_run}, not sent")
        return
    address = _send(contents, repository, private=private, replace=replace)
    _tell(contents, address)


def require_repository_name(repository: str) -> None:
    """Refuse what the Hub does not take for a repository's name. Raises UserError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        if repository.count("/") != 1:
            raise HFValidationError("not of that form")
        validate_repo_id(repository)
    except HFValidationError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"repository: got '{repository}', must be owner/name: {reason}") from error


def _send(contents: Contents, repository: str, *, private: bool, replace: bool) -> str:
    """Upload in one commit, which may also delete the files of another model; return the repository's address."""
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise SetupError("no token for the Hub; set HF_TOKEN or run `hf auth login`")
    api = huggingface_hub.HfApi()
    with tempfile.TemporaryDirectory(prefix="dist_qft-push-") as scratch:
        folder = Path(scratch) / "repository"
        contents.write(folder, _link)
        try:
            address = api.create_repo(repository, private=private, exist_ok=True)
            info = api.model_info(repository)
            stale = stale_files([file.rfilename for file in info.siblings or ()], contents.sizes())
            if stale and not replace:
                raise UserError(
                    f"{repository}: holds {', '.join(stale)}, by which another model would be loaded; "
                    "--replace deletes them, or push to another repository"
                )
            deleted = [huggingface_hub.CommitOperationDelete(name) for name in stale]
            added = [huggingface_hub.CommitOperationAdd(name, folder / name) for name in contents.sizes()]
            # Not upload_folder, which may make several commits: in between, files of two models would lie together.
            message = "Upload with dist_qft"
            api.create_commit(repository, [*deleted, *added], commit_message=message, parent_commit=info.sha)
        except (KeyboardInterrupt, UserError):
            raise
        except Exception as error:  # the library raises its own, those of its HTTP client, OSError and ValueError
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise SetupError(f"{repository}: the Hub did not take it: {reason}") from error
    for name in stale:
        print(f"       deleted  {name}", file=sys.stderr)
    return str(address)


def _link(source: Path, target: Path) -> None:
    """Show a file under another name without copying gigabytes; a copy where there are no links."""
    try:
        os.symlink(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _tell(contents: Contents, where: str) -> None:
    for name, size in contents.sizes().items():
        print(f"{size:>14,}  {name}", file=sys.stderr)
    print(where)
