"""The cache of tokenized data: one process builds an entry, the others wait for it aloud or need no lock."""

from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from dist_qft.config.data_schema import DataConfig, DatasetConfig
from dist_qft.data import prepare as prepare_module
from dist_qft.data.prepare import prepare
from dist_qft.errors import SetupError, UserError
from dist_qft.storage import lock
from dist_qft.storage.lock import FolderLock


def test_failed_build_lets_the_next_one_in(run, corpus, tmp_path):
    path = corpus([{"input_ids": [1]}])
    with pytest.raises(UserError) as caught:  # keeps the traceback, and with it the frame that held the lock
        run(path)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    assert caught.value.exit_code == 2


def test_a_start_waits_for_as_long_as_another_builds_and_says_so_again(run, corpus, tmp_path, monkeypatch, capsys):
    path = corpus([{"text": "Hello there"}])
    run(path)
    cache = tmp_path / "cache" / "tokens"
    (entry,) = cache.iterdir()
    (cache / "nobody's.building").touch()  # it is not in the way
    assert run(path).train.counts["kept"] == 1
    monkeypatch.setattr(lock, "_TELL_SECONDS", 0.0)
    monkeypatch.setattr(lock, "_TELL_AGAIN_SECONDS", 1.0)
    for rank in "01":
        entry.unlink()
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        with ThreadPoolExecutor(1) as pool:
            with FolderLock.acquire(cache / f"{entry.name.partition('-')[0]}.building", "a test"):
                start = pool.submit(run, path)
                assert not wait([start], timeout=4).done
                told = capsys.readouterr().err
            assert start.result(timeout=60).train.counts["kept"] == 1
        lines = told.count("\n")
        assert told.count("data.cache_dir: ") == told.count(": waiting for process ") == lines
        assert lines > 1 if rank == "0" else lines == 0


def test_what_is_cached_needs_no_folder_that_can_be_written(run, corpus, tmp_path, monkeypatch):
    path = corpus([{"text": "Hello there"}])
    first = run(path)

    def refuse(*arguments: object, **words: object) -> None:
        raise AssertionError("no lock is needed")

    monkeypatch.setattr(prepare_module, "locked", refuse)
    assert run(path).train.digest == first.train.digest


def test_cache_folder_that_cannot_be_made(corpus, tmp_path, chatml):
    blocker = tmp_path / "file"
    blocker.write_text("")
    data = DataConfig(train=DatasetConfig(path=corpus([{"text": "Hello there"}])))
    with pytest.raises(SetupError) as caught:
        prepare(data, chatml, 330, blocker / "cache")
    assert str(caught.value) == f"data.cache_dir: cannot write to '{blocker / 'cache'}': Not a directory"


def test_a_process_that_hangs_while_it_builds_is_not_waited_for_for_ever(run, corpus, tmp_path, monkeypatch):
    path = corpus([{"text": "Hello there"}])
    run(path)
    (entry,) = (tmp_path / "cache" / "tokens").iterdir()
    entry.unlink()
    monkeypatch.setattr(prepare_module, "_SILENT_SECONDS", 1.0)
    with (
        FolderLock.acquire(entry.with_name(f"{entry.name.partition('-')[0]}.building"), "a test"),  # beats every 10 s
        pytest.raises(
            SetupError, match=r"^data\.cache_dir: '.*': it is in use by process \d+ on .*without a sign of life"
        ),
    ):
        run(path)
