"""A result and its certificate on disk: after a kill at any moment the old pair is there, or the new one."""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dist_qft.errors import CorruptFileError, NumericError, SetupError, UserError
from dist_qft.merge import verify
from dist_qft.merge.certificate import (
    AdapterUsed,
    BaseUsed,
    Certificate,
    ResultFiles,
    WeightFigures,
    certificate_place,
    file_digests,
)
from dist_qft.merge.certificate_file import Publication, publishing_certified, read_certificate
from dist_qft.merge.probe import LogitDifference
from dist_qft.storage import atomic

KILLED = 77
CERTIFICATE = Certificate(
    version=1,
    summary="lossless",
    lossless=True,
    kind="exact",
    target="gguf",
    dtype=None,
    result=ResultFiles("merged.gguf", {}),
    base=BaseUsed("base", "f" * 64),
    adapter=AdapterUsed("checkpoint-1", "a" * 64, "qahira", 1, 2),
    weights=WeightFigures(1e-3),
    logits=LogitDifference(0.0, 0.0, 1.0, 2.0, 2.0),
    notes=[],
    probe=[1, 2, 3],
    versions={},
)


def publish(final: Path, content: str, folder: bool, overwrite: bool = True) -> None:
    with publishing_certified(final, overwrite) as publication:
        temporary = publication.temporary
        if folder:
            temporary.mkdir()
        (temporary / "weights" if folder else temporary).write_text(content)
        files = ResultFiles("." if folder else final.name, file_digests(temporary, final.name))
        publication.certify(replace(CERTIFICATE, result=files, summary=content))


def publish_and_die(final: Path, content: str, folder: bool, moment: int) -> bool:
    """Publish in a child that ends, as by SIGKILL, just before its n-th change of a name; True if it came to that."""
    child = os.fork()
    if child == 0:
        left = moment

        def dying(function):
            def call(*arguments):
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(KILLED)
                return function(*arguments)

            return call

        os.replace, os.rename, atomic._exchange = map(dying, (os.replace, os.rename, atomic._exchange))
        try:
            publish(final, content, folder)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED


