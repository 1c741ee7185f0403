"""`--to peft`: a stock PEFT LoRA folder, every tile adapter rewritten as the plain LoRA pair that has the same dW.

Q-BaRA's and QA-LoRA's dW is a LoRA of rank lambda * r: A' repeats A's columns (divided by p for the mean), B' repeats
B's rows. QA-HiRA's single matrix M is one of rank min(d_out / k, d_in / p): the side with fewer tiles keeps M, the
other becomes a fixed matrix of ones that pools or repeats. Nothing is merged: the base stays as it is.
"""

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.schema import RunConfig
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.merge.difference import Difference
from dist_qft.merge.live_model import LiveModel
from dist_qft.merge.merged_weight import require_numbers
from dist_qft.merge.probe import logits_of
from dist_qft.merge.recipe import Kind, MergeRequest, Recipe
from dist_qft.merge.target import Converted, OpenResult, Probe, Target
from dist_qft.merge.writers.folder import require_folder
from dist_qft.merge.writers.safetensors_folder import SafetensorsFolder
from dist_qft.methods.adapters.attach import AdapterSet
from dist_qft.methods.adapters.exact_fold import tile_rows
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.methods.adapters.tile_adapter import TileAdapter, lora_factors

CONFIG_FILE = "adapter_config.json"
_STEM = "adapter_model"
_PREFIX = "base_model.model."


class PeftTarget(Target):
    """The adapters alone, as LoRA pairs for PEFT and for servers that read its folders."""

    name = "peft"
    default_name = "merged-peft"

    def recipe(
        self, request: MergeRequest, config: RunConfig, base: BaseModel, tiles: Mapping[str, TileSettings]
    ) -> Recipe:
        require_folder(request)
        for path, settings in tiles.items():
            require_low_rank(path, settings)
        return Recipe(request, "lora", tiles, {}, config.quantization)

    def convert(self, live: LiveModel, recipe: Recipe, config: RunConfig, probe: Probe) -> Converted:
        lora = lora_twin(live.adapters)
        logits = _logits_with(live, lora, probe)
        return Converted(logits, lora_difference(live.adapters, lora), PeftWriter(lora, config.model.path))

    def read_back(self, result: Path, kind: Kind, live: LiveModel, probe: Probe) -> tuple[Difference, Tensor]:
        tiles = {path: adapter.settings for path, adapter in live.adapters.by_path.items()}
        lora = read_lora(result, tiles).to(probe.device)
        return lora_difference(live.adapters, lora), _logits_with(live, lora, probe)


def _logits_with(live: LiveModel, lora: AdapterSet, probe: Probe) -> Tensor:
    """Logits of the base with other adapters in place of its own. Collective."""
    lora.attach(live.base.model)
    with live.adapters.disabled():
        logits = logits_of(live.base, probe.ids, probe.device)
    lora.detach()
    return logits


