"""A run as a whole: what it leaves behind, and what a number gone wrong does to it."""

import gc
import json
import math
import re
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import Lfm2Config

from dist_qft.config.load import CONFIG_FILE, load_config
from dist_qft.storage.checkpoint import fault_in, list_checkpoints, read_checkpoint
from dist_qft.training.flat_parameters import FlatParameters
from dist_qft.training.summary import SUMMARY_FILE
from dist_qft.training.training_run import TrainingRun
from tests.support.outcomes import Outcome, attempt
from tests.support.rank_pool import RankPool
from tests.support.tiny_model import VOCABULARY, save_tiny_model, tiny_config
from tests.support.whole_runs import adapter_digest, train, train_only


def read_summary(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / SUMMARY_FILE).read_text())


def spoil_gradient(run: TrainingRun, rank: int, step: int, value: float) -> None:
    """One element of one gradient of one rank becomes `value` at one step."""
    _, parameter = run.parts.trainables.named_tensors()[5]

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        if (run.world.rank, run.state.step + 1) == (rank, step):
            gradient = gradient.clone()
            gradient.view(-1)[3] = value
        return gradient

    parameter.register_hook(spoil)


def disturb_replica(run: TrainingRun) -> None:
    """One bit of one value of rank 1 flips, at its third step."""
    _, parameter = run.parts.trainables.named_tensors()[7]

    def flip(_: torch.Tensor) -> None:
        if (run.world.rank, run.state.step + 1) == (1, 3):
            parameter.data.view(torch.int32).view(-1)[0] ^= 1 << 20  # not so low that rounding could heal it
            handle.remove()  # once: a step has several backward passes

    handle = parameter.register_hook(flip)


@pytest.fixture(scope="module")
def undisturbed(pools, tiny_llama, tmp_path_factory) -> tuple[Path, list[Outcome]]:
    config = tiny_config(tiny_llama, tmp_path_factory.mktemp("undisturbed") / "run", train={"max_steps": 6})
    return Path(config.output_dir), pools[2].run(attempt, config=config)


def left_behind(config) -> tuple[int, int]:
    """Live `FlatParameters`, and threads that serve process groups, before and after a run."""

    def count() -> int:
        gc.collect()
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        return sum(isinstance(each, FlatParameters) for each in gc.get_objects()) + names.count("gloo_tcp_loop")

    before = count()
    train(config)
    return before, count()


def test_runs_leave_no_buffer_and_no_process_group_behind(tiny_llama, tmp_path):
    """A study does dozens of runs in one process. Ranks of their own: other tests leave groups in theirs."""
    with closing(RankPool(1)) as pool:
        for engine in ("fsdp", "zero", "replicated"):
            first, second = (
                tiny_config(tiny_llama, tmp_path / f"{engine}-{turn}" / "run", sharding={"engine": engine})
                for turn in ("first", "second")
            )
            pool.run(train_only, config=first)  # what the first run of an engine makes once
            [(before, after)] = pool.run(left_behind, config=second)
            assert after == before, engine


def test_packing_is_refused_for_a_family_that_carries_a_state_from_sample_to_sample(pools, tmp_path):
    layers = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    model = save_tiny_model(tmp_path / "lfm2", Lfm2Config(**sizes, **heads, **layers))
    config = tiny_config(model, tmp_path / "run", data={"packing": True})
    outcomes = pools[2].run(attempt, config=config)
    text = "data.packing: model type 'lfm2' cannot keep packed samples apart; set it to false"
    assert [(outcome.error, outcome.exit_code, outcome.told_once) for outcome in outcomes] == [(text, 2, True)] * 2
    assert not list_checkpoints(tmp_path / "run")


@pytest.mark.parametrize(("rank", "value"), [(1, math.nan), (0, math.inf), (1, -math.inf)])
def test_a_non_finite_gradient_on_one_rank_stops_all_before_anything_is_updated(
    pools, tiny_llama, tmp_path, undisturbed, rank, value
):
    config = tiny_config(tiny_llama, tmp_path / "run", train={"max_steps": 6}, checkpoint={"save_steps": 2})
    outcomes = pools[2].run(attempt, config=config, disturb=partial(spoil_gradient, rank=rank, step=4, value=value))
    tensor = "model.layers.0.mlp.up_proj.A"
    message = f"step 4: non-finite gradient on rank {rank}, first in {tensor}; nothing was updated"
    assert outcomes == [Outcome(message, 6, told_once=True)] * 2
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert fault_in(tmp_path / "run" / "checkpoint-2") is None
    assert not (tmp_path / "run" / SUMMARY_FILE).exists()
    assert pools[2].run(attempt, config=config, resume="auto") == undisturbed[1], "the fault was the hook's alone"
    assert adapter_digest(tmp_path / "run") == adapter_digest(undisturbed[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # Values beyond float32. No later gradient comes to show it.
        (
            {"train": {"max_steps": 1, "learning_rate": 1e39}},
            r"step 1: the update made values of \S+ non-finite, with a ",
        ),
        # Values that are finite, but with which no output is.
        ({"train": {"max_steps": 1, "learning_rate": 1e30}, "data": {"eval_samples": 6}}, "held-out loss is nan: "),
    ],
)
def test_a_last_update_that_spoils_the_model_is_no_success(pools, tiny_llama, tmp_path, settings, message):
    config = tiny_config(tiny_llama, tmp_path / "run", **settings)
    outcomes = pools[2].run(attempt, config=config)
    assert outcomes[0] == outcomes[1] and (outcomes[0].exit_code, outcomes[0].told_once) == (6, True)
    assert re.match(message, outcomes[0].error), outcomes[0].error
    assert not (tmp_path / "run" / SUMMARY_FILE).exists()


