"""From a study file to runs: which they are, what they are called, how many values each trains."""

import pytest

from dist_qft.methods.specs import make_spec
from dist_qft.study.naming import Skeletons
from dist_qft.study.result_file import Result, write_result
from dist_qft.study.rows import expand, expand_all
from dist_qft.study.settings import load_study
from tests.support.study_files import PRESETS, SEARCHED_ON, write_study

LAYERS, WIDTH, KV, FFN = 3, 64, 32, 128  # of the tiny Llama
SIZES = {
    "attention": [(WIDTH, WIDTH), (WIDTH, KV), (WIDTH, KV), (WIDTH, WIDTH)],
    "mlp": [(WIDTH, FFN), (WIDTH, FFN), (FFN, WIDTH)],
}


def rows_of(folder, model, **keys):
    return expand(load_study(write_study(folder, model, **keys)))


def by_formula(kind: str, rank: int, pool: int = 1) -> int:
    """Trainables of all layers of a kind: r (d_in / pool + d_out)."""
    return LAYERS * sum(rank * (d_in // pool + d_out) for d_in, d_out in SIZES[kind])


def test_every_count_equals_the_formula(tiny_llama, tmp_path):
    reference = by_formula("attention", 4) + by_formula("mlp", 4)
    expected = {"reference": reference}
    for rank in (1, 2):
        expected[f"rank_by_type attention {rank}"] = by_formula("attention", rank) + by_formula("mlp", 4)
        expected[f"rank_by_type mlp {rank}"] = by_formula("attention", 4) + by_formula("mlp", rank)
    for depth in ("early", "middle", "late"):
        expected[f"rank_by_depth {depth} 1"] = reference * 2 // 3 + reference // 3 // 4
    for balance in (1, 4):
        expected |= {f"balance_by_type {group} {balance}": reference for group in ("attention", "mlp")}
        expected |= {f"balance_by_depth {depth} {balance}": reference for depth in ("early", "middle", "late")}
    rows = rows_of(tmp_path, tiny_llama)
    assert {str(row.variants[0]): row.trainables for row in rows} == expected
    assert len(rows) == 2 * len(expected) == 36
    assert [row.config.train.seed for row in rows[:4]] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("method", "trainables"),
    [
        (
            {"name": "qalora", "rank": 4, "alpha": 4, "pool": 16},
            by_formula("attention", 4, 16) + by_formula("mlp", 2, 16),
        ),
        ({"name": "qlora", "rank": 4, "alpha": 4}, by_formula("attention", 4) + by_formula("mlp", 2)),
    ],
)
def test_other_methods(tiny_llama, tmp_path, method, trainables):
    presets = [{"preset": "rank_by_type", "values": [2], "groups": ["mlp"]}]
    rows = rows_of(tmp_path, tiny_llama, method=method, presets=presets)
    assert rows[2].trainables == trainables


def test_a_tile_is_what_qahira_has_instead_of_a_rank(tiny_llama, tmp_path):
    presets = [{"preset": "balance_by_type", "values": [[8, 16]], "groups": ["mlp"]}]
    rows = rows_of(tmp_path, tiny_llama, method={"name": "qahira"}, presets=presets, seeds=[0])
    attention = LAYERS * sum(d_in * d_out // 32 for d_in, d_out in SIZES["attention"])
    assert rows[1].trainables == attention + LAYERS * sum(d_in * d_out // 128 for d_in, d_out in SIZES["mlp"])
    assert str(rows[1].variants[0]) == "balance_by_type mlp 8x16"


def test_qablora_has_a_rank_and_a_tile(tiny_llama, tmp_path):
    presets = [
        {"preset": "rank_by_type", "values": [2], "groups": ["mlp"]},
        {"preset": "balance_by_type", "values": [[8, 16]], "groups": ["mlp"]},
    ]
    method = {"name": "qablora", "rank": 4, "use_rslora": True}
    reference, ranked, tiled = rows_of(tmp_path, tiny_llama, method=method, presets=presets, seeds=[0])

    def pairs(group: str, rank: int, repeat: int, pool: int) -> int:
        return LAYERS * sum(rank * (d_in // pool + d_out // repeat) for d_in, d_out in SIZES[group])

    assert reference.trainables == pairs("attention", 4, 8, 4) + pairs("mlp", 4, 8, 4)
    assert ranked.trainables == pairs("attention", 4, 8, 4) + pairs("mlp", 2, 8, 4)
    assert tiled.trainables == pairs("attention", 4, 8, 4) + pairs("mlp", 4, 8, 16)
    (rule,) = ranked.config.method.schedule
    assert rule.alpha / 2**0.5 == pytest.approx(16.0 / 4**0.5), "the scale alpha / sqrt(rank) stays"


def test_a_rank_keeps_the_scale_unless_told_otherwise(tiny_llama, tmp_path):
    presets = [{"preset": "rank_by_type", "values": [1], "keep": keep} for keep in ("scale", "alpha")]
    rules = [row.config.method.schedule[0] for row in rows_of(tmp_path, tiny_llama, presets=presets, seeds=[0])[1:]]
    assert [(rule.layers, rule.rank, rule.alpha) for rule in rules] == [
        ("attention", 1, 1.0),
        ("mlp", 1, 1.0),
        ("attention", 1, None),
        ("mlp", 1, None),
    ]


def test_equal_settings_are_one_run_however_they_are_spelt(tiny_llama, tmp_path):
    presets = [
        {"preset": "rank_by_type", "values": [4, 2]},  # 4 is the reference's own
        {"preset": "rank_by_type", "values": [2], "groups": ["mlp"]},
        {"preset": "rank_by_depth", "values": [4]},
    ]
    rows = rows_of(tmp_path, tiny_llama, presets=presets, seeds=[0])
    assert [[str(variant) for variant in row.variants] for row in rows] == [
        ["reference", "rank_by_type attention 4", "rank_by_type mlp 4"]
        + [f"rank_by_depth {depth} 4" for depth in ("early", "middle", "late")],
        ["rank_by_type attention 2"],
        ["rank_by_type mlp 2"],
    ]


def test_names_stay_when_the_study_grows_and_change_with_any_setting(tiny_llama, tmp_path):
    for name in ("small", "grown", "longer"):
        (tmp_path / name).mkdir()
    small = rows_of(tmp_path / "small", tiny_llama, presets=PRESETS[:1], seeds=[1])
    grown = rows_of(tmp_path / "grown", tiny_llama, seeds=[0, 1])
    # The data file lies elsewhere: the only setting that differs.
    moved = {"data.train.path": small[0].config.data.train.path}
    grown_same_data = rows_of(tmp_path / "grown", tiny_llama, seeds=[0, 1], set=moved)
    assert {row.name for row in small} <= {row.name for row in grown_same_data}
    assert {row.name for row in small}.isdisjoint({row.name for row in grown})
    longer = rows_of(
        tmp_path / "longer", tiny_llama, set={**moved, "train.max_steps": 3}, presets=PRESETS[:1], seeds=[1]
    )
    assert {row.name for row in small}.isdisjoint({row.name for row in longer})
    assert len({row.name for row in [*grown, *longer]}) == len(grown) + len(longer)
    assert all(row.folder.name == row.name for row in grown)


def test_axes_are_crossed_and_presets_may_be_for_some_only(tiny_llama, tmp_path):
    axes = {
        "train.learning_rate": [1e-3, 2e-3],
        "method": {"qbara": {}, "qalora": {"method": {"name": "qalora", "rank": 4, "alpha": 4, "pool": 16}}},
    }
    presets = [{"preset": "balance_by_type", "values": [8], "when": {"method": "qalora"}}]
    rows = rows_of(tmp_path, tiny_llama, axes=axes, presets=presets, seeds=[0])
    assert [(*row.subject.values(), str(row.variants[0])) for row in rows] == [
        ("0.001", "qbara", "reference"),
        ("0.001", "qalora", "reference"),
        ("0.001", "qalora", "balance_by_type attention 8"),
        ("0.001", "qalora", "balance_by_type mlp 8"),
        ("0.002", "qbara", "reference"),
        ("0.002", "qalora", "reference"),
        ("0.002", "qalora", "balance_by_type attention 8"),
        ("0.002", "qalora", "balance_by_type mlp 8"),
    ]
    assert {row.config.train.learning_rate for row in rows} == {1e-3, 2e-3}


def test_a_base_is_shared_by_runs_that_load_the_same(tiny_llama, tmp_path):
    axes = {"quantization.block": [[8, 4], [1, 32]], "train.learning_rate": [1e-3, 2e-3]}
    rows = rows_of(tmp_path, tiny_llama, axes=axes, presets=None, seeds=[0])
    assert [rows[0].base_key == row.base_key for row in rows] == [True, True, False, False]
    side_rows = rows_of(
        tmp_path, tiny_llama, method={"name": "qst"}, axes={"method.reduction": [4, 8]}, presets=None, seeds=[0]
    )
    assert len({row.base_key for row in side_rows}) == len(side_rows) == 2


@pytest.mark.parametrize(("balance", "alpha"), [(1, 2), (8, 16)])
def test_alpha_may_follow_lambda_so_that_a_step_moves_dw_alike(tiny_llama, tmp_path, balance, alpha):
    presets = [{"preset": "balance_by_type", "values": [balance], "groups": ["mlp"], "scale": "hold"}]
    changed = rows_of(tmp_path, tiny_llama, presets=presets, seeds=[0])[-1]
    assert changed.config.method.schedule[-1].alpha == alpha
    tiles = make_spec(changed.config, Skeletons().get(changed.config)).tiles
    scales = {(tile.tile_scale, tile.pool) for path, tile in tiles.items() if "mlp" in path}
    assert scales == {(0.5, balance)}  # alpha / rank / lambda of the reference: 4 / 4 / 2


@pytest.mark.parametrize(("best_for_the_file", "runs"), [(2e-3, 3), (4e-3, 4)], ids=["the same value", "another"])
def test_arms_that_differ_only_in_the_figure_that_chooses_share_their_search(
    tiny_llama, tmp_path, best_for_the_file, runs
):
    tune = {
        "set": SEARCHED_ON,
        "values": [1e-3, 2e-3, 4e-3],
        "metric": [{"metric": "merged_loss", "when": {"arm": "for its file"}}],
        "widen": 0,
    }
    arms = {"for itself": {}, "for its file": {}, "other": {"train.weight_decay": 0.1}}
    keys = {"tune": tune, "axes": {"arm": arms}, "merge": {"to": "dense"}}
    study = load_study(write_study(tmp_path, tiny_llama, presets=None, seeds=[0], **keys))
    tried = expand(study)
    assert [row.tries for row in tried] == [1e-3, 2e-3, 4e-3] * 2
    for row in tried:
        figures = {"loss": abs(row.tries - 2e-3), "merged_loss": abs(row.tries - best_for_the_file)}
        write_result(row.folder, Result(row.name, tuned=figures))
    known = expand_all(study)
    compared = {row.label: row for row in known.rows if row.tries is None}
    assert {label: row.config.train.learning_rate for label, row in compared.items()} == {
        "for itself": 2e-3,
        "for its file": best_for_the_file,
        "other": 2e-3,
    }
    assert len({row.name for row in compared.values()}) == runs - 1
    assert [search.metric for search in known.searches.values()] == ["loss", "merged_loss", "loss"]


@pytest.mark.parametrize(("axis", "changed"), [("method.alpha", "alpha"), ("method.rank", "rank")])
def test_a_search_over_a_number_of_the_method_tries_each_value(tiny_llama, tmp_path, axis, changed):
    tune = {"axis": axis, "set": SEARCHED_ON, "tries": 3, "widen": 0}
    study = load_study(write_study(tmp_path, tiny_llama, presets=None, seeds=[0], tune=tune, axes={"arm": {"a": {}}}))
    tried = expand(study)
    assert [getattr(row.config.method, changed) for row in tried] == [2, 4, 8]
    assert len({row.name for row in tried}) == 3
    for row in tried:
        assert row.trainables == make_spec(row.config, Skeletons().get(row.config)).parameters
        write_result(row.folder, Result(row.name, tuned={"loss": row.tries}))
    chosen = next(row for row in expand(study) if row.tries is None)
    assert (getattr(chosen.config.method, changed), chosen.trainables) == (2, tried[0].trainables)


@pytest.mark.parametrize(
    ("axis", "start", "best"), [("train.warmup_ratio", 0.3, 0.6), ("method.rank", 2, 1)], ids=["share", "whole number"]
)
def test_a_search_ends_at_the_edge_of_what_a_config_may_have(tiny_llama, tmp_path, axis, start, best):
    tune = {"axis": axis, "set": SEARCHED_ON, "tries": 3, "widen": 4}
    path = write_study(
        tmp_path, tiny_llama, presets=None, seeds=[0], tune=tune, set={axis: start}, axes={"arm": {"a": {}}}
    )
    study = load_study(path)
    for row in expand(study):
        write_result(row.folder, Result(row.name, tuned={"loss": abs(row.tries - best)}))
    known = expand_all(study)
    (found,) = known.searches.values()
    assert (found.best, found.on_edge, len(found.figures)) == (best, True, 3)
    assert [row.tries for row in known.rows] == [*sorted(found.figures), None]


def test_the_first_values_keep_their_numbers_when_a_search_goes_on(tiny_llama, tmp_path):
    tune = {"set": SEARCHED_ON, "values": [1e-3, 2e-3], "widen": 2}
    arms = {"a": {}, "b": {"train.weight_decay": 0.1}}
    study = load_study(write_study(tmp_path, tiny_llama, presets=None, seeds=[0], tune=tune, axes={"arm": arms}))
    first = expand(study)
    for row in first[:2]:
        write_result(row.folder, Result(row.name, tuned={"loss": -row.tries}))
    later = expand(study)
    assert [row.name for row in later[:4]] == [row.name for row in first]
    assert [(row.label, row.tries) for row in later[4:]] == [("a", 4e-3)]