def lora_rank(settings: TileSettings) -> int:
    """Rank of the LoRA that equals this adapter."""
    if settings.inner is not None:
        return settings.inner
    return min(settings.out_features // settings.repeat, settings.in_features // settings.pool)


def require_low_rank(path: str, settings: TileSettings) -> None:
    """Refuse an adapter whose LoRA pair would hold as many numbers as dW itself."""
    rank, rows, columns = lora_rank(settings), settings.out_features, settings.in_features
    if rank * (rows + columns) >= rows * columns:
        raise UserError(
            f"--to peft: dW of {path} has rank {rank}, a LoRA of that rank is no smaller than the {rows} x {columns} "
            "matrix itself; merge --to dense or quantized, or train without this layer (method.targets, or a schedule "
            "rule with skip)"
        )


@torch.no_grad()
def equal_lora(adapter: TileAdapter) -> TileAdapter:
    """The adapter of pool 1 and repeat 1, a LoRA, with the same dW."""
    old = adapter.settings
    if adapter.B is not None:
        left, right = lora_factors(adapter)
    elif old.out_features // old.repeat <= old.in_features // old.pool:
        left = adapter.A.repeat_interleave(old.pool, dim=1) * _mean(old)
        right = torch.eye(adapter.A.shape[0], device=left.device).repeat_interleave(old.repeat, dim=0)
    else:
        left = torch.eye(adapter.A.shape[1], device=adapter.A.device).repeat_interleave(old.pool, dim=1) * _mean(old)
        right = adapter.A.repeat_interleave(old.repeat, dim=0)
    rank = left.shape[0]
    # alpha / rank is what PEFT multiplies by: our own scale has the nominal rank below.
    changes = {"pool": 1, "repeat": 1, "rank": rank, "inner": rank, "alpha": old.scale * rank, "dropout": 0.0}
    twin = TileAdapter(old.model_copy(update=changes)).to(left.device)
    first, second = factors(twin)
    first.copy_(left)
    second.copy_(right)
    return twin


def factors(lora: TileAdapter) -> tuple[Tensor, Tensor]:
    """A and B of an adapter that has both."""
    if lora.B is None:
        raise TypeError("a single-matrix adapter has no B")
    return lora.A, lora.B


def lora_twin(adapters: AdapterSet) -> AdapterSet:
    """All adapters as plain LoRAs."""
    return AdapterSet({path: equal_lora(adapter) for path, adapter in adapters.by_path.items()}).eval()


@torch.no_grad()
def lora_difference(adapters: AdapterSet, lora: AdapterSet) -> Difference:
    """How far the LoRAs' dW is from the exact one: the rounding of A / p to float32."""
    difference = Difference()
    for path, adapter in adapters.by_path.items():
        old, new = adapter.settings, lora.by_path[path]
        left, right = factors(new)
        product = right.double()[:: old.repeat] @ left.double()[:, :: old.pool]
        difference.add(product * new.settings.scale, tile_rows(adapter, 0, old.out_features // old.repeat))
    return difference


class PeftWriter:
    """Writes one folder from plain LoRAs; see `target.Writer`. It needs nothing of the base."""

    def __init__(self, lora: AdapterSet, base_name: str) -> None:
        self._adapters, self._base_name = lora.by_path, base_name

    def notes(self) -> list[str]:
        return []

    def wanted(self, path: str) -> tuple[str, ...]:
        return ()

    def open(self, temporary: Path) -> OpenResult:
        temporary.mkdir()
        config = peft_config({path: lora.settings for path, lora in self._adapters.items()}, self._base_name)
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")
        tensors = {
            f"{_PREFIX}{path}.lora_{name}.weight": parameter.detach().cpu()
            for path, lora in self._adapters.items()
            for name, parameter in lora.named_parameters()
        }
        for name, tensor in tensors.items():
            require_numbers(tensor, name)
        return OpenPeft(temporary, tensors)


class OpenPeft:
    """A folder whose tensors are all known when it is opened; see `target.OpenResult`."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        self.difference = Difference()  # `Converted` has all of it
        self._tensors = tensors
        entries = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        self._files = SafetensorsFolder(folder, _STEM, entries, shard_bytes=sys.maxsize)  # PEFT reads one file

    def write(self, path: str, packed: Mapping[str, Tensor]) -> None:
        raise AssertionError("nothing was wanted")

    def finish(self) -> None:
        for name, tensor in self._tensors.items():
            self._files.write(name, tensor)
        self._files.finish()

    def close(self) -> None:
        self._files.close()


def peft_config(settings: Mapping[str, TileSettings], base_name: str) -> dict:
    """PEFT's adapter_config.json; the most common rank and alpha are the default, layers with others are named."""
    rank = Counter(lora.rank for lora in settings.values()).most_common(1)[0][0]
    alpha = Counter(lora.alpha for lora in settings.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": list(settings),
        "rank_pattern": {path: lora.rank for path, lora in settings.items() if lora.rank != rank},
        "alpha_pattern": {path: _plain(lora.alpha) for path, lora in settings.items() if lora.alpha != alpha},
    }


def read_lora(folder: Path, tiles: Mapping[str, TileSettings]) -> AdapterSet:
    """The adapters of such a folder, for a check of what was written; `tiles` gives the layers' sizes."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
        tensors = load_file(folder / f"{_STEM}.safetensors")
        twins = {}
        for path in config["target_modules"]:
            rank = config["rank_pattern"].get(path, config["r"])
            alpha = config["alpha_pattern"].get(path, config["lora_alpha"])
            changes = {"pool": 1, "repeat": 1, "rank": rank, "inner": rank, "alpha": alpha, "dropout": 0.0}
            twins[path] = TileAdapter(tiles[path].model_copy(update=changes))
        lora = AdapterSet(twins)
        own = {f"{_PREFIX}{path}.lora_{n}.weight": f"{path}.{n}" for path in twins for n in ("A", "B")}
        lora.load_tensors({own[name]: tensor for name, tensor in tensors.items()})
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CorruptFileError(f"{folder}: not a LoRA folder of this merge: {error}") from error
    return lora.eval()


def _mean(settings: TileSettings) -> float:
    return 1 / settings.pool if settings.pool_mode == "mean" else 1.0


def _plain(value: float) -> float:
    """Whole numbers as integers, as PEFT writes them."""
    return int(value) if value == int(value) else value
