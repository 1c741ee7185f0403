"""What a side network for a given base will be, from the base's shapes alone."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.schema import MethodConfig
from dist_qft.errors import UserError
from dist_qft.methods.qst.network import SideNetwork
from dist_qft.methods.qst.settings import SideSettings
from dist_qft.methods.qst.sizes import shrunken_config


@dataclass(frozen=True)
class SidePlan:
    """Settings and sizes of a side network.

    Attributes:
        config: the shrunken configuration.
        width, out_width: of the base's layers and of its last hidden states.
    """

    settings: SideSettings
    config: PretrainedConfig
    width: int
    out_width: int

    peft_type = "DIST_QFT_QST"
    backward_through_base = False

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every trainable by name, in model order."""
        with torch.device("meta"):
            network = SideNetwork(self.settings, self.config, self.width, self.out_width)
        return {name: tuple(parameter.shape) for name, parameter in network.named_tensors()}

    @property
    def parameters(self) -> int:
        """Number of trainable values."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def describe(self) -> dict[str, Any]:
        """The settings, and the sizes that follow from them and the base: to be read, and to be compared."""
        sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        known = {key: getattr(self.config, key) for key in sizes if hasattr(self.config, key)}
        return {"side_network": self.settings.model_dump(), "side_sizes": known}

    def difference(self, stored: Mapping[str, Any]) -> str | None:
        """The first setting or size that is not the stored one."""
        for section, wanted in self.describe().items():
            found = stored.get(section, {})
            for key in sorted(set(wanted) | set(found)):
                if wanted.get(key) != found.get(key):
                    return f"the side network's {key} was {found.get(key)}, the config says {wanted.get(key)}"
        return None

    def counts(self) -> dict[str, Any]:
        """Trainable parameters by part and by depth, and one row for each part, for the plan of a run."""
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        parts = dict.fromkeys((name.partition(".")[0] for name in sizes), 0)
        by_depth = [0] * self.config.num_hidden_layers
        tensors: Counter[str] = Counter()
        for name, size in sizes.items():
            part, index, *_ = [*name.split("."), ""]
            parts[part] += size
            tensors[part] += 1
            if index.isdecimal():
                by_depth[int(index)] += size
        rows = [{"part": part, "tensors": tensors[part], "parameters": count} for part, count in parts.items()]
        return {
            "trainable_parameters_by_layer_type": parts,
            "trainable_parameters_by_depth": by_depth,
            "adapters": rows,
        }

    def summary(self) -> str:
        """The side network's size in words."""
        layers, width = self.config.num_hidden_layers, self.config.hidden_size
        return f"a side network of {layers} layers, {width} wide (the base is {self.width})"

    def build(self, seed: int) -> SideNetwork:
        """A fresh side network on the CPU."""
        return SideNetwork.build(self.settings, self.config, width=self.width, out_width=self.out_width, seed=seed)


def plan_side_network(method: MethodConfig, base: BaseModel) -> SidePlan:
    """The side network that a config's `method` section asks for.

    Raises:
        UserError: the reduction does not fit the base's widths, the family has widths that we do not know, or the base
            cannot be pruned to that size.
    """
    plan = _plan(SideSettings.of(method), base)
    wide, heads = base.config.get_text_config().num_attention_heads, plan.config.num_attention_heads
    if method.init == "pruned" and heads != wide:
        raise UserError(
            f"method.init: pruned keeps the base's {wide} heads, but with method.reduction {plan.settings.reduction} "
            f"the side network has {heads}; choose a smaller reduction, or init random"
        )
    return plan


def stored_side_network(stored: Mapping[str, Any], base: BaseModel, where: str) -> SidePlan:
    """The side network that `describe` has described; `where` names the file, for messages."""
    plan = _plan(SideSettings.from_dict(stored.get("side_network"), where), base)
    if difference := plan.difference(stored):
        raise UserError(f"{where}: {difference}")
    return plan


def _plan(settings: SideSettings, base: BaseModel) -> SidePlan:
    config = shrunken_config(base.config, settings.reduction)
    plan = SidePlan(settings, config, base.config.get_text_config().hidden_size, base.embedding.embedding_dim)
    _check_linears(plan, base)
    return plan


def _check_linears(plan: SidePlan, base: BaseModel) -> None:
    """Every linear layer must have shrunk: a family may have widths under names that `sizes` does not know."""
    with torch.device("meta"):
        network = SideNetwork(plan.settings, plan.config, plan.width, plan.out_width)
    wide = dict(base.layers[0].named_modules())
    for name, narrow in network.decoder.layers[0].named_modules():
        if isinstance(narrow, nn.Linear) and narrow.in_features * plan.settings.reduction != wide[name].in_features:
            raise UserError(
                f"method.name: qst does not know how to shrink model type '{base.config.model_type}': "
                f"{name} takes {narrow.in_features} inputs beside the base's {wide[name].in_features}"
            )
