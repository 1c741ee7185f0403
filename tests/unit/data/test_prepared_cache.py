"""The cache of tokenized data: one process builds an entry, the others wait for it aloud or need no lock."""

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


def test_a_start_that_waits_says_for_whom_and_not_for_ever(run, corpus, tmp_path, monkeypatch, capsys):
    path = corpus([{"text": "Hello there"}])
    run(path)
    cache = tmp_path / "cache" / "tokens"
    (entry,) = cache.iterdir()
    (cache / "nobody's.building").touch()  # it is not in the way
    assert run(path).train.counts["kept"] == 1
    entry.unlink()
    monkeypatch.setattr(lock, "_TELL_SECONDS", 0.0)
    monkeypatch.setattr(prepare_module, "_LOCK_SECONDS", 0.6)
    with FolderLock.acquire(cache / f"{entry.name.partition('-')[0]}.building", "a test"):
        with pytest.raises(SetupError, match=r"^data\.cache_dir: '.*': it is in use by process \d+ on "):
            run(path)
        assert capsys.readouterr().err.count("data.cache_dir: ") == 1
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("LOCAL_RANK", "1")
        with pytest.raises(SetupError):
            run(path)
        assert capsys.readouterr().err == ""
    assert run(path).train.counts["kept"] == 1


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
