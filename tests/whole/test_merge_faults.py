"""The files left behind when a merge dies, when the disk is full, or when somebody else is faster."""

import errno
import itertools
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from dist_qft.cli import main
from dist_qft.errors import SetupError
from dist_qft.merge.certificate_file import read_certificate
from dist_qft.sharding.fsdp import FsdpEngine
from dist_qft.storage.atomic import publishing


def in_a_fork(harm: Callable[[], None], *words: object) -> tuple[int, str]:
    """Wait status and standard error of the command in a child, which has imported everything, after `harm` there."""
    with tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(errors.fileno(), 2)
                sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
                sys.argv = ["dist-qft", *map(str, words)]
                harm()
                main()
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        return status, errors.read()


def killing(owner: Any, name: str, count: int) -> None:
    """Let a function kill its process just before its `count`-th call does anything."""
    function, calls = getattr(owner, name), itertools.count(1)

    def call(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)

    setattr(owner, name, call)


def no_room() -> None:
    """Let files have 60 kB: the kernel refuses the write in the middle of the file, as when no space is left."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [(FsdpEngine, "gather", 1), (FsdpEngine, "gather", 21), (os, "replace", 3), (os, "replace", 4)],
)
def test_a_killed_merge_leaves_nothing_under_the_final_name(gguf_run, tmp_path, owner, name, count):
    names = ["merged.gguf", "merged.gguf.certificate.json"]
    cards = ["merged.gguf.Modelfile", "merged.gguf.md"]  # which are there before the result
    words = ["merge", gguf_run, "--to", "gguf", "-o", tmp_path / names[0]]
    status, errors = in_a_fork(lambda: killing(owner, name, count), *words)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, errors
    left = {path.name for path in tmp_path.iterdir()}
    # The last rename only settles the certificate: the file has its name by then, and one that is its own.
    published = (name, count) == ("replace", 4)
    assert set(cards) & left == (set(cards) if name == "replace" else set())
    assert (names[0] in left, names[1] in left) == (published, published)
    if published:
        assert read_certificate(tmp_path / names[0])[1].target == "gguf"
    lock = ".merged.gguf.lock"  # of a dead process: the next merge takes it over
    assert all(name.startswith(".tmp-merged.gguf") for name in left - {*names, *cards, lock})
    for name in names:
        with publishing(tmp_path / name, overwrite=True) as temporary:
            temporary.write_text("the next attempt")
    assert {path.name for path in tmp_path.iterdir()} - {*cards, lock} == set(names)


def test_a_full_disk_is_one_line_and_code_3(gguf_run, tmp_path):
    target = tmp_path / "merged.gguf"
    status, errors = in_a_fork(no_room, "merge", gguf_run, "--to", "gguf", "-o", target)
    assert os.waitstatus_to_exitcode(status) == 3, errors
    assert len(errors.splitlines()) == 1
    assert errors.startswith(f"error: {target}: cannot write: File too large (")
    assert list(tmp_path.iterdir()) == []


def test_what_fails_while_writing_removes_what_was_written(tmp_path):
    message = r"out/result: cannot write: No space left on device \(\d+ bytes are free\)$"
    with (
        pytest.raises(SetupError, match=message),
        publishing(tmp_path / "out" / "result", overwrite=False) as temporary,
    ):
        temporary.mkdir()
        (temporary / "part").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_result_that_appeared_meanwhile_is_kept(tmp_path):
    target = tmp_path / "result"
    with (
        pytest.raises(SetupError, match=r"has appeared meanwhile; nothing was replaced$"),
        publishing(target, overwrite=False) as temporary,
    ):
        temporary.write_text("mine")
        target.write_text("theirs")
    assert target.read_text() == "theirs" and len(list(tmp_path.iterdir())) == 1


def test_overwriting_replaces_files_and_folders_whole(tmp_path):
    target = tmp_path / "result"
    for content in ("first", "second"):
        with publishing(target, overwrite=True) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [path.name for path in target.iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
