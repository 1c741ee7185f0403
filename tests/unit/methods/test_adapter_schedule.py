"""From a method section to settings per layer: counts, rules, every refusal."""

import json
import subprocess
import sys

import pytest

from dist_qft.config.methods.door import make_method
from dist_qft.errors import UserError
from dist_qft.methods.adapters.schedule import LinearShape, TileSettings, plan_adapters

# name: (in_features, out_features)
LLAMA_7B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (4096, 11008),
    "mlp.up_proj": (4096, 11008),
    "mlp.down_proj": (11008, 4096),
}


def llama(layers: int = 4, sizes: dict[str, tuple[int, int]] = LLAMA_7B) -> list[LinearShape]:
    return [
        LinearShape(f"model.layers.{depth}.{name}", d_in, d_out, depth)
        for depth in range(layers)
        for name, (d_in, d_out) in sizes.items()
    ]


def plan(layers: list[LinearShape] | None = None, schedule: list[dict] | None = None, **method) -> dict:
    return plan_adapters(make_method(**method, schedule=schedule or []), layers or llama())


def refusal(*args, **kwargs) -> str:
    """The one message with which the plan is refused."""
    with pytest.raises(UserError) as caught:
        plan(*args, **kwargs)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "millions"),
    [
        ({"name": "qlora", "rank": 64}, 159.9),
        ({"name": "qbara", "rank": 64, "balance": 1}, 159.9),
        ({"name": "qbara", "rank": 64}, 159.9),
        ({"name": "qbara", "rank": 64, "balance": 4}, 159.9),
        ({"name": "qalora", "rank": 64}, 89.3),
        ({"name": "qahira", "rank": 64}, 202.4),
        ({"name": "qablora", "rank": 64}, 29.1),
        ({"name": "qablora", "rank": 64, "pool": 32, "repeat": 1}, 89.3),
    ],
)
def test_trainable_parameters_of_llama_7b(method, millions):
    settings = plan(llama(32), **method)
    assert len(settings) == 224
    assert round(sum(tile.parameters for tile in settings.values()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("qlora", {"pool": 1, "repeat": 1, "inner": 8, "shapes": {"A": (8, 11008), "B": (4096, 8)}}),
        ("qbara", {"pool": 2, "repeat": 2, "inner": 16, "shapes": {"A": (16, 5504), "B": (2048, 16)}}),
        ("qalora", {"pool": 32, "repeat": 1, "inner": 8, "shapes": {"A": (8, 344), "B": (4096, 8)}}),
        ("qahira", {"pool": 4, "repeat": 8, "inner": None, "shapes": {"A": (512, 2752)}}),
        ("qablora", {"pool": 4, "repeat": 8, "inner": 8, "shapes": {"A": (8, 2752), "B": (512, 8)}}),
    ],
)
def test_defaults_of_each_method(method, expected):
    tile = plan(name=method, rank=8, alpha=4.0)["model.layers.0.mlp.down_proj"]
    assert {"pool": tile.pool, "repeat": tile.repeat, "inner": tile.inner, "shapes": tile.shapes()} == expected
    assert tile.scale == 0.5


def test_rank_of_qahira_sets_the_scale_alone():
    path = "model.layers.0.self_attn.q_proj"
    low, high = plan(name="qahira", rank=8)[path], plan(name="qahira", rank=64)[path]
    assert low.shapes() == high.shapes()
    assert low.scale == 8 * high.scale


def test_mean_pooling_divides_the_tile_scale_and_sum_does_not():
    path = "model.layers.0.self_attn.q_proj"
    assert plan(name="qalora", rank=64, alpha=16.0)[path].tile_scale == 0.25 / 32
    assert plan(name="qalora", rank=64, alpha=16.0, pool_mode="sum")[path].tile_scale == 0.25


def test_later_rules_win_setting_by_setting():
    settings = plan(
        rank=64,
        alpha=16.0,
        schedule=[
            {"layers": "attention", "rank": 32, "alpha": 8.0},
            {"layers": ["q_proj", "v_proj"], "depth": [2, 3], "rank": 8},
            {"layers": "down_proj", "skip": True},
            {"layers": "down_proj", "depth": [3, 3], "skip": False},
        ],
    )
    ranks = {path.removeprefix("model.layers."): (tile.rank, tile.alpha) for path, tile in settings.items()}
    assert ranks["1.self_attn.q_proj"] == (32, 8.0)
    assert ranks["2.self_attn.q_proj"] == ranks["3.self_attn.v_proj"] == (8, 8.0)
    assert ranks["2.self_attn.k_proj"] == (32, 8.0)
    assert ranks["0.mlp.gate_proj"] == (64, 16.0)
    assert [path for path in ranks if "down_proj" in path] == ["3.mlp.down_proj"]
    assert list(settings) == [layer.path for layer in llama() if layer.path in settings], "not in model order"


def test_balance_and_tiles_by_schedule():
    qbara = plan(name="qbara", rank=8, schedule=[{"layers": "mlp", "balance": 4}])
    assert qbara["model.layers.0.mlp.up_proj"].shapes() == {"A": (32, 1024), "B": (2752, 32)}
    assert qbara["model.layers.0.self_attn.q_proj"].shapes() == {"A": (16, 2048), "B": (2048, 16)}
    qahira = plan(name="qahira", schedule=[{"depth": [0, 1], "pool": 8, "repeat": 16}])
    assert qahira["model.layers.1.self_attn.q_proj"].shapes() == {"A": (256, 512)}
    assert qahira["model.layers.2.self_attn.q_proj"].shapes() == {"A": (512, 1024)}


