"""`sharding.group`: several whole bases in one run, each over some of the ranks, change neither results nor files."""

import os
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig, QuantizationConfig, RunConfig
from dist_qft.errors import UserError
from dist_qft.plan import make_plan
from dist_qft.ranks.world import World
from dist_qft.sharding.engines import make_engine
from dist_qft.storage.manifest import sha256_of
from dist_qft.train import gather_inputs
from dist_qft.training.metrics_file import read_history
from dist_qft.tuned_model.assemble import materialize
from tests.support.merges import GGUF_RUN, merge_run, write_random_adapters
from tests.support.tiny_model import save_tiny_model, tiny_config, tiny_llama_config
from tests.support.whole_runs import adapter_digest, train

CPU = torch.device("cpu")
STEPS = 4


@dataclass(frozen=True)
class Found:
    """The report of one rank on its run."""

    losses: list[float]
    gathered_bytes: int
    resident_bytes: int


def run_and_count(config: RunConfig, resume: str | None = None) -> Found:
    """Train, and merge at the end; the bytes are those of the training steps alone."""
    run = train(config, resume)
    losses = [record.loss for record in read_history(Path(config.output_dir))]
    return Found(losses, run.meter.gathered_bytes_per_step, run.parts.engine.resident_bytes())


def config_of(model: Path, folder: Path, **sharding: object) -> RunConfig:
    return tiny_config(
        model,
        folder / "run",
        quantization={"linear": "affine4", "block": [1, 32]},
        method={"name": "qahira", "pool": 32, "repeat": 1, "rank": 4},
        train={"max_steps": STEPS, "per_device_train_batch_size": 1},
        checkpoint={"save_steps": 2, "save_total_limit": 9},
        sharding={"device": "cpu", "gradient_sum": "invariant", **sharding},
        merge={"at_end": "gguf"},
    )


@pytest.fixture(scope="module")
def flat(pools, tiny_gguf, tmp_path_factory):
    """The same run with one base over all four ranks: its config and what each rank found."""
    config = config_of(tiny_gguf, tmp_path_factory.mktemp("flat"))
    return config, pools[4].run(run_and_count, config=config)


@pytest.mark.parametrize(("engine", "resumed"), [("fsdp", False), ("zero", True)])
def test_two_bases_of_two_ranks_each_give_the_same_bits(pools, tiny_gguf, tmp_path, flat, engine, resumed):
    of_flat, whole = flat
    config = config_of(tiny_gguf, tmp_path, engine=engine, group=2)
    resume = f"{of_flat.output_dir}/checkpoint-2" if resumed else None
    found = pools[4].run(run_and_count, config=config, resume=resume)
    assert found[0].losses == whole[0].losses[2 if resumed else 0 :]
    assert adapter_digest(config.output_dir) == adapter_digest(of_flat.output_dir)
    merged, expected = (Path(each.output_dir) / "merged.gguf" for each in (config, of_flat))
    assert sha256_of(merged) == sha256_of(expected)
    plan = make_plan(config, world_size=4, ranks_per_node=2)
    assert {each.gathered_bytes for each in found} == {plan.gather_bytes_per_step}
    assert max(each.resident_bytes for each in found) == plan.base_bytes_per_rank
    assert plan.between_nodes["gather_bytes_per_step"] == 0
    across = make_plan(of_flat, world_size=4, ranks_per_node=2)
    assert across.between_nodes["gather_bytes_per_step"] == whole[0].gathered_bytes


def test_a_run_of_groups_that_do_not_divide_this_world_is_opened_all_the_same(pools, shell, tiny_gguf, tmp_path):
    """The bytes of a merge are those on the ranks that trained; a number that is given now is refused as ever."""
    config = tiny_config(tiny_gguf, tmp_path / "run", **GGUF_RUN, sharding={"device": "cpu", "group": 4})
    checkpoint, merged = pools[4].run(write_random_adapters, config=config)[0], tmp_path / "merged.gguf"
    pools[4].run(merge_run, source=checkpoint, target="gguf", path=merged)
    code, _, err = shell("merge", config.output_dir, "--to", "gguf")
    assert (code, err) == (0, "")
    assert (Path(config.output_dir) / "merged.gguf").read_bytes() == merged.read_bytes()
    words = ("eval", config.output_dir, "data.eval_samples=4")
    for found in (shell("generate", config.output_dir, "--prompt", "Say cat", "--max-new-tokens", 2), shell(*words)):
        assert found[0] == 0, found[2]
    code, _, err = shell(*words, "sharding.group=4")
    assert (code, err.splitlines()[-1]) == (2, "error: sharding.group: got 4, must divide the 1 ranks of the run")


def refusals(mine: Path, others: Path) -> list[str]:
    """Loading on two nodes of two ranks with a base each: first with the ranks dealt out in turn, then, in
    the usual order, with other weights on the second node."""
    rank, found = dist.get_rank(), []
    for local_rank, path in ((rank // 2, mine), (rank % 2, mine if rank < 2 else others)):
        place = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "node1", "MASTER_PORT": 29500}
        model = ModelConfig(path=str(path))
        base = build_skeleton(model, QuantizationConfig(linear="affine4", block=[8, 4]), torch.float32)
        with patch.dict(os.environ, {name: str(value) for name, value in place.items()}):
            try:
                materialize(base, open_source(model), make_engine("fsdp", group="node"), CPU)
            except UserError as error:
                found.append(f"{error.everywhere} {error}")
    return found


def test_ranks_out_of_order_and_groups_with_different_weights_are_named(pools, tmp_path):
    one = save_tiny_model(tmp_path / "one", tiny_llama_config(num_hidden_layers=1))
    other = save_tiny_model(tmp_path / "other", tiny_llama_config(num_hidden_layers=1, initializer_range=0.03))
    order = "order on their node, which sharding.group: node needs: rank 1, 2 differs from rank 0"
    weights = "weights of the base: rank 2, 3 differs from rank 0"
    expected = [f"True ranks were started with different {what}" for what in (order, weights)]
    assert pools[4].run(refusals, mine=one, others=other) == [expected] * 4


def test_the_automatic_group_is_chosen_before_the_base_is_loaded(tiny_gguf, tmp_path):
    """On a machine that has room for the small base many times: one rank each, and ranks that differ are refused."""
    config = config_of(tiny_gguf, tmp_path, group="auto")
    inputs = gather_inputs(config, None, World(0, 4, 0, 4, "127.0.0.1", 0, "environment"), CPU)
    assert (inputs.shard_group, inputs.placed().sharding.group, inputs.config.sharding.group) == (1, 1, "auto")
    assert inputs.must_match()["choice of sharding.group: auto"] == "1"
    told = [note for note in inputs.notes if note.startswith("sharding.group: auto took 1 of 4 ranks, the fewest")]
    assert len(told) == 1
