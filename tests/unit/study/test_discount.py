"""Equal discounts: the schedules found, put through the ordinary planner and counted by the papers' formula."""

import re

import pytest

from dist_qft.config.methods.door import make_method
from dist_qft.config.methods.tile_method import TileMethod
from dist_qft.errors import UserError
from dist_qft.methods.adapters.schedule import LinearShape, plan_adapters
from dist_qft.study.discount import discount_rules
from dist_qft.study.groups import depth_groups, group_named, kept_shares


def decoder(depth: int, width: int, kv: int, ffn: int) -> list[LinearShape]:
    sizes = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (width, kv), "self_attn.v_proj": (width, kv)}
    sizes |= {"self_attn.o_proj": (width, width)}
    sizes |= {"mlp.gate_proj": (width, ffn), "mlp.up_proj": (width, ffn), "mlp.down_proj": (ffn, width)}
    return [
        LinearShape(f"model.layers.{index}.{name}", *size, index)
        for index in range(depth)
        for name, size in sizes.items()
    ]


SMOLLM2 = decoder(30, 576, 192, 1536)
LLAMA_8B = decoder(32, 4096, 1024, 14336)
SMALL = decoder(6, 128, 64, 384)
METHODS = {
    "qlora": make_method(name="qlora", rank=8, alpha=8),
    "qbara": make_method(name="qbara", rank=8, alpha=8, balance=2),
    "qalora": make_method(name="qalora", rank=8, alpha=8, pool=32),
    "qahira": make_method(name="qahira", pool=4, repeat=8),
    "qablora": make_method(name="qablora", rank=64, alpha=8, pool=4, repeat=8),
}


