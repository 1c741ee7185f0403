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
from dist_qft.merge.certificate import IN_FOLDER, VERSION, Certificate, certificate_place, file_digests
from dist_qft.storage.atomic import lock_path, publishing, refused_write, write_text
from dist_qft.storage.lock import locked
from dist_qft.storage.stored_faults import first_fault

_NEXT, _DIGEST = "next", "digest"
_READER = TypeAdapter(Certificate)


@dataclass
class Publication:
    """A result under its temporary name, which gets its own name together with its certificate."""

    final: Path
    temporary: Path
    certificate: Certificate | None = None
    _replaced: dict[Path, bytes | None] = field(default_factory=dict)

    def certify(self, certificate: Certificate, companions: Mapping[str, str] | None = None) -> None:
        """Write the certificate: into a folder, or as the next one beside a file; and text files by name likewise."""
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
                write_text(path, content.decode(errors="replace"))
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
        try:
            content = json.loads(self._place.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return {key: value for key, value in content.items() if key != _NEXT} if isinstance(content, dict) else {}


@contextmanager
def publishing_certified(final: Path, overwrite: bool) -> Iterator[Publication]:
    """Publish like `storage.atomic.publishing`, with a certificate that appears together with the file or folder.

    Raises:
        UserError: another process is writing the same result.
        SetupError: see `publishing`.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refused_write(final, error) from error
    with locked(lock_path(final), f"merge.path: '{final}'", 0):
        publication: Publication | None = None
        try:
            with publishing(final, overwrite) as temporary:
                publication = Publication(final, temporary)
                yield publication
                if final.exists() and not overwrite:
                    raise SetupError(f"'{final}' has appeared meanwhile; nothing was replaced")
        except BaseException:
            if publication is not None:
                publication.retract()
            raise
        publication.settle()


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
