"""Certificates on disk: read, and published together with their result.

A folder holds its certificate and is published in one piece. A file and the certificate beside it are two names, which
no system call changes together. So the old certificate is first replaced by itself with the new one under `next`, then
the file is replaced, then the certificate. A reader takes the one of the two that has the file's digest: after a kill
at any moment the old pair is there, or the new one.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dist_qft.errors import CorruptFileError, SetupError, UserError
from dist_qft.merge.certificate import IN_FOLDER, VERSION, Certificate, certificate_place, file_digests
from dist_qft.storage.atomic import publishing, write_text

_NEXT = "next"
_READER = TypeAdapter(Certificate)


@dataclass
class Publication:
    """A result under its temporary name, which gets its own name together with its certificate."""

    final: Path
    temporary: Path
    certificate: Certificate | None = None

    def certify(self, certificate: Certificate) -> None:
        """Write the certificate: into a folder, or as the next one beside a file."""
        self.certificate = certificate
        if self.temporary.is_dir():
            (self.temporary / IN_FOLDER).write_text(_text(asdict(certificate)))
            return
        write_text(self._place, _text({**self._old, _NEXT: asdict(certificate)}))

    def settle(self) -> None:
        """Make the certificate beside a file its only one."""
        if self.certificate is not None and not self.final.is_dir():
            write_text(self._place, _text(asdict(self.certificate)))

    def retract(self) -> None:
        """Put back the certificate that was there before `certify`."""
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
    """Publish like `storage.atomic.publishing`, with a certificate that appears together with the file or folder."""
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


def _parsed(content: Any, place: Path) -> Certificate:
    if isinstance(content, dict) and content.get("version", VERSION) != VERSION:
        raise UserError(f"{place}: version {content['version']}, this program reads {VERSION}")
    try:
        return _READER.validate_python(content)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "content"
        raise CorruptFileError(f"{place}: not a merge certificate: {where}: {fault['msg']}") from error


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"
