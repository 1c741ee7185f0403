"""The tile factors: which ones each method uses, their defaults, and the layer sizes that they must divide."""

from typing import Any

from dist_qft.config.schema import MethodConfig, MethodName, ScheduleRule

# What shapes each method's tile, its default, and the sizes of a layer that it must divide.
FACTORS: dict[MethodName, dict[str, tuple[int, tuple[str, ...]]]] = {
    "qlora": {},
    "qbara": {"balance": (2, ("in_features", "out_features"))},
    "qalora": {"pool": (32, ("in_features",))},
    "qahira": {"pool": (4, ("in_features",)), "repeat": (8, ("out_features",))},
}

# Methods whose tiles are meant to be the base's blocks, so that a merge folds them exactly.
EXACT_METHODS = ("qalora", "qahira")
KNOBS = ("rank", "alpha", "balance", "pool", "repeat")


def method_defaults(name: MethodName) -> dict[str, int]:
    """The tile factors that a method uses, with their defaults; a factor that is not a key is not used."""
    return {knob: default for knob, (default, _) in FACTORS[name].items()}


def effective(method: MethodConfig) -> tuple[int, int, int]:
    """(pool, repeat, balance) of a layer that no schedule rule touches."""
    return tile_factors({**method_defaults(method.name), **given_factors(method)})


def given_factors(section: MethodConfig | ScheduleRule) -> dict[str, Any]:
    """The knobs that a config section sets."""
    return {knob: value for knob in KNOBS if (value := getattr(section, knob)) is not None}


def tile_factors(values: dict[str, Any]) -> tuple[int, int, int]:
    """(pool, repeat, balance): Q-BaRA's balance is both factors, what a method does not use is 1."""
    balance = values.get("balance", 1)
    return values.get("pool", balance), values.get("repeat", balance), balance