def test_layers_outside_the_decoder_have_no_depth():
    layers = [*llama(2), LinearShape("lm_head", 4096, 32000, None)]
    settings = plan(layers, rank=8, schedule=[{"depth": [0, 1], "rank": 4}])
    assert settings["lm_head"].rank == 8
    assert settings["model.layers.1.mlp.up_proj"].rank == 4


TYPES = "linear layers of this model: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"targets": ["q_proj", "v_prj"]},
            f"method.targets: 'v_prj' matches no layer; {TYPES}; did you mean 'v_proj'?",
        ),
        ({"targets": "fc1"}, f"method.targets: 'fc1' matches no layer; {TYPES}"),
        ({"targets": []}, f"method.targets: the list is empty; {TYPES}"),
        (
            {"schedule": [{"layers": "atention", "rank": 8}]},
            f"method.schedule.0.layers: 'atention' matches no layer; {TYPES}; did you mean 'attention'?",
        ),
        (
            {"targets": "attention", "schedule": [{"rank": 8}, {"layers": "mlp", "rank": 8}]},
            "method.schedule.1: matches none of the layers that method.targets selects",
        ),
        (
            {"schedule": [{"depth": [2, 4], "rank": 8}]},
            "method.schedule.0.depth: got [2, 4], must end at 3 or before, the last decoder layer",
        ),
        (
            {"schedule": [{"skip": True}]},
            "method.schedule: every targeted layer is skipped, nothing is left to train",
        ),
    ],
)
def test_refusals(method, message):
    assert refusal(**method) == message


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(UserError, match=r"^method.targets: the model has no linear layer"):
        plan_adapters(make_method(), [])


# SmolLM2-like sizes with a head count that makes k_proj narrow, and an mlp of no round size.
ODD = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (576, 192), "mlp.down_proj": (1500, 576)}


def test_every_indivisible_layer_is_gathered_into_one_error():
    lines = refusal(llama(3, ODD), name="qahira", pool=32, schedule=[{"depth": [2, 2], "repeat": 7}]).splitlines()
    assert lines == [
        "method.pool: 32 does not divide in_features 1500 of model.layers.0.mlp.down_proj and 2 more down_proj; "
        "nearest that does: 30 or 50",
        "method.schedule.0.repeat: 7 does not divide out_features 576 of model.layers.2.self_attn.q_proj; "
        "nearest that does: 6 or 8",
        "method.schedule.0.repeat: 7 does not divide out_features 192 of model.layers.2.self_attn.k_proj; "
        "nearest that does: 6 or 8",
        "method.schedule.0.repeat: 7 does not divide out_features 576 of model.layers.2.mlp.down_proj; "
        "nearest that does: 6 or 8",
    ]


def test_a_balance_must_divide_both_sizes_and_the_nearest_do():
    """16 divides 576 and 192, but of 1500 and 576 only the divisors of 12 divide both."""
    assert refusal(llama(1, ODD), name="qbara", balance=16) == (
        "method.balance: 16 does not divide in_features 1500 and out_features 576 of model.layers.0.mlp.down_proj; "
        "nearest that does: 12"
    )


def test_a_balance_that_divides_only_the_inputs_is_refused():
    narrow = [LinearShape("model.layers.0.self_attn.v_proj", 64, 6, 0)]
    assert refusal(narrow, name="qbara", balance=4) == (
        "method.balance: 4 does not divide in_features 64 and out_features 6 of model.layers.0.self_attn.v_proj; "
        "nearest that does: 2"
    )


def test_a_default_that_does_not_fit_is_refused_too():
    assert refusal(llama(1, ODD), name="qalora").startswith("method.pool: 32 does not divide in_features 1500 of")


def test_settings_survive_json():
    for method in ("qlora", "qbara", "qalora", "qahira", "qablora"):
        tile = plan(name=method, dropout=0.1, alpha=3.3)["model.layers.0.mlp.up_proj"]
        assert TileSettings.from_dict(json.loads(json.dumps(tile.to_dict()))) == tile
        assert "use_rslora" not in tile.to_dict(), "checkpoints of earlier versions do not have it"
    tile = plan(name="qablora", use_rslora=True, alpha=3.3)["model.layers.0.mlp.up_proj"]
    assert TileSettings.from_dict(json.loads(json.dumps(tile.to_dict()))) == tile
    assert tile.scale == 3.3 / 8 and tile.alpha_at(16) / 16**0.5 == tile.scale


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": 3}, "adapter_config.json: Value error, pool 3 does not divide in_features 64"),
        ({"pool": "2"}, "adapter_config.json: pool: Input should be a valid integer"),
        ({"rank": 0}, "adapter_config.json: rank: Input should be greater than 0"),
        ({"alpha": float("inf")}, "adapter_config.json: alpha: Input should be a finite number"),
        ({"pool_mode": "max"}, "adapter_config.json: pool_mode: Input should be 'mean' or 'sum'"),
        ({"bias": True}, "adapter_config.json: bias: Extra inputs are not permitted"),
        ({"pool": 0, "rank": 0}, "pool: Input should be greater than 0; rank: Input should be greater than 0"),
    ],
)
def test_damaged_settings_are_refused(changes, message):
    fields = {"in_features": 64, "out_features": 64, "pool": 2, "repeat": 2, "rank": 4, "alpha": 8.0, "inner": 8}
    with pytest.raises(UserError) as caught:
        TileSettings.from_dict({**fields, **changes}, "adapter_config.json")
    assert message in str(caught.value) and caught.value.exit_code == 2


def test_planning_needs_no_torch():
    """`validate` plans from a config.json alone and must start quickly."""
    code = "import sys, dist_qft.methods.adapters.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
