"""The files of a repository, chosen and checked: adapters or a merged result, a card, a certificate; nothing else.

Paths of this machine are taken out of them.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from dist_qft.base_model.quantized_folder import QUANTIZATION_FILE
from dist_qft.base_model.stop_tokens import GENERATION_CONFIG
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.hub.adapter_card import adapter_card
from dist_qft.merge.certificate import CARD, IN_FOLDER, BaseUsed, Certificate, ResultFiles, file_digests
from dist_qft.merge.certificate_file import certificate_path, certificate_text, read_certificate
from dist_qft.merge.model_card import names_beside
from dist_qft.merge.names import portable_name
from dist_qft.merge.writers.model_files import CONFIG, MORE_TEMPLATES, TOKENIZERS
from dist_qft.storage.atomic import json_text
from dist_qft.storage.checkpoint import ADAPTER_CONFIG, ADAPTER_MODEL, TRAINER_STATE, list_checkpoints
from dist_qft.tuned_model.checkpointed import TASK, find_checkpoint, require_finite_trainables, task_name

# Files by which transformers and PEFT load a folder: one that an earlier push left would be taken for the new one's.
# GGUF files are loaded by their names, and several may lie in one repository.
_LOADED = (
    ADAPTER_CONFIG, CONFIG, GENERATION_CONFIG, QUANTIZATION_FILE, "*.safetensors", "*.safetensors.index.json",
    IN_FOLDER, *TOKENIZERS, f"{MORE_TEMPLATES}/*.jinja",
)  # fmt: skip

Place = Callable[[Path, Path], object]  # puts the file of the first path under the second


@dataclass(frozen=True)
class Contents:
    """The files of a repository by name: copied from `files`, written from `texts`."""

    files: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path, place: Place = shutil.copyfile) -> None:
        """Write them into a new folder. `place` puts a file there, such as a copy of it."""
        folder.mkdir()
        for name, path in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            place(path.resolve(), folder / name)
        for name, text in self.texts.items():
            (folder / name).write_text(text, encoding="utf-8")

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by name."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return dict(sorted({**sizes, **{name: len(text.encode()) for name, text in self.texts.items()}}.items()))


def contents_of(path: Path, name: str) -> Contents:
    """The repository `name` made of a run, a checkpoint, or the certified result of a merge.

    Raises:
        UserError: nothing of that kind is at `path`.
        CorruptFileError: a file differs from its manifest or certificate.
        NumericError: the adapters are not finite.
    """
    if not path.exists():
        raise UserError(f"no file or folder '{path}'")
    if certificate_path(path).is_file():
        return _of_result(path, name)
    if path.is_dir() and ((path / TRAINER_STATE).is_file() or list_checkpoints(path)):
        return _of_adapters(path, name)
    raise UserError(
        f"'{path}': must be a run with a checkpoint, a checkpoint, or the result of a merge with its certificate; "
        "bases are not sent"
    )


def stale_files(there: Iterable[str], sent: Collection[str]) -> list[str]:
    """Of the files in a repository those by which another model than the one that is sent would be loaded.

    Cards, licences, files of other kinds and those in other folders are the owner's.
    """
    if not any(map(_is_loaded, sent)):
        return []
    return sorted(filter(_is_loaded, set(there) - set(sent)))


def _is_loaded(name: str) -> bool:
    return any(fnmatchcase(name, kind) and name.count("/") == kind.count("/") for kind in _LOADED)


def _of_adapters(path: Path, name: str) -> Contents:
    checkpoint = find_checkpoint(path)
    require_finite_trainables(checkpoint)
    config = {key: value for key, value in checkpoint.adapter_config.items() if key != "run_config"}
    config[TASK] = task_name(checkpoint.adapter_config)
    config["base_model_name_or_path"] = portable_name(str(config.get("base_model_name_or_path")), short=True)
    texts = {ADAPTER_CONFIG: json_text(config), CARD: adapter_card(name, checkpoint)}
    return Contents({ADAPTER_MODEL: checkpoint.path / ADAPTER_MODEL}, texts)


def _renamed(card: str, local: str, repository: str) -> str:
    return card.replace(f"\n# {local}\n", f"\n# {repository}\n").replace(f'"{local}"', f'"{repository}"')


def _of_result(path: Path, repository: str) -> Contents:
    place, certificate = read_certificate(path)
    folder, digests = path.is_dir(), file_digests(path, path.name)
    for name, digest in certificate.result.sha256.items():
        if digests.get(name) != digest:
            raise CorruptFileError(f"{path}: {name} is missing or differs from its certificate")
    files = {name: path / name if folder else path for name in certificate.result.sha256}
    texts = {}
    if folder:
        card = path / CARD
    else:
        card, other = map(path.with_name, names_beside(path.name))
        if other.is_file():
            files[other.name] = other
    if card.is_file() and folder:  # the commands in it load the folder by its name
        texts[CARD] = _renamed(card.read_text(encoding="utf-8"), path.resolve().name, repository)
    elif card.is_file():
        files[CARD] = card
    if certificate.target == "peft":
        config = json.loads(files.pop(ADAPTER_CONFIG).read_bytes())
        config["base_model_name_or_path"] = portable_name(str(config["base_model_name_or_path"]), short=True)
        texts[ADAPTER_CONFIG] = json_text(config)
    texts[place.name] = certificate_text(_portable(certificate, path, texts))
    return Contents(files, texts)


def _portable(certificate: Certificate, path: Path, texts: dict[str, str]) -> Certificate:
    """The certificate of files that lie beside it, of which `texts` are rewritten; without paths of this machine."""
    digests = {
        name: hashlib.sha256(texts[name].encode()).hexdigest() if name in texts else digest
        for name, digest in certificate.result.sha256.items()
    }
    base = _base_name(certificate.base.path, certificate_path(path).parent)
    return replace(
        certificate,
        result=ResultFiles("." if path.is_dir() else path.name, digests),
        base=BaseUsed(base, certificate.base.fingerprint),
        adapter=replace(certificate.adapter, path=Path(certificate.adapter.path).name),
    )


def _base_name(path: str, folder: Path) -> str:
    """The base's Hub id, or the last part of its path relative to the certificate's folder."""
    if (folder / path).exists():
        return portable_name(str((folder / path).resolve()), short=True)
    return path if re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) else Path(path).name
