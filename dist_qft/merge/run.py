"""The merge as a stage: from a checkpoint, or at the end of training, to a published result with its certificate."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.base_model.tokenizer import load_tokenizer
from dist_qft.config.check import merge_obstacle
from dist_qft.config.schema import MergeTarget, RunConfig
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.merge.certificate import Findings, Origin, write_certificate
from dist_qft.merge.collective import Writer, fold_base, total_difference, write_result
from dist_qft.merge.difference import Difference
from dist_qft.merge.probe import as_written, compare_logits, logits_of, probe_ids
from dist_qft.merge.recipe import MergeRequest, Recipe, make_recipe, require_free
from dist_qft.merge.writers.dense import DenseForm
from dist_qft.merge.writers.folder import FolderWriter
from dist_qft.merge.writers.peft import PeftWriter, lora_difference, lora_twin
from dist_qft.merge.writers.quantized import PackedForm
from dist_qft.methods.adapters.adapter_plan import AdapterPlan, stored_adapters
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.ranks.device import compute_dtype, device_for
from dist_qft.ranks.preemption import StopSignal
from dist_qft.ranks.session import session
from dist_qft.ranks.world import World
from dist_qft.storage.checkpoint import ADAPTER_MODEL, Checkpoint
from dist_qft.storage.manifest import sha256_of
from dist_qft.training.run_inputs import RunInputs
from dist_qft.tuned_model.assemble import Assembled, assemble
from dist_qft.tuned_model.trained import check_fingerprint, config_of, find_checkpoint, run_folder


@dataclass(frozen=True)
class MergeInputs:
    """All that is known of a merge before any weight is read and any rank has met another."""

    recipe: Recipe
    config: RunConfig
    world: World
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    skeleton: BaseModel
    plan: AdapterPlan
    checkpoint: Checkpoint

    def must_match(self) -> dict[str, str]:
        """Inputs that must be the same on all ranks, by name."""
        return {
            "merge request": str(self.recipe.request),
            "config": self.config.model_dump_json(),
            "adapter": sha256_of(self.checkpoint.path / ADAPTER_MODEL),
        }


def run_merge(
    source: str, target: str, output: Path | None, *, overwrite: bool, requantize: str | None, dtype: str
) -> None:
    """Merge the adapters of a run (its newest checkpoint) or of one checkpoint into a result.

    Raises:
        UserError: the target cannot hold the merged model, the result exists, the checkpoint is torn, or the adapter
            is another base's; all but the last is said before any weight is read.
    """
    try:
        checkpoint = find_checkpoint(source)
    except CorruptFileError as error:  # the wrong source, as another base's adapter is: name another
        raise UserError(str(error)) from error
    run = run_folder(source)
    path = output or default_path(run, target)
    request = MergeRequest.checked(target, path, overwrite=overwrite, requantize=requantize, dtype=dtype)
    inputs = gather_inputs(request, checkpoint, World.from_environment())
    sharding, must_match = inputs.config.sharding, inputs.must_match()
    with StopSignal() as stop, session(sharding, doing="the merge", must_match=must_match, crash_dir=run, stop=stop):
        execute_merge(inputs, stop)


def default_path(run: Path, target: str) -> Path:
    """Where a result goes if nobody says: into the run's folder."""
    return run / ("merged.gguf" if target == "gguf" else f"merged-{target}")


def gather_inputs(request: MergeRequest, checkpoint: Checkpoint, world: World) -> MergeInputs:
    """Everything that needs no other rank and no weight; what cannot work is refused here."""
    config = config_of(checkpoint)
    if obstacle := merge_obstacle(config):
        raise UserError(f"{checkpoint.path}: {obstacle}")
    require_free(request)
    device = device_for(world, config.sharding.device)
    skeleton = build_skeleton(config.model, config.quantization, compute_dtype(config.train.precision, device))
    plan = stored_adapters(checkpoint.adapter_config, str(checkpoint.path))
    recipe = make_recipe(request, config, skeleton, plan)
    return MergeInputs(recipe, config, world, device, load_tokenizer(config.model), skeleton, plan, checkpoint)


