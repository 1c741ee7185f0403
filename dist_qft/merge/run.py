"""The merge as a stage: from a checkpoint, or at the end of training, to a published result with its certificate."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dist_qft.assemble import ADAPTER_TYPE, Assembled, assemble, check_fingerprint, compute_dtype
from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.checkpoint import ADAPTER_MODEL, TRAINER_STATE
from dist_qft.collectives import require_agreement, told_by
from dist_qft.config.schema import MergeTarget, RunConfig
from dist_qft.errors import UserError
from dist_qft.merge.certificate import Findings, sha256_of, write_certificate
from dist_qft.merge.collective import Writer, fold_base, total_difference, write_result
from dist_qft.merge.dense import DenseForm
from dist_qft.merge.folder import FolderWriter
from dist_qft.merge.peft import PeftWriter, lora_difference, lora_twin
from dist_qft.merge.probe import LogitDifference, as_written, compare_logits, logits_of, probe_ids
from dist_qft.merge.quantized import PackedForm
from dist_qft.merge.recipe import MergeRequest, Recipe, make_recipe
from dist_qft.methods.attach import AdapterSet
from dist_qft.methods.schedule import TileSettings
from dist_qft.preemption import StopSignal
from dist_qft.quant.contract import Format
from dist_qft.run_inputs import RunInputs
from dist_qft.tokenizer import load_tokenizer
from dist_qft.trained import config_of, find_checkpoint, tiles_of
from dist_qft.world import World, connect, device_for


@dataclass(frozen=True)
class MergeInputs:
    """Where a trained model comes from: `checkpoint` is the folder of the adapters after `step` optimizer steps."""

    config: RunConfig
    checkpoint: Path
    step: int
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    rank: int


def default_path(run: Path, target: MergeTarget) -> Path:
    """Where a result goes if nobody says: into the run's folder."""
    return run / ("merged.gguf" if target == "gguf" else f"merged-{target}")


def recipe_at_end(config: RunConfig, skeleton: BaseModel, tiles: Mapping[str, TileSettings]) -> Recipe | None:
    """The merge that the config asks for after training; raises UserError as `make_recipe` does."""
    merge = config.merge
    if merge.at_end is None:
        return None
    path = Path(merge.path) if merge.path else default_path(Path(config.output_dir), merge.at_end)
    request = MergeRequest(merge.at_end, path, merge.overwrite, dtype=merge.dtype)
    return make_recipe(request, config, skeleton, tiles)


def run_merge(
    source: str, target: str, output: Path | None, *, overwrite: bool, requantize: str | None, dtype: str
) -> None:
    """Merge the adapters of a run (its newest checkpoint) or of one checkpoint into a result.

    Raises:
        UserError: the target cannot hold the merged model, the result exists, or the adapter is another base's;
            all but the last is said before any weight is read.
    """
    checkpoint = find_checkpoint(source)
    run = checkpoint.path.parent if (Path(source) / TRAINER_STATE).is_file() else Path(source)
    path = output or default_path(run, target)
    request = MergeRequest.checked(target, path, overwrite=overwrite, requantize=requantize, dtype=dtype)
    if checkpoint.adapter_config.get("peft_type") != ADAPTER_TYPE:
        raise UserError(f"{checkpoint.path}: holds no tile adapters, and nothing else can be merged into the base")
    config, tiles = config_of(checkpoint), tiles_of(checkpoint)
    world = World.from_environment()
    device = device_for(world, config.sharding.device)
    tokenizer = load_tokenizer(config.model)
    skeleton = build_skeleton(config.model, config.quantization, compute_dtype(config.train.precision, device))
    recipe = make_recipe(request, config, skeleton, tiles)
    inputs = MergeInputs(config, checkpoint.path, checkpoint.state.step, tokenizer, device, world.rank)
    facts = {"adapter": sha256_of(checkpoint.path / ADAPTER_MODEL), "config": config.model_dump_json()}
    facts["request"] = str(request)
    with (
        StopSignal() as stop,
        connect(world, device, config.sharding.timeout_seconds),
        told_by(world.rank, lambda: "the merge"),
    ):
        require_agreement(facts, device)
        parts = assemble(config, skeleton, tiles, device)
        check_fingerprint(checkpoint, parts.base)
        parts.adapters.load_tensors(checkpoint.trainables)
        merge(parts, recipe, inputs, stop)


