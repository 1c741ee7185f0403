"""The `lm_eval` section of `summary.json` over several measurements: what stands side by side was asked alike."""

from dist_qft.harness.command import with_figures
from dist_qft.harness.tasks import TaskRequest

ASKED = {"step": 8, "include_path": None, "num_fewshot": None, "limit": None, "chat_template": False}


def test_a_later_figure_of_a_task_takes_the_base_of_an_earlier_one_away():
    both = {"base": {"arc": {"acc": 0.25}, "piqa": {"acc": 0.5}}, "tuned": {"arc": {"acc": 0.5}, "piqa": {"acc": 0.75}}}
    first = with_figures({}, both, TaskRequest(("arc", "piqa")), 8)
    assert first == {**both, "asked": {"arc": ASKED, "piqa": ASKED}}

    limited = TaskRequest(("arc",), "tasks", num_fewshot=2, limit=5, batch_size=1, chat_template=True)
    second = with_figures(first, {"tuned": {"arc": {"acc": 1.0, "acc_norm": 0.0}}}, limited, 4)
    now = {"step": 4, "include_path": "tasks", "num_fewshot": 2, "limit": 5, "chat_template": True}
    assert second == {
        "base": {"piqa": {"acc": 0.5}},
        "tuned": {"piqa": {"acc": 0.75}, "arc": {"acc": 1.0, "acc_norm": 0.0}},
        "asked": {"piqa": ASKED, "arc": now},
    }
    third = with_figures(second, {"tuned": {"piqa": {"acc": 0.0}}}, TaskRequest(("piqa",)), 8)
    assert "base" not in third and third["tuned"].keys() == third["asked"].keys() == {"arc", "piqa"}


def test_figures_of_earlier_versions_stay_until_their_task_is_measured():
    earlier = {"tuned": {"arc": {"acc": 0.5}, "piqa": {"acc": 0.25}}}
    found = with_figures(earlier, {"tuned": {"piqa": {"acc": 1.0}}}, TaskRequest(("piqa",)), 8)
    assert found == {"tuned": {"arc": {"acc": 0.5}, "piqa": {"acc": 1.0}}, "asked": {"piqa": ASKED}}
