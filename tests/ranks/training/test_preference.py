"""Preference tuning: steps against whole models in float64, ranks and engines, gathers, runs and resume."""

import json

import pytest
import torch

import dist_qft
from dist_qft.hub.command import run_push
from dist_qft.storage.checkpoint import list_checkpoints
from dist_qft.training.metrics_file import read_history
from tests.support.outcomes import attempt
from tests.support.preferences import DENSE, expected_step, first_step, relative_error, write_pairs, write_rated
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import adapter_digest, train_losses, train_only

QLORA = {"name": "qlora", "rank": 4, "alpha": 8.0}
SCALE = 2.0
BETA = 0.3


def config_of(model, folder, task, method=QLORA, engine="replicated", micro=4, quantization=DENSE, **sections):
    folder.mkdir(parents=True, exist_ok=True)
    write = write_rated if task == "kto" else write_pairs
    path = folder.parent / f"{write.__name__}.jsonl"
    if not path.exists():
        write(path)
    data = {"train": {"path": str(path)}, "max_length": 48, "cache_dir": str(folder.parent / "cache")}
    train = {"global_batch_size": 4, "per_device_train_batch_size": micro, "max_steps": 3, "max_grad_norm": None}
    return tiny_config(
        model,
        folder,
        method=method,
        quantization={"block": None, **quantization},
        task={"name": task, "beta": BETA, **sections.pop("settings", {})},
        data={**data, **sections.pop("data", {})},
        train={**train, **sections.pop("train", {})},
        sharding={"engine": engine},
        **sections,
    )


def dpo(own, base, lengths, every, verdicts):
    chosen, rejected = (own - base).chunk(2)
    return -torch.log(torch.sigmoid(BETA * (chosen - rejected))).mean()


def orpo(own, base, lengths, every, verdicts):
    chosen, rejected = (own / lengths).chunk(2)
    odds = torch.log(chosen.exp() / (1 - chosen.exp())) - torch.log(rejected.exp() / (1 - rejected.exp()))
    return orpo.nll(every) - BETA * torch.log(torch.sigmoid(odds)).mean()


def kto(own, base, lengths, every, verdicts):
    ratios, others = (own - base).chunk(2)
    kl = others.mean().clamp(min=0).detach()
    signs = torch.where(verdicts, 1.0, -1.0)
    weights = torch.where(verdicts, 1.0, 1.5)
    return (weights * (1 - torch.sigmoid(BETA * signs * (ratios - kl)))).mean()


WITH_TOKENS = {**QLORA, "train_tokens": ["<|im_end|>", 80]}