def size(method: TileMethod, layer: LinearShape, settings) -> int:
    """Trainables of one layer by the formulas of the papers, not by the planner's own count."""
    d_in, d_out = layer.in_features, layer.out_features
    return {
        "qlora": settings.rank * (d_in + d_out),
        "qbara": settings.rank * (d_in + d_out),
        "qalora": settings.rank * (d_in // settings.pool + d_out),
        "qahira": d_in * d_out // (settings.repeat * settings.pool),
        "qablora": settings.rank * (d_in // settings.pool + d_out // settings.repeat),
    }[method.name]


def planned(method: TileMethod, layers: list[LinearShape], rules: list[dict]):
    tree = method.model_dump(exclude_unset=True)
    return plan_adapters(make_method(**tree, schedule=rules), layers)


MODELS = {"smollm2": SMOLLM2, "llama-8b": LLAMA_8B, "small": SMALL}


@pytest.mark.parametrize(
    ("name", "discount", "model"),  # each two of them together once
    [
        (name, discount, list(MODELS)[(n + d) % 3])
        for n, name in enumerate(METHODS)
        for d, discount in enumerate((0.05, 0.15, 0.25))
    ],
)
def test_rows_of_one_discount_have_equal_totals(name, discount, model):
    method, layers = METHODS[name], MODELS[model]
    reference = plan_adapters(method, layers)
    total = sum(size(method, layer, reference[layer.path]) for layer in layers)
    totals = []
    for group in ("attention", "mlp", "early", "middle", "late"):
        try:
            rules = discount_rules(reference, layers, group_named(group, layers), discount, "absolute")
        except UserError as error:
            assert "largest possible" in str(error) or "within 0.5%" in str(error)
            continue
        plan = planned(method, layers, rules)
        chosen = group_named(group, layers)
        assert {path: s for path, s in plan.items() if path in {x.path for x in layers if x not in chosen}} == {
            layer.path: reference[layer.path] for layer in layers if layer not in chosen
        }
        totals.append(sum(size(method, layer, plan[layer.path]) for layer in layers))
    assert len(totals) >= 3
    assert max(totals) - min(totals) <= 0.01 * total
    assert totals == pytest.approx([(1 - discount) * total] * len(totals), rel=0.01)


def test_a_relative_discount_is_of_the_group_alone():
    reference = plan_adapters(METHODS["qlora"], SMOLLM2)
    for group in ("attention", "mlp", "late"):
        rules = discount_rules(reference, SMOLLM2, group_named(group, SMOLLM2), 0.4, "relative")
        kept = kept_shares(reference, planned(METHODS["qlora"], SMOLLM2, rules), SMOLLM2)
        assert kept[group] == pytest.approx(0.6, abs=0.01)


def test_the_cut_is_spread_over_the_depth_and_the_scale_stays():
    reference = plan_adapters(METHODS["qbara"], SMOLLM2)
    rules = discount_rules(reference, SMOLLM2, group_named("mlp", SMOLLM2), 0.25, "absolute")
    plan = planned(METHODS["qbara"], SMOLLM2, rules)
    kept = kept_shares(reference, plan, SMOLLM2)
    assert {name: kept[name] for name in ("early", "middle", "late")} == pytest.approx(
        {"early": 0.75, "middle": 0.75, "late": 0.75}, abs=0.01
    )
    ranks = {plan[layer.path].rank for layer in SMOLLM2 if "mlp" in layer.path}
    assert len(ranks) == 2 and max(ranks) - min(ranks) == 1
    assert {settings.scale for settings in plan.values()} == {1.0}


def test_shares_are_after_over_reference():
    method = METHODS["qlora"]
    reference = plan_adapters(method, SMALL)
    plan = planned(
        method, SMALL, [{"layers": "mlp", "rank": 2}, {"layers": "attention", "depth": [0, 1], "skip": True}]
    )
    attention = sum(layer.in_features + layer.out_features for layer in SMALL if "attn" in layer.path)
    mlp = sum(layer.in_features + layer.out_features for layer in SMALL if "mlp" in layer.path)
    expected = {
        "total": (attention * 4 / 6 + mlp / 4) / (attention + mlp),
        "attention": 4 / 6,
        "mlp": 1 / 4,
        "early": mlp / 4 / (attention + mlp),
        "middle": (attention + mlp / 4) / (attention + mlp),
        "late": (attention + mlp / 4) / (attention + mlp),
    }
    assert kept_shares(reference, plan, SMALL) == pytest.approx(expected)


def test_a_discount_that_the_group_does_not_hold():
    reference = plan_adapters(METHODS["qlora"], SMOLLM2)
    with pytest.raises(UserError) as refusal:
        discount_rules(reference, SMOLLM2, group_named("attention", SMOLLM2), 0.5, "absolute")
    found = re.fullmatch(
        r"a discount of 0\.5 of the trainables is 1,221,120, attention has 921,600 of 2,442,240 and can give up "
        r"806,400 at most; largest possible: (0\.\d+)",
        str(refusal.value),
    )
    assert float(found[1]) == pytest.approx(806400 / 2442240, abs=1e-3)


def test_a_discount_between_two_steps():
    layers = decoder(1, 64, 64, 64)
    reference = plan_adapters(make_method(name="qlora", rank=2, alpha=2), layers)
    with pytest.raises(
        UserError,
        match=r"^no choice of ranks takes 50 .* within 0\.5% .*: try a discount of 0\.0\d+$",
    ):
        discount_rules(reference, layers, group_named("mlp", layers), 50 / 1792, "absolute")


def test_depth_groups_cover_each_layer_once():
    assert [group.depth for group in depth_groups(SMOLLM2, 3)] == [(0, 9), (10, 19), (20, 29)]
    assert [group.depth for group in depth_groups(LLAMA_8B, 3)] == [(0, 10), (11, 20), (21, 31)]
    assert [group.name for group in depth_groups(SMALL, 4)] == ["layers 0-1", "layers 2-2", "layers 3-3", "layers 4-5"]
    with pytest.raises(UserError, match="got 7 parts, the model has 6 decoder layers"):
        depth_groups(SMALL, 7)
