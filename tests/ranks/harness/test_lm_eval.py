"""lm-evaluation-harness on runs and models: log-likelihoods against logits, on ranks, and a local task through the
command."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import dist_qft
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.schema import ShardingConfig
from dist_qft.harness.model import TunedLM
from dist_qft.harness.tasks import Figures, TaskRequest, measure
from dist_qft.study.result_file import read_result
from dist_qft.study.rows import expand
from dist_qft.study.settings import load_study
from dist_qft.training.summary import SUMMARY_FILE
from dist_qft.tuned_model.checkpointed import config_of, find_checkpoint, open_checkpointed
from tests.support.study_files import write_study
from tests.support.whole_runs import NF4

REQUESTS = [
    (None, context, targets)
    for context, targets in [
        ([1, 2, 3], [4]),
        ([7], [8, 9, 10, 11]),
        ([5, 4, 3, 2, 1, 9, 8, 7], [6, 6]),
        ([12], [13]),
        ([2, 2], [3, 3, 3]),
    ]
]
HEAD = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
"""
TASKS = {
    "capitals": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}{{choices[0]}}"
metric_list: [{metric: bits_per_byte}]
""",
    "answers": """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def runs(make_run, tiny_llama) -> dict[str, Path]:
    """A run of adapters, and one of a side network."""
    return {
        "qahira": make_run(tiny_llama, size=0.5),
        "qst": make_run(tiny_llama, size=0.5, method={"name": "qst", "reduction": 4}, quantization=NF4),
    }


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"{n} and {n}?", "choices": [" one", " two", " three"], "answer": n % 3} for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}" + HEAD.format(rows=folder / "rows.jsonl") + text)
    (folder / "no_rows.yaml").write_text("task: no_rows" + HEAD.format(rows=folder / "gone.jsonl") + TASKS["capitals"])
    wrong = TASKS["capitals"].replace("{{choices}}", "{{options}}")
    (folder / "no_choices.yaml").write_text("task: no_choices" + HEAD.format(rows=folder / "rows.jsonl") + wrong)
    return folder


def by_logits(logits: Tensor, context: list[int], targets: list[int]) -> tuple[float, bool]:
    """The score of one request from the logits (length, vocabulary) of its ids but the last."""
    own = logits[len(context) - 1 :].log_softmax(-1)
    value = own.gather(1, torch.tensor(targets)[:, None]).sum()
    return float(value), own.argmax(-1).tolist() == targets


