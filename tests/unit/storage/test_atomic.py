"""Temporaries of the living stay, those of the dead go, and nothing that is not ours is touched."""

import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_qft.errors import SetupError
from dist_qft.storage import atomic
from dist_qft.storage.atomic import json_text, publishing, remove_leftovers, temporary_name, write_json
from dist_qft.storage.checkpoint import clean_up
from dist_qft.storage.owner import Owner, machine_hash

TOKEN = "import sys; from dist_qft.storage.owner import Owner; print(Owner.current(), flush=True); sys.stdin.read()"


@pytest.fixture
def neighbour():
    """Another process of this machine, and how it names itself."""
    process = subprocess.Popen([sys.executable, "-c", TOKEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process, process.stdout.readline().strip()
    process.kill()
    process.wait()


def elsewhere() -> Owner:
    """A process of another machine."""
    return Owner("0" * 8, "0" * 8, 1, 1)


def test_an_owner_is_alive_until_it_has_ended(neighbour):
    process, token = neighbour
    owner = Owner.parse(token)
    assert (owner.pid, owner.is_alive()) == (process.pid, True)
    assert Owner.current().is_alive() and Owner.parse(str(Owner.current())) == Owner.current()
    process.kill()
    deadline = time.monotonic() + 10
    while owner.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert owner.is_alive() is False, "a zombie has ended"
    process.wait()
    assert owner.is_alive() is False
    assert elsewhere().is_alive() is None, "nobody can look into another machine"
    mine = Owner.current()
    assert Owner(mine.machine, mine.boot, mine.pid, mine.started + 1).is_alive() is False, "a reused process id"
    assert Owner(mine.machine, "f" * 8, mine.pid, mine.started).is_alive() is False, "before the last boot"


HOST = 0xEFFFFFFC  # the process namespace outside containers
ID, OTHER_ID = "a" * 32, "b" * 32


@pytest.mark.parametrize(
    ("first", "second", "known"),
    [
        ((HOST, ID, ["02:00"], "boot 1"), (HOST, ID, ["02:00"], "boot 2"), True),  # a reboot
        ((HOST, ID, ["02:00"], "boot 1"), (HOST, OTHER_ID, ["02:00"], "boot 2"), False),  # another of that host name
        ((HOST, ID, ["02:00"], "boot 1"), (HOST, ID, ["02:01"], "boot 2"), False),  # a clone
        ((HOST, "", ["02:00"], "boot 1"), (HOST, "", ["02:00"], "boot 2"), False),  # nothing to tell by
        ((HOST, "uninitialized", [], "boot 1"), (HOST, "uninitialized", [], "boot 2"), False),
        (
            (4026532201, ID, ["02:00"], "boot 1"),
            (4026532201, ID, ["02:00"], "boot 2"),
            False,
        ),  # containers of one image
        ((4026532201, "", ["02:00"], "boot 1"), (4026532201, "", ["02:00"], "boot 1"), True),  # one container
        ((4026532201, "", [], "boot 1"), (4026532202, "", [], "boot 1"), False),  # two of one host
        ((None, "", [], ""), (None, "", [], ""), True),  # no Linux
    ],
)
def test_a_machine_is_known_again_only_where_it_is_certain(first, second, known):
    """Of an unknown machine no process counts as dead at once."""
    assert (machine_hash("localhost", *first) == machine_hash("localhost", *second)) is known


def test_an_owner_that_an_earlier_version_wrote_down_is_unknown():
    mine = Owner.current()
    namespace = os.stat("/proc/self/ns/pid").st_ino if Path("/proc/self/ns/pid").exists() else ""
    machine = hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]
    before = Owner.parse(str(Owner(machine, "f" * 8, mine.pid, mine.started)))
    assert before is not None and before.is_alive() is None


def leave(folder: Path, name: str, owner: str, *, suffix: str = "") -> Path:
    path = folder / f".tmp-{name}-{owner}-0123abcd{suffix}"
    path.mkdir()
    (path / "part").write_text("x")
    return path


def test_only_leftovers_of_the_dead_go(tmp_path, neighbour):
    process, token = neighbour
    mine = Owner.current()
    dead = Owner(mine.machine, mine.boot, mine.pid, mine.started + 1)
    kept = [
        leave(tmp_path, "merged-dense", token),
        leave(tmp_path, "merged-dense", str(mine)),
        leave(tmp_path, "merged-dense", str(elsewhere())),
        tmp_path / ".tmp-precious",
        tmp_path / ".tmp-precious-0123abcd",
        tmp_path / ".tmp-merged-dense-0123456789abcdef-1",
    ]
    for path in kept[3:]:
        path.mkdir()
        (path / "thesis.tex").write_text("years of work")
    file = tmp_path / f".tmp-merged.gguf-{dead}-0123abcd"
    file.write_text("half a model")
    gone = [leave(tmp_path, "merged-dense", str(dead)), file, leave(tmp_path, "merged-peft", str(elsewhere()))]
    os.utime(gone[-1], (0, time.time() - 2 * 24 * 3600))
    remove_leftovers(tmp_path)
    assert [path.exists() for path in gone] == [False] * 3
    assert [path.exists() for path in kept] == [True] * 6
    process.kill()
    process.wait()
    remove_leftovers(tmp_path)
    assert [path.exists() for path in kept] == [False, *[True] * 5]


def test_an_unfinished_checkpoint_goes_whoever_wrote_it(tmp_path):
    """Whoever cleans up holds the folder's lock, and checkpoints are written under it alone."""
    gone = [leave(tmp_path, "checkpoint-6", str(elsewhere())), tmp_path / ".tmp-checkpoint-6-0123abcd"]
    gone[1].mkdir()
    kept = tmp_path / ".tmp-checkpoint-notes-0123abcd"
    kept.mkdir()
    clean_up(tmp_path)
    assert [path.exists() for path in (*gone, kept)] == [False, False, True]


def test_an_old_folder_whose_replacement_died_gets_its_name_back(tmp_path):
    mine = Owner.current()
    dead = str(Owner(mine.machine, mine.boot, mine.pid, mine.started + 1))
    old = leave(tmp_path, "result", dead, suffix="-replaced")
    new = leave(tmp_path, "result", dead)
    remove_leftovers(tmp_path, "result")
    assert (tmp_path / "result" / "part").exists() and not old.exists() and not new.exists()
    late = leave(tmp_path, "result", dead, suffix="-replaced")
    remove_leftovers(tmp_path, "result")
    assert (tmp_path / "result").exists() and not late.exists(), "the new one was in place already"


def test_two_writers_of_one_name_do_not_disturb_each_other(tmp_path):
    final = tmp_path / "result"
    message = f"{final}: it has appeared meanwhile; nothing was replaced"
    with pytest.raises(SetupError, match=message), publishing(final, overwrite=False) as first:
        first.write_text("first")
        with publishing(final, overwrite=False) as second:
            second.write_text("second")
        assert first.read_text() == "first"
    assert final.read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize("exchange", [True, False])
def test_of_a_link_the_name_alone_is_replaced(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    kept, link = tmp_path / "kept", tmp_path / "link"
    kept.mkdir()
    (kept / "thesis.tex").write_text("years of work")
    link.symlink_to(kept)
    with publishing(link, overwrite=True) as temporary:
        temporary.mkdir()
    assert not link.is_symlink() and not list(link.iterdir())
    assert (kept / "thesis.tex").exists() and {path.name for path in tmp_path.iterdir()} == {"kept", "link"}


def test_names_of_any_length_can_be_published(tmp_path):
    for name in ("x" * 255, "ä" * 127):
        with publishing(tmp_path / name, overwrite=True) as temporary:
            temporary.write_text("content")
        assert (tmp_path / name).read_text() == "content"


def test_results_are_as_public_as_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        with publishing(tmp_path / "folder", overwrite=True) as temporary:
            temporary.mkdir()
            private = os.open(temporary / "file", os.O_CREAT | os.O_WRONLY, 0o600)  # as safetensors' own writer does
            os.close(private)
    finally:
        os.umask(before)
    assert (tmp_path / "folder" / "file").stat().st_mode & 0o777 == 0o640


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": math.nan, "b": [1.5, -math.inf], "c": {"d": (math.inf, None, "NaN", True)}})
    strict = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict == {"a": None, "b": [1.5, None], "c": {"d": [None, None, "NaN", True]}}
    assert json_text({"a": 0.1 + 0.2}, indent=None) == '{"a": 0.30000000000000004}\n'


def test_temporary_names_are_new_each_time(tmp_path):
    assert len({temporary_name(tmp_path / "a") for _ in range(50)}) == 50
    shutil.rmtree(tmp_path)
