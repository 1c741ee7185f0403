"""Contrasts on made-up figures: SciPy and closed forms as the independent references."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from dist_qft.study.contrasts import bootstrap, compare, holm, seeds_p, unanswered
from dist_qft.study.findings import FAILS, HOLDS, OPEN
from dist_qft.study.measurements import Estimate
from dist_qft.study.presets import REFERENCE, Variant
from dist_qft.study.result_file import ROWS_FILE, Result
from dist_qft.study.results import Outcome
from dist_qft.study.soundness import warnings_of
from dist_qft.study.stages import Contrast

SEEDS, ROWS, TARGETS = range(5), 200, 300


def outcomes(folder, levels: dict[str, float], *, seed_noise: float, row_noise: float) -> list[Outcome]:
    """Runs whose held-out rows differ by text, seed and arm."""
    random, found = np.random.default_rng(7), []
    text = random.normal(0, 0.5, ROWS)
    for label, level in levels.items():
        own = random.normal(0, row_noise, ROWS)
        own -= own.mean()
        for seed in SEEDS:
            path = folder / f"{label}-{seed}"
            path.mkdir(parents=True)
            per_token = level + text + own + random.normal(0, seed_noise)
            rows = [[row, float(loss * TARGETS), TARGETS, None, None] for row, loss in enumerate(per_token)]
            (path / ROWS_FILE).write_text(json.dumps({"tuned": rows, "merged": []}))
            config = SimpleNamespace(train=SimpleNamespace(seed=seed))
            row = SimpleNamespace(tries=None, label=label, folder=path, variants=(Variant(REFERENCE),), config=config)
            tuned, history = {"loss": float(per_token.mean())}, [4.0 - step / 20 for step in range(20)]
            result = Result(label, base={"loss": 4.0}, tuned=tuned, eval_tokens=ROWS * TARGETS, history=history)
            found.append(Outcome(row, result))
    return found


def study_of(*contrasts: Contrast):
    settings = SimpleNamespace(metric="loss", contrasts=list(contrasts), tune=None)
    return SimpleNamespace(settings=settings, base=SimpleNamespace(task=SimpleNamespace(name="causal-lm")))


def contrast(better: str, than: str, **keys) -> Contrast:
    return Contrast(claim="c", better=better, than=than, **keys)


def test_three_verdicts_and_the_share(tmp_path):
    runs = outcomes(tmp_path, {"a": 2.0, "b": 2.2, "c": 2.2}, seed_noise=0.01, row_noise=0.05)
    study = study_of(contrast("a", "b"), contrast("b", "a"), contrast("b", "c"), contrast("b", "c", margin=0.1))
    found = compare(study, runs)
    assert [each.verdict for each in found] == [HOLDS, FAILS, OPEN, HOLDS]
    assert found[0].effect.mean == pytest.approx(0.2, abs=0.03)
    assert found[0].share == pytest.approx(0.2 / 1.8, abs=0.04)
    low, high = found[0].rows
    assert low < found[0].effect.mean < high


def test_a_question_without_runs_is_told_and_counts_as_one(tmp_path):
    """Holm corrects for what was asked, not for what happened to be answered."""
    runs = outcomes(tmp_path, {"a": 2.0, "b": 2.2}, seed_noise=0.01, row_noise=0.05)
    study = study_of(contrast("a", "b"), contrast("a", "c"), contrast("b", "c", metric="merged_loss", primary=True))
    (found,) = compare(study, runs)
    assert found.adjusted == pytest.approx(2 * found.p)
    assert unanswered(study, [found]) == [
        "a against c (loss): no seed has a run of both that is done",
        "b against c (merged_loss): no seed has a run of both that is done",
    ]


def test_an_effect_of_the_texts_alone_decides_nothing(tmp_path):
    """Over the seeds it is certain, but other rows would have said otherwise."""
    runs = outcomes(tmp_path, {"a": 2.0, "b": 2.02}, seed_noise=1e-4, row_noise=1.0)
    (found,) = compare(study_of(contrast("a", "b")), runs)
    assert seeds_p(found.effect, 0.0) < 0.001
    assert found.verdict == OPEN


def test_holm_and_students_t_against_scipy():
    values = (0.3, 0.1, 0.25, 0.4)
    assert seeds_p(Estimate(values), 0.0) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert seeds_p(Estimate(values), 0.2) == pytest.approx(stats.ttest_1samp(values, -0.2).pvalue)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert seeds_p(Estimate((0.3,)), 0.0) == 1.0


def test_the_bootstrap_has_the_standard_error_of_a_mean():
    differences = np.random.default_rng(1).normal(0.5, 2.0, 400)
    draws = bootstrap(differences, np.ones(400))
    assert draws.mean() == pytest.approx(differences.mean(), abs=0.01)
    assert draws.std() == pytest.approx(differences.std() / 20, rel=0.06)


def test_reasons_for_care_are_told(tmp_path):
    runs = outcomes(tmp_path, {"a": 2.0}, seed_noise=0.01, row_noise=0.05)
    told = " ".join(warnings_of(study_of(), runs, {}))
    assert "plateau" in told and "not tuned" in told and "held-out tokens" not in told
    flat = Result("a", tuned={"loss": 1.0}, eval_tokens=372, history=[2.0, *[1.0] * 19])
    told = " ".join(warnings_of(study_of(), [Outcome(each.row, flat) for each in runs], {}))
    assert "372 held-out tokens" in told and "plateau" not in told
    # Of a run that evaluated on the way the held-out loss tells, whatever the training loss does.
    falling, curve = [4.0 - step / 20 for step in range(20)], [(8, 2.5), (16, 2.03), (18, 2.0), (20, 2.0)]
    for loss, plateau in ((2.0, True), (1.9, False)):
        ended = Result("a", base={"loss": 4.0}, tuned={"loss": loss}, history=falling, held_out=curve)
        told = " ".join(warnings_of(study_of(), [Outcome(each.row, ended) for each in runs], {}))
        assert ("plateau" not in told) == plateau
