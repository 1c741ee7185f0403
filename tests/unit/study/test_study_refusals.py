"""Studies that cannot work: one line with place, what was given and what is allowed; exit code 2; nothing written."""

import re

import pytest

from dist_qft.errors import UserError
from dist_qft.study.rows import expand
from dist_qft.study.settings import load_study
from tests.support.study_files import SEARCHED_ON, write_study

MLP = (
    "must be one of attention, mlp, early, middle, late, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
)
QAHIRA = {"name": "qahira"}
QLORA = {"name": "qlora", "rank": 4}
OWN = {"set": SEARCHED_ON}  # held-out data of a search
ARMS = {"presets": None, "axes": {"arm": {"a": {}, "b": {"train.weight_decay": 0.1}}}}


def rank(**changes):
    return [{"preset": "rank_by_type", "values": [1], **changes}]


def depth(**changes):
    return [{"preset": "rank_by_depth", "values": [1], **changes}]


def discount(**changes):
    return [{"preset": "equal_discount", "discount": 0.2, **changes}]


CASES = {
    "axis with an unknown key": (
        {"axes": {"method.rnk": [1, 2]}},
        "axes.method.rnk: unknown key 'method.rnk', did you mean 'method.rank'?",
    ),
    "axis with an unknown key under a label": (
        {"axes": {"text": {"a": {"data.trian.path": "x"}}}},
        "axes.text.a: unknown key 'data.trian', did you mean 'data.train'?",
    ),
    "axis with a wrong value": (
        {"axes": {"train.max_steps": [2, "many"]}},
        "axes.train.max_steps: train.max_steps: got 'many' (str), must be an integer > 0",
    ),
    "set with an unknown key": ({"set": {"train.sed": 1}}, "set: unknown key 'train.sed', did you mean 'train.seed'?"),
    "empty values": ({"presets": rank(values=[])}, "presets.0.values: got [], must be a list with at least 1 item"),
    "empty axis": ({"axes": {"train.seed": []}}, "axes.train.seed: the grid is empty, must be at least one value"),
    "no seed": ({"seeds": []}, "seeds: got [], must be a list with at least 1 item"),
    "a seed twice": ({"seeds": [1, 1]}, "seeds: got [1, 1], each seed once"),
    "nothing varies": ({"presets": None}, "nothing varies: need axes or presets"),
    "unknown preset": (
        {"presets": [{"preset": "rank_by_tipe", "values": [1]}]},
        "presets.0.preset: got 'rank_by_tipe', must be one of rank_by_type, balance_by_type, alpha_by_type, "
        "rank_by_depth, balance_by_depth, equal_discount",
    ),
    "preset without a name": (
        {"presets": [{"values": [1]}]},
        "presets.0: missing 'preset', must be one of",
    ),
    "unknown key in a preset": (
        {"presets": rank(value=[1])},
        "unknown key 'presets.0.value', did you mean 'values'?",
    ),
    "unknown key": ({"sedes": [1]}, "unknown key 'sedes', did you mean 'seeds'?"),
    "missing key": ({"base": None}, "base: missing"),
    "depth outside the model": (
        {"presets": depth(depths={"top": [2, 3]})},
        "presets.0: method.schedule.0.depth: got [2, 3], must end at 2 or before, the last decoder layer",
    ),
    "more parts than layers": ({"presets": depth(depths=4)}, "presets.0: got 4 parts, the model has 3 decoder layers"),
    "a group that matches nothing": (
        {"presets": rank(groups=["query"])},
        f"presets.0: 'query' matches no layer; {MLP}",
    ),
    "a discount that is too large": (
        {"presets": discount(discount=0.5, groups=["attention"])},
        "presets.0: a discount of 0.5 of the trainables is 6,144, attention has 5,376 of 12,288",
    ),
    "a discount of everything": (
        {"presets": discount(discount=1.0)},
        "presets.0.discount: got 1.0, must be less than 1",
    ),
    "ranks that are none": ({"presets": rank(values=[1.5])}, "presets.0.values: got 1.5, must be whole numbers"),
    "a rank for qahira": (
        {"method": QAHIRA, "presets": rank()},
        "presets.0: qahira has no rank in any shape; vary its tile with balance_by_type or balance_by_depth",
    ),
    "a number for qahira's tile": (
        {"method": QAHIRA, "presets": [{"preset": "balance_by_type", "values": [4]}]},
        "presets.0: got 4, qahira's tile must be [repeat, pool]",
    ),
    "a balancing factor for qlora": (
        {"method": QLORA, "presets": [{"preset": "balance_by_type", "values": [4]}]},
        "presets.0: qlora has no balancing factor; qbara has, and with balance 1 it is qlora",
    ),
    "a factor that does not divide": (
        {"presets": [{"preset": "balance_by_type", "values": [48]}]},
        "presets.0: method.schedule.0.balance: 48 does not divide in_features 64",
    ),
    "an unknown axis in when": (
        {"presets": rank(when={"txt": "a"}), "axes": {"train.seed": [1]}},
        "presets.0.when: got 'txt', must be an axis (train.seed)",
    ),
    "an unknown label in when": (
        {"presets": rank(when={"train.weight_decay": "a"}), "axes": {"train.weight_decay": [0.0, 0.1]}},
        "presets.0.when: got 'a', must be one of 0.0, 0.1",
    ),
    "two combinations with one meaning": (
        {"axes": {"text": {"a": {}, "b": {"train.max_steps": 2}}}},
        "axes: b has the settings of a",
    ),
    "a search on the study's own held-out data": (
        {"tune": {"set": {"train.seed": 1}}},
        "tune.set: must give the search held-out data of its own (data.eval...)",
    ),
    "a search on a part of the study's own held-out samples": (
        {"tune": {"set": {"data.eval_samples": 4}}},
        "tune.set: must give the search held-out data of its own (data.eval...): eval_samples are a part of",
    ),
    "a search on fewer rows of the study's own held-out file": (
        {
            "set": {"data.eval": {"path": "held-out.jsonl"}, "data.eval_samples": 0},
            "tune": {"set": {"data.eval": {"path": "held-out.jsonl", "limit": 4}}},
        },
        "tune.set: must give the search held-out data of its own (data.eval...): runs are compared on 'held-out.jsonl'",
    ),
    "a search by the questions that are compared": (
        {"tune": OWN, "tasks": ["arc_easy"], "metric": "task/arc_easy/acc"},
        "tune.metric: got 'task/arc_easy/acc', whose questions are compared, must be a figure of the search's own",
    ),
    "a search by a figure that its runs have not": (
        {"tune": {**OWN, "metric": "merged_loss"}},
        "tune.metric: got 'merged_loss', must be a figure of 'qbara': loss",
    ),
    "a metric that no run has": (
        {"metric": "merged_loss"},
        "metric: got 'merged_loss', must be a figure of 'qbara': loss",
    ),
    "a contrast of a figure that there is not": (
        {**ARMS, "contrasts": [{"claim": "c", "better": "a", "than": "b", "metric": "mergd_loss", "primary": True}]},
        "contrasts.0.metric: got 'mergd_loss', must be a figure of 'a': loss",
    ),
    "a contrast of figures with two directions": (
        {
            **ARMS,
            "tasks": ["arc_easy"],
            "contrasts": [
                {"claim": "c", "better": "a", "than": "b", "metric": "loss", "than_metric": "task/arc_easy/acc"}
            ],
        },
        "contrasts.0.than_metric: got 'task/arc_easy/acc', must be better in the direction in which 'loss' is",
    ),
    "a search over what is no number": (
        {"tune": {"axis": "train.precision", **OWN}},
        "tune: axis: train.precision is 'auto', must be a number > 0",
    ),
    "a figure that chooses for an arm that there is not": (
        {
            "tune": {**OWN, "metric": [{"metric": "loss", "when": {"arm": "b"}}]},
            "axes": {"arm": {"a": {}}},
        },
        "tune.metric.0.when: got 'b', must be one of a",
    ),
    "an unknown key beside a figure that chooses": (
        {"tune": {"set": {}, "metric": [{"metric": "loss", "whem": {}}]}},
        "unknown key 'tune.metric.0.whem', did you mean 'when'?",
    ),
    "a figure that chooses and is none": (
        {"tune": {"set": {}, "metric": 3}},
        "tune.metric: got 3, must be a valid list",
    ),
    "a merge that is not exact": ({"merge": {"to": "quantized"}}, "merge.0: no exact merge: "),
    "a merge of a side network": (
        {"method": {"name": "qst"}, "presets": None, "axes": {"train.max_steps": [2, 3]}, "merge": {"to": "dense"}},
        "merge.0: ",
    ),
    "an unknown key in a merge": (
        {"merge": {"to": "dense", "requantise": "nf4"}},
        "unknown key 'merge.requantise', did you mean 'requantize'?",
    ),
    "a contrast of what there is not": (
        {"contrasts": [{"claim": "c", "better": "2", "than": "9"}], "axes": {"train.max_steps": [2, 3]}},
        "contrasts.0.than: got '9', must be one of 2; 3",
    ),
    "a scale for ranks": ({"presets": rank(scale="hold")}, "presets.0.scale: only for balancing factors; remove it"),
    "adapters for a side network": (
        {"method": {"name": "qst"}},
        "presets.0: rank_by_type varies adapters, qst has none",
    ),
}


