"""What is left behind when a merge dies, when the disk is full, or when somebody else is faster."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_qft.errors import SetupError
from dist_qft.merge.certificate_file import read_certificate
from dist_qft.storage.atomic import publishing

# The product's own command, killed just before its n-th gather or its rename.
KILLED = """
import os, signal, sys

where, count = sys.argv.pop(1).split(":")
calls = 0

def killing(function):
    def call(*arguments, **keywords):
        global calls
        calls += 1
        if calls == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    return call

if where == "gather":
    from dist_qft.sharding.fsdp import FsdpEngine
    FsdpEngine.gather = killing(FsdpEngine.gather)
else:
    os.replace = killing(os.replace)
from dist_qft.cli import main
sys.argv[0] = "dist-qft"
main()
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("moment", ["gather:1", "gather:21", "rename:1", "rename:2"])
def test_a_killed_merge_leaves_nothing_under_the_final_name(gguf_run, tmp_path, moment):
    names = ["merged.gguf", "merged.gguf.certificate.json"]
    command = [sys.executable, "-c", KILLED, moment, "merge", gguf_run, "--to", "gguf", "-o", tmp_path / names[0]]
    killed = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = {path.name for path in tmp_path.iterdir()}
    # The last rename only settles the certificate: the file has its name by then, and one that is its own.
    published = moment == "rename:2"
    assert (names[0] in left, names[1] in left) == (published, published)
    if published:
        assert read_certificate(tmp_path / names[0])[1].target == "gguf"
    assert all(name.startswith(".tmp-merged.gguf") for name in left - set(names))
    for name in names:
        with publishing(tmp_path / name, overwrite=True) as temporary:
            temporary.write_text("the next attempt")
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_full_disk_is_one_line_and_code_3(gguf_run, tmp_path):
    """A file size limit: the kernel refuses the write in the middle of the file, as it does when no space is left."""
    target = tmp_path / "merged.gguf"
    limited = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); from dist_qft.cli import main; main()"
    command = [sys.executable, "-c", limited, "merge", gguf_run, "--to", "gguf", "-o", target]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 3, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"error: {target}: cannot write: File too large (")
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
