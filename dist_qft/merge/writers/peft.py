"""`--to peft`: a stock PEFT LoRA folder, every tile adapter as the plain LoRA pair that has the same dW (`lora_twin`).

Nothing is merged: the base stays as it is.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.schema import ModelConfig, RunConfig
from dist_qft.errors import CorruptFileError
from dist_qft.merge.difference import Difference
from dist_qft.merge.live_model import LiveModel
from dist_qft.merge.merged_weight import require_numbers
from dist_qft.merge.names import portable_name
from dist_qft.merge.probe import logits_of
from dist_qft.merge.recipe import Kind, MergeRequest, Recipe
from dist_qft.merge.target import CardText, Converted, OpenResult, Probe, Target
from dist_qft.merge.token_rows import TokenRowsInUse, add_token_rows, reading
from dist_qft.merge.writers.lora_twin import PLAIN, lora_difference, lora_twin
from dist_qft.merge.writers.peft_support import require_low_rank, require_peft_support, require_token_support
from dist_qft.merge.writers.safetensors_folder import SafetensorsFolder
from dist_qft.methods.adapters.attach import AdapterSet
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.methods.adapters.tile_adapter import TileAdapter
from dist_qft.tuned_model.peft_lora import PEFT_CONFIG

_STEM = "adapter_model"
_PREFIX = "base_model.model."


class PeftTarget(Target):
    """The adapters alone, as LoRA pairs for PEFT and for servers that read its folders."""

    name = "peft"
    default_name = "merged-peft"
    card = CardText(
        "python",
        'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{name}")  # vLLM: --lora-modules',
        relation="adapter",
        library="peft",
    )

    def recipe(
        self, request: MergeRequest, config: RunConfig, base: BaseModel, tiles: Mapping[str, TileSettings]
    ) -> Recipe:
        for part in (base.config, base.config.get_text_config()):
            require_peft_support(part.model_type, tiles)
        for path, settings in tiles.items():
            require_low_rank(path, settings)
        if config.method.tokens_to_train:
            require_token_support(base)
        return Recipe(request, "lora", tiles, {}, config.quantization)

    def convert(self, live: LiveModel, recipe: Recipe, config: RunConfig, probe: Probe) -> Converted:
        lora, rows = lora_twin(live.adapters), {path: found.live for path, found in live.token_rows.items()}
        difference = lora_difference(live, lora)
        if dist.get_rank() == 0:
            for path, found in live.token_rows.items():
                add_token_rows(difference, rows[path], found)
        logits = _logits_with(live, lora, rows, probe)
        return Converted(logits, difference, PeftWriter(lora, live.token_rows, config.model))

    def read_back(self, result: Path, kind: Kind, live: LiveModel, probe: Probe) -> tuple[Difference, Tensor]:
        tiles = {path: adapter.settings for path, adapter in live.adapters.by_path.items()}
        lora, rows = read_lora(result, tiles, live.token_rows)
        lora.to(probe.device)
        difference = lora_difference(live, lora)
        for path, found in live.token_rows.items():
            add_token_rows(difference, rows[path], found)
        return difference, _logits_with(live, lora, rows, probe)

    def hints(self, recipe: Recipe, config: RunConfig) -> list[str]:
        base, result = Path(config.model.path), recipe.request.path
        lines = [f"the certificate's logits are those on the base as this run held it ({config.quantization.linear})"]
        if config.method.tokens_to_train:
            lines.append("PEFT reads the rows of method.train_tokens, other readers of LoRA folders may not")
        if base.suffix != ".gguf":
            return lines
        load = f"AutoModelForCausalLM.from_pretrained('{base.absolute().parent}', gguf_file='{base.name}')"
        return [*lines, f"PEFT cannot open a GGUF base by itself: PeftModel.from_pretrained({load}, '{result}') works"]


def _logits_with(live: LiveModel, lora: AdapterSet, rows: Mapping[str, Tensor], probe: Probe) -> Tensor:
    """Logits of the base with other adapters and rows of its tables in place of its own. Collective."""
    lora.attach(live.base.model)
    ids = {path: found.ids for path, found in live.token_rows.items()}
    with live.adapters.disabled(), reading(live.base, ids, rows):
        logits = logits_of(live.base, probe.ids, probe.device)
    lora.detach()
    return logits


class PeftWriter:
    """A writer of one folder from plain LoRAs and trained rows; see `target.Writer`. It needs nothing of the base."""

    def __init__(self, lora: AdapterSet, rows: Mapping[str, TokenRowsInUse], model: ModelConfig) -> None:
        self._adapters, self._rows, self._model = lora.by_path, rows, model

    def notes(self) -> list[str]:
        return []

    def wanted(self, path: str) -> tuple[str, ...]:
        return ()

    def open(self, temporary: Path) -> OpenResult:
        temporary.mkdir()
        config = peft_config({path: lora.settings for path, lora in self._adapters.items()}, self._model)
        if self._rows:
            config["trainable_token_indices"] = {path: rows.ids.tolist() for path, rows in self._rows.items()}
        (temporary / PEFT_CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        tensors = {
            f"{_PREFIX}{path}.lora_{name}.weight": parameter.detach().cpu()
            for path, lora in self._adapters.items()
            for name, parameter in lora.named_parameters()
        }
        tensors |= {_rows_name(path): rows.live for path, rows in self._rows.items()}
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


def peft_config(settings: Mapping[str, TileSettings], model: ModelConfig) -> dict[str, Any]:
    """PEFT's adapter_config.json of LoRAs that all have the same rank and alpha."""
    ((rank, alpha),) = {(lora.rank, lora.alpha) for lora in settings.values()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": portable_name(model.path),
        "revision": model.revision,
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
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _rows_name(path: str) -> str:
    """PEFT's name of the rows that it puts in place of a table's own; it calls them a delta all the same."""
    return f"{_PREFIX}{path}.token_adapter.trainable_tokens_delta"


def read_lora(
    folder: Path, tiles: Mapping[str, TileSettings], trained: Mapping[str, TokenRowsInUse]
) -> tuple[AdapterSet, dict[str, Tensor]]:
    """The adapters and rows of such a folder, for a check of the written folder.

    `tiles` gives the layers' sizes, `trained` the rows that must be there.
    """
    try:
        config = json.loads((folder / PEFT_CONFIG).read_bytes())
        tensors = load_file(folder / f"{_STEM}.safetensors")
        twins = {}
        for path in config["target_modules"]:
            rank = config["rank_pattern"].get(path, config["r"])  # older results have patterns
            alpha = config["alpha_pattern"].get(path, config["lora_alpha"])
            changes = {"rank": rank, "inner": rank, "alpha": alpha, **PLAIN}
            twins[path] = TileAdapter(tiles[path].model_copy(update=changes))
        lora = AdapterSet(twins)
        own = {f"{_PREFIX}{path}.lora_{n}.weight": f"{path}.{n}" for path in twins for n in ("A", "B")}
        rows = {path: tensors.pop(_rows_name(path)) for path in trained}
        for path, found in trained.items():
            if rows[path].shape != found.live.shape or config["trainable_token_indices"][path] != found.ids.tolist():
                raise ValueError(f"rows of {path} are not those that were trained")
        lora.load_tensors({own[name]: tensor for name, tensor in tensors.items()})
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CorruptFileError(f"{folder}: not a LoRA folder of this merge: {error}") from error
    return lora.eval(), rows


def _plain(value: float) -> float:
    """Whole numbers as integers, as PEFT writes them."""
    return int(value) if value == int(value) else value