@pytest.mark.parametrize(("digest_steps", "save_steps"), [(3, 2), (100, 4)])
def test_a_replica_that_differs_in_one_bit_stops_all_before_it_is_saved(
    pools, tiny_llama, tmp_path, digest_steps, save_steps
):
    config = tiny_config(
        tiny_llama,
        tmp_path / "run",
        train={"max_steps": 9},
        sharding={"digest_steps": digest_steps},
        checkpoint={"save_steps": save_steps},
    )
    outcomes = pools[2].run(attempt, config=config, disturb=disturb_replica)
    message = "step 4: replicas differ, first in model.layers.1.self_attn.q_proj.A: rank 1 differs from rank 0"
    assert outcomes == [Outcome(message, 6, told_once=True)] * 2
    saved_before = ["checkpoint-2"] if save_steps == 2 else []
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == saved_before


def test_every_run_writes_a_summary(pools, tiny_llama, tmp_path):
    config = tiny_config(tiny_llama, tmp_path / "run", data={"eval_samples": 6}, train={"max_steps": 6})
    outcome = pools[2].run(attempt, config=config)[0]
    summary = read_summary(tmp_path / "run")
    assert summary["tuned_eval_loss"] < summary["base_eval_loss"] == pytest.approx(math.log(320), abs=1.0)
    assert {key: summary[key] for key in ("world_size", "engine", "method", "steps")} == {
        "world_size": 2,
        "engine": "fsdp",
        "method": "qahira",
        "steps": 6,
    }
    checkpoint = read_checkpoint(tmp_path / "run" / "checkpoint-6")
    trainable = sum(tensor.numel() for tensor in checkpoint.trainables.values())
    assert summary["trainable_parameters"] == trainable
    assert summary["base_fingerprint"] == checkpoint.adapter_config["base_fingerprint"]
    assert summary["final_train_loss"] == outcome.losses[-1]
    assert 4 * trainable < summary["reduce_bytes_per_step"] < 4 * trainable + 512
    for key in ("base_bytes_per_rank", "gather_bytes_per_step", "tokens_per_second", "seconds", "eval_tokens"):
        assert summary[key] > 0, key
    assert 10**8 < summary["load_peak_rss_bytes"] <= summary["peak_rss_bytes"] < 10**11
    assert summary["versions"]["torch"] == torch.__version__
    assert load_config(tmp_path / "run" / CONFIG_FILE) == config, "the folder holds the config it ran with"


def test_without_held_out_data_the_summary_has_nulls(undisturbed):
    summary = read_summary(undisturbed[0])
    assert (summary["base_eval_loss"], summary["tuned_eval_loss"], summary["eval_tokens"]) == (None, None, 0)
    assert summary["final_train_loss"] > 0


def test_a_run_finished_by_a_later_start_has_no_rates(pools, tiny_llama, tmp_path):
    config = tiny_config(tiny_llama, tmp_path / "run", data={"eval_samples": 6})
    pools[1].run(attempt, config=config)
    first = read_summary(tmp_path / "run")
    (tmp_path / "run" / SUMMARY_FILE).unlink()
    pools[1].run(attempt, config=config, resume="auto")
    second = read_summary(tmp_path / "run")
    unknown = {"tokens_per_second", "gather_bytes_per_step", "reduce_bytes_per_step"}
    assert {key: second[key] for key in unknown} == dict.fromkeys(unknown)
    changing = unknown | {"seconds", "load_peak_rss_bytes", "peak_rss_bytes"}
    assert {key: first[key] for key in first.keys() - changing} == {
        key: second[key] for key in second.keys() - changing
    }


def test_the_base_is_evaluated_again_on_resume_only_for_other_held_out_data(pools, tiny_llama, tmp_path):
    config = tiny_config(tiny_llama, tmp_path / "run", data={"eval_samples": 6})
    first = pools[1].run(attempt, config=config)[0]
    base_loss = read_summary(tmp_path / "run")["base_eval_loss"]
    (tmp_path / "run" / SUMMARY_FILE).unlink()
    same = pools[1].run(attempt, config=config, resume="auto")[0]
    assert [outcome.told.count("base: held-out loss") for outcome in (first, same)] == [1, 0]
    assert read_summary(tmp_path / "run")["base_eval_loss"] == base_loss


def note_calls(run: TrainingRun, notes: Path) -> None:
    """Evaluate the base, as every run does, and note each call within the first layer from then on."""
    run.evaluate_base()

    def note(*_: object) -> None:
        if run.world.rank == 0 and torch.is_grad_enabled():
            with notes.open("a") as file:
                file.write(".")

    run.parts.base.layers[0].mlp.register_forward_pre_hook(note)


def test_gradient_checkpointing_and_dropout_resume_exactly(pools, tiny_llama, tmp_path):
    changes = {"method": {"dropout": 0.3}}
    digests = []
    disturb = partial(note_calls, notes=tmp_path / "calls")
    for folder, stops in (("straight", [6]), ("stopped", [2, 5, 6])):
        for stop in stops:
            train = {"max_steps": stop, "gradient_checkpointing": True}
            config = tiny_config(tiny_llama, tmp_path / folder, train=train, **changes)
            outcome = pools[2].run(attempt, config=config, resume="auto", disturb=disturb)[0]
            assert outcome.error == ""
        digests.append((adapter_digest(tmp_path / folder), outcome))
    assert digests[0] == digests[1]
    assert len((tmp_path / "calls").read_text()) == 2 * (2 * 2 * 6), "each of two micro-batches a step, twice"