def pair(final: Path) -> tuple[str, str] | None:
    """Content and certificate of the result that is there; None if there is none."""
    if not final.exists():
        return None
    place, said = read_certificate(final)
    assert file_digests(place.parent / said.result.path, final.name) == said.result.sha256
    content = (final / "weights" if final.is_dir() else final).read_text()
    return content, said.summary


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "no exchange"])
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("before", [None, "old"], ids=["fresh", "overwrite"])
def test_a_kill_at_any_moment_leaves_the_old_pair_or_the_new_one(tmp_path, monkeypatch, before, folder, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    seen, moment = [], 1
    while True:
        final = tmp_path / str(moment) / ("merged" if folder else "merged.gguf")
        if before:
            publish(final, before, folder)
        killed = publish_and_die(final, "new", folder, moment)
        if not exchange and folder and not final.exists():
            # Without an exchange the old folder steps aside for a moment. The next to write here puts it back.
            with pytest.raises(RuntimeError), atomic.publishing(final, overwrite=True):
                raise RuntimeError
        seen.append(pair(final))
        if not killed:
            break
        moment += 1
    old = (before, before) if before else None
    assert seen[0] == old and seen[-1] == ("new", "new") and set(seen) == {old, ("new", "new")}
    publish(final, "newer", folder)
    assert pair(final) == ("newer", "newer")
    assert not list(final.parent.glob(".tmp-*"))


def test_a_certificate_without_its_file_says_that_the_merge_was_stopped(tmp_path):
    final = tmp_path / "merged.gguf"
    publish(final, "first", folder=False)
    place = certificate_place(final, folder=False)
    place.write_text(json.dumps({"next": json.loads(place.read_text())}))
    assert read_certificate(final)[1].summary == "first"
    final.unlink()
    with pytest.raises(UserError, match="the merge was stopped before it was published"):
        read_certificate(final)


@pytest.mark.parametrize("old", [None, "old"])
def test_a_failure_leaves_the_old_certificate(tmp_path, old, monkeypatch):
    final = tmp_path / "merged.gguf"
    if old:
        publish(final, old, folder=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    replace_file = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: full() if Path(b) == final else replace_file(a, b))
    with pytest.raises(SetupError, match="No space left"):
        publish(final, "new", folder=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_result_that_appeared_meanwhile_keeps_its_certificate(tmp_path):
    final = tmp_path / "merged.gguf"
    theirs = tmp_path / "elsewhere" / final.name
    publish(theirs, "theirs", folder=False)
    with pytest.raises(SetupError, match="has appeared meanwhile"), publishing_certified(final, False) as publication:
        publication.temporary.write_text("mine")
        for file in (theirs, certificate_place(theirs, folder=False)):
            shutil.copyfile(file, tmp_path / file.name)
        publication.certify(replace(CERTIFICATE, summary="mine"), {"merged.gguf.md": "mine"})
    assert pair(final) == ("theirs", "theirs")
    assert not (tmp_path / "merged.gguf.md").exists()


def test_of_two_at_a_time_one_is_whole_and_the_other_is_refused(tmp_path):
    final = tmp_path / "merged.gguf"
    with publishing_certified(final, True) as publication:
        publication.temporary.write_text("first")
        with pytest.raises(UserError, match=r"^merge\.path: '.*merged\.gguf': it is in use by process \d+"):
            publish(final, "second", folder=False)
        files = ResultFiles(final.name, file_digests(publication.temporary, final.name))
        publication.certify(replace(CERTIFICATE, result=files, summary="first"))
    assert pair(final) == ("first", "first")
    publish(final, "second", folder=False)
    assert pair(final) == ("second", "second")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("folder", [False, True])
def test_what_others_wrote_meanwhile_is_not_replaced(tmp_path, folder):
    final = tmp_path / ("merged" if folder else "merged.gguf")
    publish(final, "old", folder)
    with pytest.raises(UserError, match="no merge wrote"), publishing_certified(final, True) as publication:
        publication.temporary.write_text("mine")
        if folder:
            (final / "thesis.tex").write_text("years of work")
        else:
            certificate_place(final, folder=False).unlink()
            final.write_text("theirs")
        before = {path: path.read_bytes() for path in tmp_path.rglob("[!.]*") if path.is_file()}
        publication.certify(replace(CERTIFICATE, summary="mine"), {"merged.gguf.md": "mine"})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_text_beside_comes_back_byte_for_byte(tmp_path):
    final, card = tmp_path / "merged.gguf", tmp_path / "merged.gguf.md"
    card.write_bytes(b"caf\xe9")  # not UTF-8
    with pytest.raises(RuntimeError), publishing_certified(final, True) as publication:
        publication.temporary.write_text("mine")
        publication.certify(replace(CERTIFICATE, summary="mine"), {card.name: "mine"})
        raise RuntimeError
    assert card.read_bytes() == b"caf\xe9" and [path.name for path in tmp_path.iterdir()] == [card.name]


@pytest.mark.parametrize("folder", [True, False])
def test_a_result_is_never_there_without_its_card(tmp_path, folder, monkeypatch):
    final = tmp_path / ("merged" if folder else "merged.gguf")
    card = final / "README.md" if folder else tmp_path / "merged.gguf.md"
    with publishing_certified(final, True) as publication:
        temporary = publication.temporary
        if folder:
            temporary.mkdir()
        (temporary / "weights" if folder else temporary).write_text("x")
        publication.certify(CERTIFICATE, {card.name: "card"})
        assert not final.exists()
        monkeypatch.setattr(Publication, "settle", lambda self: os.listdir(card.parent))  # killed before it
    assert final.exists() and card.read_text() == "card"


def test_every_changed_character_of_a_certificate_is_seen(tmp_path):
    final = tmp_path / "merged.gguf"
    publish(final, "content", folder=False)
    place = certificate_place(final, folder=False)
    text, said = place.read_bytes(), read_certificate(final)[1]
    for index in range(len(text)):
        place.write_bytes(text[:index] + bytes([text[index] ^ 1]) + text[index + 1 :])
        try:
            assert read_certificate(final)[1] == said
        except (CorruptFileError, UserError):
            continue


def test_a_certificate_of_an_earlier_version_has_no_digest(tmp_path):
    final = tmp_path / "merged.gguf"
    publish(final, "content", folder=False)
    certificate_place(final, folder=False).write_text(json.dumps(asdict(CERTIFICATE)))
    assert read_certificate(final)[1] == CERTIFICATE


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("[]", "not a JSON object"),
        ("{", "Expecting property name"),
        ('{"version": 1, "next": 3}', "version|Input should be"),
        ("[" * 100_000, "recursion"),
        ('{"version": 1}', "Field required"),
    ],
)
def test_a_malformed_certificate_is_one_line(tmp_path, content, error):
    (tmp_path / "certificate.json").write_text(content)
    with pytest.raises(CorruptFileError, match=error) as refusal:
        read_certificate(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_certificate_of_another_version_is_named(tmp_path):
    (tmp_path / "certificate.json").write_text('{"version": 2}')
    with pytest.raises(UserError, match="version 2, this program reads 1"):
        read_certificate(tmp_path)


@pytest.mark.parametrize(("section", "key"), [("weights", "max_difference"), ("logits", "maximum")])
def test_figures_that_are_not_numbers_are_never_verified(tmp_path, section, key):
    final = tmp_path / "merged.gguf"
    publish(final, "content", folder=False)
    place = certificate_place(final, folder=False)
    said = json.loads(place.read_text())
    said[section][key] = float("nan")
    del said["digest"]  # as an earlier version would have written it
    place.write_text(json.dumps(said))
    with pytest.raises(NumericError, match="not finite"):
        verify.verify(final, None)


def test_the_json_has_the_keys_that_it_always_had(tmp_path):
    assert list(asdict(CERTIFICATE)) == [
        "version", "summary", "lossless", "kind", "target", "dtype", "result", "base", "adapter", "weights", "logits",
        "notes", "probe", "versions",
    ]  # fmt: skip
    assert list(asdict(CERTIFICATE.weights)) == [
        "max_difference", "mean_difference", "max_float16_steps", "rounding_share_of_update",
    ]  # fmt: skip
