"""A study on the tiny model, as the files a user would write."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from dist_qft.config.load import change_config, save_config
from tests.support.tiny_model import tiny_config

PRESETS = [
    {"preset": "rank_by_type", "values": [1, 2]},
    {"preset": "rank_by_depth", "values": [1]},
    {"preset": "balance_by_type", "values": [1, 4]},
    {"preset": "balance_by_depth", "values": [1, 4]},
]

SEARCHED_ON = {"data.eval": {"path": "tune.jsonl"}, "data.eval_samples": 0}  # held-out data of a search


def write_study(
    folder: Path, model: Path, *, method: dict | None = None, train: dict | None = None, **keys: Any
) -> Path:
    """`study.yaml` and its `base.yaml` in `folder`; keyword arguments are keys of the study file."""
    base = tiny_config(
        model,
        folder / "reference",
        train={"max_steps": 2, "global_batch_size": 4, "per_device_train_batch_size": 4, **(train or {})},
        data={"eval_samples": 8, "cache_dir": None},
        sharding={"engine": "replicated"},
    )
    base = change_config(base, {"method": method or {"name": "qbara", "rank": 4, "alpha": 4, "balance": 2}})
    save_config(base, folder / "base.yaml")
    tree = {"base": "base.yaml", "output_dir": str(folder / "out"), "seeds": [0, 1], "presets": PRESETS, **keys}
    with open(folder / "study.yaml", "w", encoding="utf-8") as file:
        yaml = YAML(typ="safe")
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False
        yaml.dump({key: value for key, value in tree.items() if value is not None}, file)
    return folder / "study.yaml"
