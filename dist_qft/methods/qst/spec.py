"""The side network of a run as a `TrainableSpec`: its settings and sizes, from the base's shapes alone."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import nn
from transformers import PretrainedConfig

from dist_qft.base_model.base_settings import digest_of_config
from dist_qft.base_model.dry_run import masks_without_data, needs_data
from dist_qft.base_model.model_config import library_refusal
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.base_model.sources import TensorSource
from dist_qft.config.methods.qst import QstConfig
from dist_qft.data.dataset import TokenDataset
from dist_qft.errors import UserError
from dist_qft.methods.forward import BaseForward, Forward
from dist_qft.methods.qst.cached_forward import CachedForward
from dist_qft.methods.qst.downsample import pool
from dist_qft.methods.qst.hidden_cache import CacheLayout, HiddenCache, cache_folder, require_cache_space
from dist_qft.methods.qst.network import BaseStates, SideNetwork
from dist_qft.methods.qst.pruning import start_from_base
from dist_qft.methods.qst.settings import SideSettings
from dist_qft.methods.qst.sizes import dense_twin, shrunken_config
from dist_qft.methods.trainable import Counts, TrainableSpec, TrainingParts, section


@dataclass(frozen=True)
class SideSpec(TrainableSpec[SideNetwork]):
    """Settings and sizes of a side network, and how this run starts and feeds it.

    Attributes:
        config: the shrunken configuration.
        width, out_width: of the base's layers and of its last hidden states.
        init: random values, or every r-th row and column of the base's own weights.
        cache: "disk" keeps the base's hidden states, so that epochs after the first do not run the base.
    """

    settings: SideSettings
    config: PretrainedConfig
    width: int
    out_width: int
    init: Literal["random", "pruned"] = "random"
    cache: Literal["none", "disk"] = "none"

    peft_type: ClassVar[str] = "DIST_QFT_QST"
    backward_through_base: ClassVar[bool] = False
    title: ClassVar[str] = "side network"

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every trainable by name, in model order."""
        with torch.device("meta"):
            network = SideNetwork(self.settings, self.config, self.width, self.out_width)
        return {name: tuple(parameter.shape) for name, parameter in network.named_tensors()}

    def names(self) -> list[str]:
        """The names of all trainables."""
        return list(self.shapes)

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
        for name, wanted in self.describe().items():
            found = section(stored, name)
            for key in sorted(set(wanted) | set(found)):
                if wanted.get(key) != found.get(key):
                    return f"the side network's {key} was {found.get(key)}, the config says {wanted.get(key)}"
        return None

    @property
    def leaves_base_clean(self) -> bool:
        """False: a cached run tells the engine to keep the head gathered."""
        return False

    def counts(self, base: BaseModel) -> Counts:
        """Trainable parameters by part and by depth; one row for each part."""
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
        return Counts(parts, by_depth, rows)

    def summary(self) -> str:
        """The side network's size in words."""
        layers, width = self.config.num_hidden_layers, self.config.hidden_size
        return f"a side network of {layers} layers, {width} wide (the base is {self.width})"

    def warnings(self, base: BaseModel) -> list[str]:
        """A line on the layers beside a mixture of experts, which are others than the base's."""
        return ["method.name: the side layers beside this mixture of experts are dense"] if base.experts else []

    def build(self, seed: int) -> SideNetwork:
        """A fresh side network on the CPU."""
        return SideNetwork.build(self.settings, self.config, width=self.width, out_width=self.out_width, seed=seed)

    def start_from_base(self, trainables: SideNetwork, base: BaseModel, source: TensorSource) -> None:
        """Overwrite layers and final norm by the base's own weights, with `init: pruned`."""
        if self.init == "pruned":
            start_from_base(trainables, base, source)

    def cache_layout(self, dtype: torch.dtype) -> CacheLayout:
        """The layout of the hidden-state cache for this compute dtype."""
        depth = self.config.num_hidden_layers + 1
        if self.settings.pools:
            return CacheLayout(depth, self.config.hidden_size, self.out_width, self.settings.downsample, dtype)
        return CacheLayout(depth, self.width, self.out_width, "none", dtype)

    def disk_notes(self, output_dir: Path, base: BaseModel, data: TokenDataset) -> list[str]:
        """A line on the hidden-state cache, if the run keeps one. UserError if the disk has no room for it."""
        if self.cache == "none":
            return []
        size, folder = self.cache_layout(base.dtype).bytes_of(data.lengths), cache_folder(output_dir)
        require_cache_space(folder, size)
        return [f"hidden-state cache {folder}: {size / 2**30:,.2f} GiB for {len(data):,} rows"]

    def forward(self, parts: TrainingParts[SideNetwork]) -> Forward:
        """The forward pass through the base, or with `cache: disk` from those of its hidden states that are stored."""
        base, data, folder = parts.base, parts.data, cache_folder(parts.output_dir)
        through_base = BaseForward(base, parts.device)
        if self.cache == "none":
            return through_base
        layout = self.cache_layout(base.dtype)
        states_of = {"base": base.fingerprint, "settings": digest_of_config(base.config), "data": data.digest}
        cache = HiddenCache(folder, layout, data.lengths, rank=dist.get_rank(), states_of=states_of)
        base.notes.append(f"hidden-state cache {folder}: {cache.filled:,} of {len(data):,} rows are there")
        side = parts.trainables
        return CachedForward(through_base, side, cache, parts.device, parts.keep_head, base.mask_of_samples)


