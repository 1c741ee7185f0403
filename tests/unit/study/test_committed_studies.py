"""The studies on the small language model: they can be expanded, and compare arms of equal size."""

import importlib.util
from pathlib import Path

import pytest

from dist_qft.study.rows import expand_all
from dist_qft.study.settings import load_study
from dist_qft.study.study_run import StudyRun

STUDIES = Path(__file__).resolve().parents[3] / "studies"


@pytest.fixture
def shape(tmp_path, monkeypatch):
    """The small model's config.json, without weights, where the studies look for it."""
    spec = importlib.util.spec_from_file_location("pretrain", STUDIES / "docs-lm" / "pretrain.py")
    pretrain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pretrain)
    pretrain.model_config(2, 0).save_pretrained(tmp_path / "models" / "docs-lm")
    monkeypatch.chdir(tmp_path)


def waiting(name: str) -> list[StudyRun]:
    return expand_all(load_study(STUDIES / name / "study.yaml")).waiting


@pytest.mark.parametrize(
    "name",
    [
        "e1-qbara-vs-qlora",
        "e2-merged",
        "e3-qst",
        "e4-cuts",
        "e5-balance",
        "e6-longer",
        "e7-merged-longer",
        "e9-plateau",
    ],
)
def test_it_expands_and_its_contrasts_compare_equal_sizes(shape, name):
    study = load_study(STUDIES / name / "study.yaml")
    sizes = {row.label: row.trainables for row in waiting(name)}
    assert len(study.settings.seeds) >= 3 and study.settings.tune is not None
    for contrast in study.settings.contrasts:
        if "QST" not in contrast.better:  # which saves by being smaller
            assert sizes[contrast.better] == pytest.approx(sizes[contrast.than], rel=0.05), contrast.claim


def test_the_finalists_train_as_many_numbers_on_smollm2(smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf").symlink_to(smollm2)
    sizes = {row.label: row.trainables for row in waiting("e8-smollm2")}
    assert sizes.pop("QST") < min(sizes.values())
    assert len(sizes) == 4 and max(sizes.values()) < 1.013 * min(sizes.values())
