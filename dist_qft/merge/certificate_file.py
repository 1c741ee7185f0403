"""Certificates on disk: read, and published together with their result.

A folder holds its certificate and is published in one piece. A file and the certificate beside it are two names, which
no system call changes together. So the old certificate is first replaced by itself with the new one under `next`, then
the file is replaced, then the certificate. A reader takes the one of the two that has the file's digest: after a kill
at any moment the old pair is there, or the new one. The files for readers that go along with a result (`model_card`)
are there before it. One process at a time publishes a result.

A certificate carries the SHA-256 of its own content, so that a figure that a disk has changed is seen.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dist_qft.errors import CorruptFileError, SetupError, UserError
from dist_qft.merge.certificate import CARD, IN_FOLDER, VERSION, Certificate, certificate_place, file_digests
from dist_qft.storage.atomic import lock_path, publishing, refused_write, write_text
from dist_qft.storage.lock import locked
from dist_qft.storage.run_folder import read_json_object
from dist_qft.storage.stored_faults import first_fault

_NEXT, _DIGEST = "next", "digest"
_READER = TypeAdapter(Certificate)


@dataclass
class Publication:
    """A result under its temporary name, which gets its own name together with its certificate."""

    final: Path
    temporary: Path
    overwrite: bool = False
    certificate: Certificate | None = None
    _replaced: dict[Path, bytes | None] = field(default_factory=dict)

    def certify(self, certificate: Certificate, companions: Mapping[str, str] | None = None) -> None:
        """Write the certificate: into a folder, or as the next one beside a file; and text files by name likewise."""
        if self.overwrite:  # while the result was made, something else may have come there
            require_own(self.final)
        self.certificate = certificate
        if self.temporary.is_dir():
            (self.temporary / IN_FOLDER).write_text(_text(_signed(certificate)))
            for name, text in (companions or {}).items():
                (self.temporary / name).write_text(text, encoding="utf-8")
            return
        for name, text in (companions or {}).items():
            path = self.final.with_name(name)
            self._replaced[path] = path.read_bytes() if path.is_file() else None
            write_text(path, text)
        write_text(self._place, _text({**self._old, _NEXT: _signed(certificate)}))

    def settle(self) -> None:
        """Make the certificate beside a file its only one."""
        if self.certificate is not None and not self.final.is_dir():
            write_text(self._place, _text(_signed(self.certificate)))

    def retract(self) -> None:
        """Put back what was there before `certify`."""
        for path, content in self._replaced.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                with publishing(path, overwrite=True) as temporary:
                    temporary.write_bytes(content)
        if self.certificate is None or self.temporary.is_dir():
            return
        if self._old:
            write_text(self._place, _text(self._old))
        else:
            self._place.unlink(missing_ok=True)

    @property
    def _place(self) -> Path:
        return certificate_place(self.final, folder=False)

    @property
    def _old(self) -> dict[str, Any]:
        """The old file's certificate as it is on disk, whatever its content; {} if there is none."""
        return {key: value for key, value in read_json_object(self._place).items() if key != _NEXT}