def execute_merge(inputs: MergeInputs, stop: StopSignal) -> dict[str, Any] | None:
    """Load the base, put the adapters on, merge. Collective, in a session; see `merge`."""
    parts = assemble(inputs.config, inputs.skeleton, inputs.plan, inputs.device, stop=stop)
    check_fingerprint(inputs.checkpoint, parts.base)
    parts.load_tensors(inputs.checkpoint.trainables)
    origin = Origin(inputs.config, inputs.checkpoint.path, inputs.checkpoint.state.step)
    return merge(parts, inputs.recipe, origin, inputs.tokenizer, inputs.device, stop)


def recipe_at_end(config: RunConfig, skeleton: BaseModel, tiles: Mapping[str, TileSettings]) -> Recipe | None:
    """The merge that a config asks for after training; raises UserError as `make_recipe` does."""
    settings = config.merge
    if settings.at_end is None:
        return None
    path = Path(settings.path) if settings.path else default_path(Path(config.output_dir), settings.at_end)
    request = MergeRequest(settings.at_end, path, settings.overwrite, dtype=settings.dtype)
    return make_recipe(request, config, skeleton, tiles)


def merge_at_end(inputs: RunInputs, recipe: Recipe, parts: Assembled, step: int, stop: StopSignal) -> None:
    """Merge what a run has just trained and saved at `step`. Collective."""
    origin = Origin(inputs.config, inputs.output_dir / f"checkpoint-{step}", step)
    merge(parts, recipe, origin, inputs.tokenizer, inputs.device, stop)


def merge(
    parts: Assembled,
    recipe: Recipe,
    origin: Origin,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    stop: StopSignal,
) -> dict[str, Any] | None:
    """Fold, write, certify. Collective; returns the certificate on rank 0.

    After an exact merge the base itself is the merged model, and the adapters no longer belong on it.
    """
    started = time.perf_counter()
    parts.base.model.eval()
    parts.trainables.eval()
    ids = probe_ids(tokenizer)
    live = logits_of(parts.base, ids, device)
    if recipe.kind == "lora":
        written, difference, writer = _export_lora(parts, origin, ids, device)
    else:
        written, difference, writer = _merge_weights(parts, recipe, origin, ids, device)
    certificate: dict[str, Any] | None = None

    def certify(result: Path | None) -> None:
        nonlocal certificate
        total = total_difference(difference + writer.difference, device)
        if result is not None:
            findings = Findings(total, compare_logits(live, written, ids), ids, writer.notes())
            certificate = write_certificate(recipe, origin, parts.base.fingerprint, findings, result)

    write_result(parts, writer, recipe, stop, device, certify)
    if certificate is None:
        return None
    seconds = time.perf_counter() - started
    print(f"merged {origin.checkpoint} into {recipe.request.path} ({len(recipe.tiles)} layers, {seconds:.1f} s)")
    print(f"certificate: {certificate['summary']}", flush=True)
    return certificate


def _merge_weights(
    parts: Assembled, recipe: Recipe, origin: Origin, ids: list[int], device: torch.device
) -> tuple[Tensor, Difference, Writer]:
    """Fold in place what folds; the logits of the base as it will be written, and who writes it."""
    parts.engine.release()  # or layers that are still gathered would keep their old zeros
    difference = fold_base(parts, recipe)
    with parts.trainables.disabled(), as_written(parts, recipe.formats, recipe.dtype):
        logits = logits_of(parts.base, ids, device)
    parts.engine.release()
    return logits, difference, _weights_writer(parts, recipe, origin.config)


def _weights_writer(parts: Assembled, recipe: Recipe, config: RunConfig) -> Writer:
    target: MergeTarget = recipe.request.target
    if target == "gguf":
        from dist_qft.merge.writers.gguf import GgufWriter

        return GgufWriter(parts, recipe, Path(config.model.path))
    form = DenseForm(parts, recipe) if target == "dense" else PackedForm(parts, recipe)
    return FolderWriter(form, parts.base, config.model)


def _export_lora(
    parts: Assembled, origin: Origin, ids: list[int], device: torch.device
) -> tuple[Tensor, Difference, Writer]:
    """The adapters as plain LoRAs, the logits with these in their place, and who writes them."""
    lora = lora_twin(parts.trainables)
    lora.attach(parts.base.model)
    with parts.trainables.disabled():
        logits = logits_of(parts.base, ids, device)
    lora.detach()
    return logits, lora_difference(parts.trainables, lora), PeftWriter(lora, origin.config.model.path)