@pytest.mark.parametrize(("keys", "message"), CASES.values(), ids=CASES)
def test_refused_before_any_run(shell, tiny_llama, tmp_path, keys, message):
    path = write_study(tmp_path, tiny_llama, **keys)
    with pytest.raises(UserError) as refusal:
        expand(load_study(path))
    found = str(refusal.value)
    assert re.match(re.escape(str(path)) + r"(:\d+)?: " + re.escape(message), found), found
    assert "\n" not in found
    assert not (tmp_path / "out").exists()


def test_the_place_is_the_line_of_the_preset(tiny_llama, tmp_path):
    presets = [*rank(), *depth(depths={"top": [2, 3]})]
    path = write_study(tmp_path, tiny_llama, presets=presets)
    lines = path.read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if text.strip() == "- preset: rank_by_depth")
    with pytest.raises(UserError, match=re.escape(f"{path}:{line}: presets.1: method.schedule.0.depth: got [2, 3]")):
        expand(load_study(path))


def test_the_shell_sees_one_line_and_exit_code_2(shell, tiny_llama, tmp_path):
    path = write_study(tmp_path, tiny_llama, axes={"method.rnk": [1, 2]})
    code, out, err = shell("study", path)
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if "method.rnk" in text)
    assert (code, out) == (2, "")
    assert err == f"error: {path}:{line}: axes.method.rnk: unknown key 'method.rnk', did you mean 'method.rank'?\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan", "--row", "3"], "use only one of --plan, --row"),
        (["--row", "36"], "--row: got 36, the study has runs 0 to 35"),
        (["--suggest", "1000"], "--suggest: 36 of 36 runs are not done; finish the study first"),
        (["--report"], "nothing to report: none of the 0 runs that are done is a reference"),
    ],
)
def test_options_that_ask_for_what_there_is_not(shell, tiny_llama, tmp_path, words, message):
    path = write_study(tmp_path, tiny_llama)
    code, _, err = shell("study", path, *words)
    assert code == 2
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["--jobs", "2"], ["--row", "1"]], ids=str)
def test_a_missing_text_is_refused_before_any_run(shell, tiny_llama, tmp_path, words):
    texts = [str(tmp_path / "data.jsonl"), "no.jsonl"]
    path = write_study(tmp_path, tiny_llama, presets=None, seeds=[0], axes={"data.train.path": texts})
    code, _, err = shell("study", path, *words)
    assert (code, err) == (2, "error: data.train.path: no such file or folder: no.jsonl\n")
    assert not (tmp_path / "out").exists()