@contextmanager
def publishing_certified(final: Path, overwrite: bool) -> Iterator[Publication]:
    """Publish like `storage.atomic.publishing`, with a certificate that appears together with the file or folder.

    Raises:
        UserError: another process is writing the same result, or it would replace what no merge has written.
        SetupError: see `publishing`.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refused_write(final, error) from error
    with locked(lock_path(final), f"merge.path: '{final}'", 0):
        publication: Publication | None = None
        if overwrite:
            require_own(final)
        try:
            with publishing(final, overwrite) as temporary:
                publication = Publication(final, temporary, overwrite)
                yield publication
                if final.exists() and not overwrite:
                    raise SetupError(f"'{final}' has appeared meanwhile; nothing was replaced")
        except BaseException:
            if publication is not None:
                publication.retract()
            raise
        publication.settle()


def require_own(result: Path) -> None:
    """Refuse to replace what no merge has written. Nothing, an empty folder and a result of a merge may be replaced.

    Raises:
        UserError: a file or folder without a certificate, or a folder with files that its certificate does not name.
    """
    if not result.exists() or (result.is_dir() and not any(result.iterdir())):
        return
    place = certificate_path(result)
    got = f"--overwrite (merge.overwrite): got '{result}', must be the result of a merge"
    if not is_certificate(place):
        raise UserError(f"{got}: there is no certificate '{place}', so no merge wrote it; remove it yourself")
    if not result.is_dir():
        return
    named = {IN_FOLDER, CARD}.union(*(said["result"]["sha256"] for said in _certificates_in(place)))
    for file in sorted(result.rglob("*")):
        name = file.relative_to(result).as_posix()
        if name not in named and not any(other.startswith(f"{name}/") for other in named):
            raise UserError(f"{got} alone: no merge wrote '{file}'; move it to another place")


def is_certificate(place: Path) -> bool:
    """True if the file is a certificate, at least in its outline: also one of another version, or about to be one."""
    return bool(_certificates_in(place))


def _certificates_in(place: Path) -> list[dict[str, Any]]:
    content = read_json_object(place)
    return [said for said in (content, content.get(_NEXT)) if isinstance(said, dict) and _has_outline(said)]


def _has_outline(content: Mapping[str, Any]) -> bool:
    result = content.get("result")
    return "adapter" in content and isinstance(result, dict) and isinstance(result.get("sha256"), dict)


def certificate_path(result: Path) -> Path:
    """The place of a result's certificate; the result is there."""
    return certificate_place(result, folder=result.is_dir())


def read_certificate(path: Path) -> tuple[Path, Certificate]:
    """The certificate of a result, or the one at `path` itself, and the file that it was read from.

    Raises:
        UserError: there is none, or one of another version of this program.
        CorruptFileError: it is not of this form.
    """
    place = path if path.name.endswith(IN_FOLDER) else certificate_path(path)
    if not place.is_file():
        raise UserError(f"'{path}' has no certificate: no file '{place}'")
    try:
        content = json.loads(place.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        if _NEXT not in content:
            return place, _parsed(content, place)
        return place, _interrupted(content, place)
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptFileError(f"{place}: not a merge certificate: {error}") from error


def _interrupted(content: Mapping[str, Any], place: Path) -> Certificate:
    """The certificate of the file that is there, after a merge that was killed while it published."""
    old = {key: value for key, value in content.items() if key != _NEXT}
    new = _parsed(content[_NEXT], place)
    result = place.parent / new.result.path
    if not result.exists():
        raise UserError(f"{place}: there is no '{result}': the merge was stopped before it was published")
    if old and file_digests(result, result.name) != new.result.sha256:
        return _parsed(old, place)
    return new


def certificate_text(certificate: Certificate) -> str:
    """The content of a certificate's file."""
    return _text(_signed(certificate))


def _signed(certificate: Certificate) -> dict[str, Any]:
    """The content of the file with a digest of itself."""
    content = asdict(certificate)
    return {**content, _DIGEST: _digest(content)}


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps({key: value for key, value in content.items() if key != _DIGEST}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _parsed(content: Any, place: Path) -> Certificate:
    if isinstance(content, dict) and content.get("version", VERSION) != VERSION:
        raise UserError(f"{place}: version {content['version']}, this program reads {VERSION}")
    if isinstance(content, dict):
        # Certificates of earlier versions have no digest, and no key that is not known here either.
        if unknown := content.keys() - {*Certificate.__dataclass_fields__, _DIGEST}:
            raise CorruptFileError(f"{place}: not a merge certificate: unknown key {min(unknown)!r}")
        if content.get(_DIGEST, _digest(content)) != _digest(content):
            raise CorruptFileError(f"{place}: altered since it was written")
        content = {key: value for key, value in content.items() if key != _DIGEST}
    try:
        return _READER.validate_python(content)
    except ValidationError as error:
        raise CorruptFileError(f"{place}: not a merge certificate: {first_fault(error)}") from error


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"
