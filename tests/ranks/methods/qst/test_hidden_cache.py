"""The base's hidden states on disk: the same training as without, stale and torn entries, and no room."""

import json
import os
import random
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_qft.config.schema import RunConfig
from dist_qft.errors import SetupError
from dist_qft.methods.qst.hidden_cache import CacheLayout, HiddenCache, require_cache_space
from dist_qft.methods.qst.network import BaseStates
from tests.support.qst_models import qst_config
from tests.support.whole_runs import adapter_digest, train

LAYOUT = CacheLayout(depth=3, width=8, out_width=8, pool="none", dtype=torch.bfloat16)
LENGTHS = np.array([5, 9, 2])
CPU = torch.device("cpu")


def open_cache(folder: Path, rank: int = 0, **changes: str) -> HiddenCache:
    states_of = {"base": "b", "settings": "s", "data": "d", **changes}
    return HiddenCache(folder, LAYOUT, LENGTHS, rank=rank, states_of=states_of)


def random_states(rows: int, length: int) -> BaseStates:
    generator = torch.Generator().manual_seed(rows)
    layers = [torch.randn(rows, length, 8, generator=generator).bfloat16() for _ in range(3)]
    return BaseStates(layers, torch.randn(rows, length, 8, generator=generator).bfloat16())


def assert_row(cache: HiddenCache, row: int, states: BaseStates, place: int) -> None:
    found, tokens = cache.read([row], (1, 16), CPU), LENGTHS[row]
    for own, given in zip([*found.layers, found.last], [*states.layers, states.last], strict=True):
        assert torch.equal(own[0, :tokens], given[place, :tokens])
        assert not own[0, tokens:].any()


def test_rows_come_back_bit_for_bit_in_another_process_or_order(tmp_path):
    cache, states = open_cache(tmp_path), random_states(2, 16)
    cache.write([2, 0], states)
    assert [cache.has(row) for row in range(3)] == [True, False, True]
    again = open_cache(tmp_path)
    assert again.filled == 2
    assert [again.has(row) for row in range(3)] == [True, False, True]
    assert_row(again, 2, states, 0)
    assert_row(again, 0, states, 1)


def test_what_is_there_is_not_written_again(tmp_path):
    cache, states = open_cache(tmp_path), random_states(1, 16)
    cache.write([1], states)
    cache.write([1], random_states(3, 16))
    assert_row(cache, 1, states, 0)


@pytest.mark.parametrize("position", [0, 100, -1])
def test_a_torn_row_is_not_there_and_can_be_written_anew(tmp_path, position):
    states = random_states(1, 16)
    open_cache(tmp_path).write([1], states)
    path = tmp_path / "states-0.bin"
    size = 9 * LAYOUT.per_token * 2
    assert path.stat().st_size == size
    with open(path, "r+b") as file:
        file.seek(position % size)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
    cache = open_cache(tmp_path)
    assert not cache.has(1)
    cache.write([1], states)
    assert_row(open_cache(tmp_path), 1, states, 0)


def test_every_bit_that_flips_under_a_running_process_is_seen(tmp_path):
    """The row is read from the disk at each use, long after the first one."""
    states = random_states(1, 16)
    cache = open_cache(tmp_path)
    cache.write([1], states)
    size = 9 * LAYOUT.per_token * 2
    for bit in random.Random(0).sample(range(8 * size), 200):
        assert cache.has(1)
        with open(tmp_path / "states-0.bin", "r+b") as file:
            file.seek(bit // 8 - size, os.SEEK_END)  # what is written anew stands behind what was there
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1 << bit % 8]))
        assert not cache.has(1), bit
        cache.write([1], states)
    assert_row(cache, 1, states, 0)


@pytest.mark.parametrize("change", [{"base": "other"}, {"settings": "other"}, {"data": "other"}])
def test_a_cache_of_something_else_is_discarded(tmp_path, change):
    open_cache(tmp_path).write([0], random_states(1, 16))
    assert open_cache(tmp_path).filled == 1
    assert open_cache(tmp_path, **change).filled == 0
    assert open_cache(tmp_path).filled == 0


def test_no_room(tmp_path):
    with pytest.raises(SetupError) as refusal:
        require_cache_space(tmp_path / "run" / "hidden_cache", 2**60)
    assert refusal.value.exit_code == 3
    text = str(refusal.value)
    assert text.startswith(f"method.cache: needs 1,073,741,824.0 GiB in '{tmp_path}/run/hidden_cache', ")
    assert "\n" not in text
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_full_ends_the_write_in_one_line_and_leaves_no_half_row(tmp_path):
    """The limit on a file's size stands for the disk's: the system refuses a write in the same way."""
    cache, states = open_cache(tmp_path), random_states(1, 16)
    cache.write([2], states)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "states-0.bin").stat().st_size + 100, limits[1]))
    try:
        with pytest.raises(SetupError) as refusal:
            cache.write([1], states)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    text = str(refusal.value)
    assert text.startswith(
        f"method.cache: cannot write '{tmp_path}/states-0.bin': File too large; the cache needs 0.0 GiB "
    )
    assert "\n" not in text
    for again in (cache, open_cache(tmp_path)):
        assert [again.has(row) for row in range(3)] == [False, False, True]
        assert_row(again, 2, states, 0)
    cache.write([1], states)  # there is room again
    assert_row(open_cache(tmp_path), 1, states, 0)


def test_ranks_write_files_of_their_own_and_see_at_once_what_the_others_wrote(tmp_path):
    first, second, states = open_cache(tmp_path, 0), open_cache(tmp_path, 1), random_states(3, 16)
    assert not second.has(0)
    first.write([0], states)
    assert second.has(0)
    assert_row(second, 0, states, 0)
    second.write([0, 1], states)  # row 0 is there already
    assert first.has(1)
    assert_row(first, 1, states, 1)
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("states-*.bin")}
    assert sizes == {f"states-{rank}.bin": 2 * int(LENGTHS[rank]) * LAYOUT.per_token for rank in (0, 1)}