def merge_at_end(inputs: RunInputs, recipe: Recipe, parts: Assembled, step: int, stop: StopSignal) -> None:
    """Merge what a run has just trained and saved at `step`. Collective."""
    checkpoint = inputs.output_dir / f"checkpoint-{step}"
    source = MergeInputs(inputs.config, checkpoint, step, inputs.tokenizer, inputs.device, inputs.world.rank)
    merge(parts, recipe, source, stop)


def merge(parts: Assembled, recipe: Recipe, inputs: MergeInputs, stop: StopSignal) -> dict | None:
    """Fold, write, certify. Collective; rank 0 returns the certificate.

    After an exact merge the base itself is the merged model, and the adapters no longer belong on it.
    """
    started = time.perf_counter()
    parts.base.model.eval()
    parts.adapters.eval()
    ids = probe_ids(inputs.tokenizer)
    live = logits_of(parts.base, ids, inputs.device)
    if recipe.kind == "lora":
        lora = lora_twin(parts.adapters)
        difference = lora_difference(parts.adapters, lora)
        logits = _with_lora(parts, lora, live, ids, inputs.device)
        writer: Writer = PeftWriter(lora, inputs.config.model.path)
        notes = []
    else:
        parts.engine.release()
        difference = fold_base(parts, recipe)
        logits = _with_weights(parts, recipe.formats, recipe.dtype, live, ids, inputs.device)
        parts.engine.release()
        writer, notes = _weights_writer(parts, recipe, inputs.config)
    write_result(parts, writer, recipe, stop, inputs.device)
    difference = total_difference(difference + writer.difference, inputs.device)
    if inputs.rank != 0:
        return None
    findings = Findings(difference, logits, notes)
    certificate = write_certificate(
        recipe,
        inputs.config,
        inputs.checkpoint,
        step=inputs.step,
        fingerprint=parts.base.fingerprint,
        ids=ids,
        findings=findings,
    )
    seconds = time.perf_counter() - started
    print(f"merged {inputs.checkpoint} into {recipe.request.path} ({len(recipe.tiles)} layers, {seconds:.1f} s)")
    print(f"certificate: {certificate['summary']}", flush=True)
    return certificate


def _with_weights(
    parts: Assembled,
    formats: Mapping[str, Format],
    dtype: torch.dtype | None,
    live: Tensor,
    ids: list[int],
    device: torch.device,
) -> LogitDifference:
    """Logits of the base alone, with its weights as they would be written (see `as_written`), against the live ones."""
    with parts.adapters.disabled(), as_written(parts, formats, dtype):
        return compare_logits(live, logits_of(parts.base, ids, device), ids)


def _with_lora(
    parts: Assembled, lora: AdapterSet, live: Tensor, ids: list[int], device: torch.device
) -> LogitDifference:
    lora.attach(parts.base.model)
    try:
        with parts.adapters.disabled():
            return compare_logits(live, logits_of(parts.base, ids, device), ids)
    finally:
        lora.detach()


def _weights_writer(parts: Assembled, recipe: Recipe, config: RunConfig) -> tuple[Writer, list[str]]:
    """The writer of this target, and notes for the certificate."""
    if recipe.request.target == "gguf":
        from dist_qft.merge.gguf import GgufWriter

        writer = GgufWriter(parts, recipe, Path(config.model.path))
        return writer, writer.notes()
    form = DenseForm(parts, recipe) if recipe.request.target == "dense" else PackedForm(parts, recipe)
    return FolderWriter(form, parts.base, config.model), []