@pytest.mark.parametrize("method", ["qahira", "qst"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_log_likelihoods_are_those_of_the_logits(runs, method, batch_size):
    loaded = dist_qft.load(runs[method])
    scored = TunedLM(loaded.base, loaded.tokenizer, batch_size)._loglikelihood_tokens(REQUESTS)
    for (_, context, targets), (value, greedy) in zip(REQUESTS, scored, strict=True):
        logits = loaded.logits(torch.tensor([(context + targets)[:-1]]))[0]
        expected = by_logits(logits, context, targets)
        assert (value, greedy) == (pytest.approx(expected[0], abs=1e-4), expected[1])


@contextmanager
def sharded(path: Path) -> Iterator[tuple[BaseModel, PreTrainedTokenizerBase]]:
    """The tuned model of a run on a base that is sharded over the ranks."""
    checkpoint = find_checkpoint(path)
    config = config_of(checkpoint).model_copy(update={"sharding": ShardingConfig(engine="fsdp", device="cpu")})
    parts, tokenizer = open_checkpointed(checkpoint, config, torch.device("cpu"))
    with parts.fixed():
        yield parts.base, tokenizer


def scores_on_ranks(path: Path) -> list[tuple[float, bool]]:
    with sharded(path) as (base, tokenizer):
        return TunedLM(base, tokenizer, 2)._loglikelihood_tokens(REQUESTS)


def figures_on_ranks(path: Path, request: TaskRequest) -> Figures:
    """Measured with the variables that torchrun sets."""
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    with pytest.MonkeyPatch.context() as environment, sharded(path) as (base, tokenizer):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}.items():
            environment.setenv(name, value)
        return measure(base, tokenizer, torch.device("cpu"), request)


def test_two_ranks_share_the_batches_of_a_sharded_base(pools, runs):
    """Five requests in batches of two: the second rank has a batch less."""
    loaded = dist_qft.load(runs["qahira"])
    alone = TunedLM(loaded.base, loaded.tokenizer, 2)._loglikelihood_tokens(REQUESTS)
    for found in pools[2].run(scores_on_ranks, path=runs["qahira"]):
        assert [value for value, _ in found] == pytest.approx([value for value, _ in alone], abs=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in alone]


def test_every_rank_of_a_launcher_has_all_figures(pools, runs, tasks):
    """The harness gives its results to a node's first rank alone, and knows ways to share the questions."""
    request = TaskRequest(tuple(TASKS), str(tasks), batch_size=2)
    loaded = dist_qft.load(runs["qahira"])
    alone = measure(loaded.base, loaded.tokenizer, loaded.device, request)
    assert {task: list(figures) for task, figures in alone.items()} == {
        "answers": ["exact_match"],
        "capitals": ["acc"],
        "texts": ["bits_per_byte"],
    }
    for found in pools[2].run(figures_on_ranks, path=runs["qahira"], request=request):
        assert found == {task: pytest.approx(figures, abs=1e-4) for task, figures in alone.items()}


class Broken(Exception):
    """A bug of ours."""


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("error", [RuntimeError("gloo: Connection closed by peer"), MemoryError(), Broken()], ids=repr)
def test_errors_of_forward_passes_stay_as_they_are(runs, tasks, task, error):
    """A session tells lost peers, lack of memory and bugs from each other by them."""
    loaded = dist_qft.load(runs["qahira"])

    def fail(*_: object) -> None:
        raise error

    loaded.base.model.get_decoder().register_forward_pre_hook(fail)
    with pytest.raises(type(error)) as raised:
        measure(loaded.base, loaded.tokenizer, loaded.device, TaskRequest((task,), str(tasks)))
    assert raised.value is error


def test_the_command_measures_base_and_tuned_and_records_them(shell, runs, tasks):
    run = runs["qst"]
    (run / SUMMARY_FILE).write_text(json.dumps({"steps": 1}))
    words = ("--tasks", "capitals", "--include-path", tasks, "--json")
    code, out, err = shell("lm-eval", run, *words, "--base")
    assert code == 0, err
    found = json.loads(out)
    assert found.keys() == {"base", "tuned"} and 0 <= found["tuned"]["capitals"]["acc"] <= 1
    step = find_checkpoint(run).state.step
    asked = {"step": step, "include_path": str(tasks), "num_fewshot": None, "limit": None, "chat_template": False}
    recorded = {**found, "asked": {"capitals": asked}}
    assert json.loads((run / SUMMARY_FILE).read_text()) == {"steps": 1, "lm_eval": recorded}
    assert list((run / "runs" / "lm-eval").glob("events*"))


def test_a_merged_model_and_what_is_refused(shell, runs, tasks, tmp_path):
    run, words = runs["qahira"], ("--include-path", tasks, "--json")
    assert shell("merge", run, "--to", "quantized", "-o", tmp_path / "merged")[0] == 0
    code, out, err = shell("lm-eval", tmp_path / "merged", "--tasks", "capitals", *words)
    assert code == 0, err
    model = json.loads(out)["model"]
    live = json.loads(shell("lm-eval", run, "--tasks", "capitals", *words)[1])["tuned"]
    assert model == live
    for task in ("no_such_task", "no_rows", "no_choices", "capitals,no_rows"):
        assert shell("lm-eval", run, "--tasks", task, *words)[0] == 2
    assert shell("lm-eval", tmp_path / "merged", "--tasks", "capitals", "--base", *words)[0] == 2
    assert shell("lm-eval", tmp_path / "nothing", "--tasks", "capitals")[0] == 2


def test_a_study_measures_tasks_without_dropout(shell, tiny_llama, tasks, tmp_path):
    """Training leaves adapters in train mode; a checkpoint is opened in eval mode."""
    method = {"name": "qlora", "rank": 4, "dropout": 0.5}
    keys = {"tasks": ["texts"], "tasks_path": str(tasks), "keep": ["adapter"]}
    axes = {"sharding.engine": ["fsdp"], "quantization": [NF4], "train.learning_rate": [0.05]}
    path = write_study(tmp_path, tiny_llama, presets=None, seeds=[0], method=method, axes=axes, **keys)
    code, _, err = shell("study", path, "--no-report")
    assert code == 0, err
    (row,) = expand(load_study(path))
    words = ("--tasks", "texts", "--include-path", tasks, "--base", "--json")
    code, out, err = shell("lm-eval", row.folder, *words)
    assert code == 0, err
    found = {which: figures["texts"]["bits_per_byte"] for which, figures in json.loads(out).items()}
    assert abs(found["tuned"] - found["base"]) > 0.1, "the adapters have an effect that dropout could change"
    assert read_result(row.folder).tuned["task/texts/bits_per_byte"] == pytest.approx(found["tuned"], abs=1e-6)


def test_a_study_measures_tasks_live_and_merged(shell, tiny_llama, tasks, tmp_path):
    keys = {"tasks": ["capitals"], "tasks_path": str(tasks), "merge": {"to": "dense"}, "metric": "task/capitals/acc"}
    path = write_study(tmp_path, tiny_llama, presets=None, seeds=[0], axes={"train.weight_decay": [0.0]}, **keys)
    code, _, err = shell("study", path, "--no-report")
    assert code == 0, err
    (row,) = expand(load_study(path))
    assert {"task/capitals/acc", "merged_task/capitals/acc"} <= read_result(row.folder).tuned.keys()