def side_network_spec(method: QstConfig, base: BaseModel) -> SideSpec:
    """The side network that a config's `method` section asks for.

    Raises:
        UserError: the reduction does not fit the base's widths, the family has widths that we do not know, or the base
            cannot be pruned to that size.
    """
    spec = replace(_spec(SideSettings.of(method), base), init=method.init, cache=method.cache)
    if spec.init == "pruned" and base.experts:
        raise UserError("method.init: got 'pruned', must be random beside a mixture of experts: side layers are dense")
    wide, heads = base.config.get_text_config().num_attention_heads, spec.config.num_attention_heads
    if spec.init == "pruned" and heads != wide:
        raise UserError(
            f"method.init: pruned keeps the base's {wide} heads, but with method.reduction {spec.settings.reduction} "
            f"the side network has {heads}; choose a smaller reduction, or init random"
        )
    return spec


def stored_side_network(stored: Mapping[str, Any], base: BaseModel, where: str) -> SideSpec:
    """The spec that `describe` wrote into a checkpoint; `where` names the file, for messages."""
    settings = SideSettings.from_dict(stored.get("side_network"), where)
    try:
        spec = _spec(settings, base)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if difference := spec.difference(stored):
        raise UserError(f"{where}: {difference}")
    return spec


def _spec(settings: SideSettings, base: BaseModel) -> SideSpec:
    kind = base.config.model_type
    if not base.layers_path.endswith("layers"):
        raise UserError(f"method.name: qst needs a decoder with 'layers', which model type '{kind}' does not have")
    with library_refusal(f"method.name: qst does not know how to shrink model type '{kind}'"):
        config = shrunken_config(dense_twin(base.config) if base.experts else base.config, settings.reduction)
        spec = SideSpec(settings, config, base.config.get_text_config().hidden_size, base.embedding.embedding_dim)
        if not base.experts:
            _check_linears(spec, base)
    return spec


def _check_linears(spec: SideSpec, base: BaseModel) -> None:
    """Every linear layer must have shrunk: a family may have widths under names that `sizes` does not know."""
    with torch.device("meta"):
        network = SideNetwork(spec.settings, spec.config, spec.width, spec.out_width)
    wide = dict(base.layers[0].named_modules())
    for name, narrow in network.layers[0].named_modules():
        if isinstance(narrow, nn.Linear) and narrow.in_features * spec.settings.reduction != wide[name].in_features:
            raise UserError(
                f"method.name: qst does not know how to shrink model type '{base.config.model_type}': "
                f"{name} takes {narrow.in_features} inputs beside the base's {wide[name].in_features}"
            )
    _dry_run(network, spec)


@torch.no_grad()
def _dry_run(network: SideNetwork, spec: SideSpec) -> None:
    """Run a side network on meta, without data; what its family's code cannot do at these sizes is an error of it."""
    with torch.device("meta"), masks_without_data():
        layer = pool(spec.settings, torch.empty(1, 4, spec.width))
        states = BaseStates([layer] * (len(network.layers) + 1), torch.empty(1, 4, spec.out_width))
        try:
            network(states, None)
        except Exception as error:
            if not needs_data(error):
                raise