@pytest.mark.parametrize(
    "task, loss, method", [("dpo", dpo, QLORA), ("dpo", dpo, WITH_TOKENS), ("orpo", orpo, QLORA), ("kto", kto, QLORA)]
)
def test_a_step_is_that_of_whole_models_in_float64(pools, tiny_llama, tmp_path, task, loss, method):
    settings = {"undesirable_weight": 1.5} if task == "kto" else {}
    config = config_of(tiny_llama, tmp_path / "run", task, method, settings=settings)
    (step,) = pools[1].run(first_step, config=config, seed=8)  # with which the KL of kto is not 0
    ((ids, in_answer, _),) = step.batches
    ends = torch.where(in_answer, torch.arange(ids.shape[1]), 0).amax(1)  # each row's last token
    real = (torch.arange(1, ids.shape[1]) <= ends[:, None])[: len(ids) // 2]
    # As TRL does, over prompts and answers of the better ones alike.
    orpo.nll = lambda every: -every[: len(ids) // 2][real].mean()
    value, gradients = expected_step(tiny_llama, step, SCALE, loss)
    assert step.loss == pytest.approx(value, rel=1e-5)
    assert relative_error(step.gradients, gradients) < 1e-5
    assert step.figures.get("kl", 1.0) > 0.1
    first, second = in_answer.chunk(2)
    trained = {"dpo": in_answer.sum(), "orpo": real.sum() + second.sum(), "kto": first.sum()}  # not those of the KL
    assert step.trained == trained[task]
    assert step.figures["rewards/margins"] == pytest.approx(
        step.figures["rewards/chosen"] - step.figures["rewards/rejected"], rel=1e-3, abs=1e-5
    )


LAYOUTS = [
    ("dpo", QLORA, {"linear": "nf4", "block": [64], "embedding": "auto"}),
    ("dpo", {"name": "qahira", "pool": 4, "repeat": 8, "merge_aware": True}, {"linear": "affine4", "block": [8, 4]}),
    ("orpo", {"name": "qst", "reduction": 4, "downsample_rank": 8}, {"linear": "nf4", "block": [64]}),
    ("kto", {"name": "qst", "reduction": 4, "downsample_rank": 8}, {"linear": "nf4", "block": [64]}),
]


@pytest.mark.parametrize("task, method, quantization", LAYOUTS)
def test_neither_ranks_nor_engine_nor_accumulation_change_the_step(
    pools, tiny_llama, tmp_path, task, method, quantization
):
    def step(world, engine, micro):
        sections = {"method": method, "quantization": quantization, "engine": engine, "micro": micro}
        config = config_of(tiny_llama, tmp_path / f"{world}{engine}", task, **sections)
        return pools[world].run(first_step, config=config)[0]

    micro = 2 if task == "kto" else 4  # whose micro-batch is the unit of its KL
    whole = step(1, "replicated", micro)
    for engine, small in (("fsdp", 2), ("zero", 2 if task == "kto" else 1)):
        parted = step(2, engine, small)
        assert parted.loss == pytest.approx(whole.loss, rel=1e-5)
        wanted = {name: tensor.double() for name, tensor in whole.gradients.items()}
        assert relative_error(parted.gradients, wanted) < 1e-4
        for name, value in whole.figures.items():
            assert parted.figures[name] == pytest.approx(value, rel=1e-3, abs=1e-4)


def test_the_reference_moves_no_bytes_and_a_run_learns_resumes_and_answers(pools, tiny_llama, tmp_path):
    nf4 = {"quantization": {"linear": "nf4", "block": [64], "embedding": "auto"}, "engine": "fsdp", "micro": 2}
    more = {"data": {"eval_samples": 6}, "checkpoint": {"save_steps": 4}}
    config = config_of(
        tiny_llama, tmp_path / "run", "dpo", **nf4, **more, train={"max_steps": 8, "learning_rate": 5e-3}
    )
    losses = pools[2].run(train_losses, config=config)[0]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.5
    supervised = tiny_config(
        tiny_llama,
        tmp_path / "sft",
        method=QLORA,
        quantization={"linear": "nf4", "block": [64]},
        train={"global_batch_size": 4, "max_steps": 1},
    )
    pools[2].run(train_only, config=supervised)
    gathered = [
        json.loads(line)["traffic/gathered_bytes"]
        for folder in ("run", "sft")
        for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        if "traffic/gathered_bytes" in line
    ]
    assert len(set(gathered)) == 1 and gathered[0] > 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [record for record in records if "eval/rewards/accuracies" in record]
    assert evaluated[-1]["eval/loss"] < records[0]["base/loss"] == pytest.approx(0.6931, abs=1e-3)
    assert {"train/rewards/chosen", "train/rewards/margins", "train/logps/rejected"} <= records[-2].keys() | records[
        1
    ].keys()

    first = config.model_copy(update={"output_dir": str(tmp_path / "resumed")})
    half = first.model_copy(update={"train": first.train.model_copy(update={"max_steps": 4})})
    pools[2].run(train_only, config=half)
    assert pools[2].run(train_losses, config=first, resume="auto")[0] == losses
    assert adapter_digest(first.output_dir) == adapter_digest(config.output_dir)
    assert [record.step for record in read_history(tmp_path / "resumed")] == list(range(1, 9))
    model = dist_qft.load(tmp_path / "run")
    assert len(list_checkpoints(tmp_path / "run")) == 2 and model.adapters.by_path


def test_a_model_that_begins_elsewhere_than_the_reference_is_refused(pools, tiny_llama, tmp_path):
    """The reference is the base: values of another kind of run make every reward wrong from the first step on."""
    texts = tiny_config(tiny_llama, tmp_path / "texts", method=QLORA, quantization={"block": None, **DENSE})
    pairs = config_of(tiny_llama, tmp_path / "pairs", "dpo")
    for config in (texts, pairs):
        pools[1].run(train_only, config=config)

    def begun(source, task):
        config = config_of(tiny_llama, tmp_path / f"{task} of {source.name}", task, {**QLORA, "init_from": str(source)})
        return pools[1].run(attempt, config=config)[0].error

    for task in ("dpo", "kto"):
        refused = begun(tmp_path / "texts", task)
        assert refused.startswith("method.init_from: got ") and f"must be empty for task {task}" in refused
    assert begun(tmp_path / "texts", "orpo") == ""  # has no reference
    assert begun(tmp_path / "pairs", "dpo") == ""  # goes on against the same one
    run_push(str(tmp_path / "pairs"), "owner/adapters", private=True, dry_run=tmp_path / "pushed")
    assert begun(tmp_path / "pushed", "kto") == ""