def test_a_row_that_is_damaged_in_one_rank_s_file_is_found_in_that_of_another(tmp_path):
    first, second, states = open_cache(tmp_path, 0), open_cache(tmp_path, 1), random_states(1, 16)
    first.write([1], states)
    assert second.has(1)
    (tmp_path / "states-0.bin").write_bytes(bytes(9 * LAYOUT.per_token * 2))
    assert not second.has(1)
    second.write([1], states)
    assert first.has(1)
    assert_row(first, 1, states, 0)


@pytest.mark.parametrize("cut", [1, 8, 23])
def test_a_record_that_is_cut_off_stays_without_effect(tmp_path, cut):
    cache, states = open_cache(tmp_path), random_states(2, 16)
    cache.write([0, 1], states)
    rows = tmp_path / "rows-0.bin"
    rows.write_bytes(rows.read_bytes()[:-cut])
    again = open_cache(tmp_path)
    assert [again.has(row) for row in range(3)] == [True, False, False]
    again.write([2, 1], states)
    for cache in (again, open_cache(tmp_path, 3)):
        assert [cache.has(row) for row in range(3)] == [True, True, True]
        assert_row(cache, 2, states, 0)
        assert_row(cache, 1, states, 1)


def test_files_of_an_older_version_are_removed(tmp_path):
    for name in ("states.bin", "index.bin"):
        (tmp_path / name).write_bytes(bytes(100))
    (tmp_path / "cache.json").write_text(json.dumps({"version": 1, "base": "b", "data": "d"}))
    assert open_cache(tmp_path).filled == 0
    assert sorted(path.name for path in tmp_path.glob("*.bin")) == []


def epochs_config(model: Path, folder: Path, cache: str, **sections: dict) -> RunConfig:
    """60 rows in steps of 8 over more than 2 epochs, so that steps straddle epochs."""
    method = {"cache": cache, **sections.pop("method", {})}
    return qst_config(model, folder, train={"max_steps": 17, **sections.pop("train", {})}, method=method, **sections)


def losses_and_gathers(config: RunConfig, resume: str | None = None) -> tuple[list[float], list[int]]:
    """Loss of each step, and bytes of the base that its training gathered."""
    train(config, resume)
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "train/loss" in line]
    return [step["train/loss"] for step in steps], [int(step["traffic/gathered_bytes"]) for step in steps]


@pytest.mark.parametrize("downsample", ["adapter", "avgpool"])
def test_training_from_the_cache_is_training(pools, tiny_llama, tmp_path, downsample):
    rank = {"downsample": downsample} | ({} if downsample == "adapter" else {"downsample_rank": None})
    plain = epochs_config(tiny_llama, tmp_path / "plain", "none", method=rank)
    cached = epochs_config(tiny_llama, tmp_path / "cached", "disk", method=rank)
    expected, _ = pools[2].run(losses_and_gathers, config=plain)[0]
    losses, gathered = pools[2].run(losses_and_gathers, config=cached)[0]
    assert losses == pytest.approx(expected, rel=1e-5)
    # 60 rows are 7.5 steps: the eighth still needs the base, the ninth gathers the head for the last time.
    assert len(set(gathered[:8])) == 1
    assert 0 < gathered[8] < gathered[0]
    assert gathered[9:] == [0] * 8


def test_another_world_reads_what_this_one_wrote_and_a_torn_row_runs_the_base_again(pools, tiny_llama, tmp_path):
    config = epochs_config(tiny_llama, tmp_path / "run", "disk")
    expected, _ = pools[2].run(losses_and_gathers, config=config)[0]
    states = tmp_path / "run" / "hidden_cache" / "states-1.bin"
    with open(states, "r+b") as file:
        file.seek(states.stat().st_size // 2)
        file.write(b"torn")
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        checkpoint.rename(tmp_path / checkpoint.name)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    losses, gathered = pools[4].run(losses_and_gathers, config=epochs_config(tiny_llama, tmp_path / "run", "disk"))[0]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert sum(amount > gathered[-1] for amount in gathered) <= 2  # the head's gather, and the torn row's step


def test_states_of_a_base_with_other_settings_are_not_used(pools, tiny_llama, tmp_path):
    """Its weights are the same, and so is their fingerprint."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = epochs_config(model, tmp_path / "run", "disk", train={"max_steps": 9})
    _, gathered = pools[2].run(losses_and_gathers, config=config)[0]
    shutil.rmtree(tmp_path / "run" / "checkpoint-9")
    _, again = pools[2].run(losses_and_gathers, config=config)[0]
    assert again[-1] < gathered[0] and max(again[1:]) < gathered[0], "all rows are there"
    shutil.rmtree(tmp_path / "run" / "checkpoint-9")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.5}))
    assert pools[2].run(losses_and_gathers, config=config)[0][1] == gathered


def test_resume_in_the_middle_of_an_epoch_is_exact(pools, tiny_llama, tmp_path):
    def config(name: str, steps: int) -> RunConfig:
        return epochs_config(tiny_llama, tmp_path / name, "disk", train={"max_steps": steps})

    pools[2].run(losses_and_gathers, config=config("whole", 14))
    for steps in (4, 11, 14):  # inside the first epoch, inside the second
        pools[2].run(losses_and_gathers, config=config("parts", steps), resume="auto")
    assert adapter_digest(tmp_path / "whole") == adapter_digest(tmp_path / "parts")
