"""Two hosts, each a network namespace of its own, and the link between them cut in the middle of training."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_qft.config.load import save_config
from dist_qft.storage.checkpoint import fault_in, list_checkpoints
from tests.support.commands import Command, Finished
from tests.support.fault_ranks import fault_ranks
from tests.support.tiny_model import tiny_config

TIMEOUT_SECONDS = 20
ADDRESSES = ("10.213.0.1", "10.213.0.2")
RANKS = fault_ranks()
ON_EACH = RANKS.count // 2  # ranks of a host


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces that see each other through `wire` and nothing else."""
    names = [f"dist-qft-{os.getpid()}-{host}" for host in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", "wire")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", "wire", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', b'') or error}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def train_on(hosts: list[str], config: Path, meanwhile: Callable[[], None]) -> list[Finished]:
    """Half of the ranks on each host; `meanwhile` happens while they run."""
    common = ["PET_NNODES=2", f"PET_MASTER_ADDR={ADDRESSES[0]}", "PET_MASTER_PORT=29533", "GLOO_SOCKET_IFNAME=wire"]
    starts = [("ip", "netns", "exec", h, "env", *common, f"PET_NODE_RANK={node}") for node, h in enumerate(hosts)]
    with (
        Command("train", config, ranks=ON_EACH, wrapper=starts[0]) as first,
        Command("train", config, ranks=ON_EACH, wrapper=starts[1]) as second,
    ):
        meanwhile()
        return [first.finish(), second.finish()]


def test_a_cut_link_ends_both_hosts_in_time_and_leaves_whole_checkpoints(tiny_llama, tmp_path, hosts):
    sections = {
        "train": {"max_steps": 5000},
        "checkpoint": {"save_steps": 2},
        "sharding": RANKS.sharding(timeout_seconds=TIMEOUT_SECONDS),
    }
    config, run = tmp_path / "run.yaml", tmp_path / "run"
    save_config(tiny_config(tiny_llama, run, **sections), config)
    cut_at = 0.0

    def cut() -> None:
        nonlocal cut_at
        deadline = time.monotonic() + 120
        while not list_checkpoints(run):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        ip("-n", hosts[0], "link", "set", "wire", "down")
        cut_at = time.monotonic()

    ended = train_on(hosts, config, cut)
    seconds = time.monotonic() - cut_at
    for host, done in enumerate(ended):
        assert done.code == 4 and "Traceback" not in done.err, done.err
        told = re.findall(r"error: rank (\d+): step \d+: rank (\d+) does not answer", done.err)
        assert any((int(rank) // ON_EACH, int(lost) // ON_EACH) == (host, 1 - host) for rank, lost in told), done.err
    assert seconds < 3 * TIMEOUT_SECONDS
    saved = list_checkpoints(run)
    assert saved and [fault_in(path) for path in saved] == [None] * len(saved)
