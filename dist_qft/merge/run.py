"""The export as a stage: from a checkpoint, or at the end of training, to a published result with its certificate."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.base_model.tokenizer import run_tokenizer
from dist_qft.config.check import merge_obstacle
from dist_qft.config.schema import RunConfig
from dist_qft.errors import CorruptFileError, NumericError, UserError
from dist_qft.merge.certificate import Certificate, Findings, Origin, make_certificate
from dist_qft.merge.collective import Certified, failing_together, total_difference, write_result
from dist_qft.merge.difference import Difference
from dist_qft.merge.live_model import LiveModel
from dist_qft.merge.model_card import companions
from dist_qft.merge.place import require_free, require_place, require_room
from dist_qft.merge.probe import compare_logits, logits_of, probe_ids
from dist_qft.merge.recipe import MergeRequest, Recipe
from dist_qft.merge.target import Probe
from dist_qft.merge.targets import TARGETS, checked_request, request_at_end
from dist_qft.methods.adapters.adapter_spec import AdapterSpec, require_tiles, stored_adapters
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.methods.trainable import TrainableSpec
from dist_qft.ranks.collectives import SideGroup
from dist_qft.ranks.device import compute_dtype, device_for, dtype_name
from dist_qft.ranks.preemption import StopSignal
from dist_qft.ranks.session import session
from dist_qft.ranks.world import World
from dist_qft.sharding.engines import package_versions
from dist_qft.storage.checkpoint import ADAPTER_MODEL, Checkpoint
from dist_qft.storage.manifest import sha256_of
from dist_qft.tuned_model.assemble import assemble
from dist_qft.tuned_model.checkpointed import (
    check_fingerprint,
    check_settings,
    config_here,
    find_checkpoint,
    require_finite_trainables,
    run_folder,
    settings_of,
)


@dataclass(frozen=True)
class MergeInputs:
    """Everything about an export that is known before any weight is read and any rank has met another."""

    recipe: Recipe
    config: RunConfig
    world: World
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    skeleton: BaseModel
    spec: AdapterSpec
    checkpoint: Checkpoint

    def must_match(self) -> dict[str, str]:
        """Inputs that must be the same on all ranks, by name."""
        return {
            "merge request": str(self.recipe.request),
            "config": self.config.model_dump_json(),
            "package versions": package_versions(self.config),
            "compute dtype": str(self.skeleton.dtype),
            "adapter": sha256_of(self.checkpoint.path / ADAPTER_MODEL),
        }


def run_merge(
    source: str, target: str, output: Path | None, *, overwrite: bool, requantize: str | None, dtype: str
) -> None:
    """Export the adapters of a run (its newest checkpoint) or of one checkpoint.

    Raises:
        UserError: the target cannot hold the merged model, the result exists, the checkpoint is torn, or the adapter
            is another base's; all but the last is said before any weight is read.
        NumericError: the adapters or the merged weights are not finite.
    """
    try:
        checkpoint = find_checkpoint(source)
    except CorruptFileError as error:  # the wrong source, as another base's adapter is: name another
        raise UserError(str(error)) from error
    run = run_folder(source)
    request = checked_request(target, output, run, overwrite=overwrite, requantize=requantize, dtype=dtype)
    inputs = gather_merge_inputs(request, checkpoint, World.from_environment())
    sharding, must_match = inputs.config.sharding, inputs.must_match()
    with StopSignal() as stop, session(sharding, doing="the merge", must_match=must_match, crash_dir=run, stop=stop):
        execute_merge(inputs, stop)


def gather_merge_inputs(request: MergeRequest, checkpoint: Checkpoint, world: World) -> MergeInputs:
    """Do everything that needs no other rank and no weight, and refuse a merge that cannot work."""
    config = config_here(checkpoint, world)
    if obstacle := merge_obstacle(config):
        raise UserError(f"{checkpoint.path}: {obstacle}")
    require_place(request, run_folder(checkpoint.path), config.model.path, checkpoint.path)
    require_free(request)
    require_finite_trainables(checkpoint)
    device = device_for(world, config.sharding.device)
    skeleton = build_skeleton(config.model, config.quantization, compute_dtype(config.train.precision, device))
    tokenizer = run_tokenizer(config)
    notes = check_settings(checkpoint, config, settings_of(config, skeleton, tokenizer))
    if world.rank == 0:
        print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)
    spec = stored_adapters(checkpoint.adapter_config, str(checkpoint.path))
    recipe = make_recipe(request, config, skeleton, spec.tiles)
    require_room(recipe, skeleton)
    return MergeInputs(recipe, config, world, device, tokenizer, skeleton, spec, checkpoint)


def execute_merge(inputs: MergeInputs, stop: StopSignal) -> Certificate | None:
    """Load the base, put the adapters on, export. Collective, in a session; see `export`."""
    parts = assemble(inputs.config, inputs.skeleton, inputs.spec, inputs.device, stop=stop)
    check_fingerprint(inputs.checkpoint, parts.base)
    parts.load_tensors(inputs.checkpoint.trainables)
    origin = Origin(inputs.config, inputs.checkpoint.path, inputs.checkpoint.state.step)
    return export(LiveModel.of(parts), inputs.recipe, origin, inputs.tokenizer, inputs.device, stop)


def make_recipe(request: MergeRequest, config: RunConfig, base: BaseModel, tiles: Mapping[str, TileSettings]) -> Recipe:
    """Decide how adapters of these tiles become the requested result; see `Target.recipe`."""
    return TARGETS[request.target].recipe(request, config, base, tiles)


def recipe_at_end(config: RunConfig, skeleton: BaseModel, spec: TrainableSpec[Any]) -> Recipe | None:
    """The export that a config asks for after training; UserError if its target cannot hold the model."""
    request = request_at_end(config)
    return None if request is None else make_recipe(request, config, skeleton, require_tiles(spec))


def export(
    live: LiveModel,
    recipe: Recipe,
    origin: Origin,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    stop: StopSignal,
) -> Certificate | None:
    """Convert, write, certify and publish. Collective; returns the certificate on rank 0.

    After an exact merge the base itself is the merged model, and the adapters no longer belong on it.

    Raises:
        NumericError: a weight or a logit of the live model or of the result is not finite; nothing is published.
    """
    started = time.perf_counter()
    side = SideGroup(origin.config.sharding.rank0_timeout_seconds)
    live.base.model.eval()
    live.adapters.eval()
    probe = Probe(probe_ids(tokenizer), device)
    logits = logits_of(live.base, probe.ids, device)
    converted = TARGETS[recipe.request.target].convert(live, recipe, origin.config, probe)
    with failing_together(recipe.request.path, device):
        _require_finite_logits(logits, "the trained model")
        _require_finite_logits(converted.logits, "the merged model")

    def certify(written: Path | None, lost: Difference) -> Certified | None:
        total = total_difference(converted.difference + lost, device)
        if not total.finite:
            raise NumericError(f"{recipe.request.path}: a merged weight is not finite; nothing was written")
        with failing_together(recipe.request.path, device, stop, side):
            if written is None:
                return None
            difference = compare_logits(logits, converted.logits, probe.ids)
            dtype = dtype_name(live.base.dtype)
            findings = Findings(total, difference, probe.ids, converted.writer.notes(), dtype)
            certificate = make_certificate(recipe, origin, live.base.fingerprint, findings, written)
            named = live.base.model.generation_config.eos_token_id
            folder = written.is_dir()
            files = companions(recipe.request.path, origin, certificate, tokenizer, named, folder=folder)
            return Certified(certificate, files)
        raise AssertionError("unreachable")  # for the type checker: the context does not swallow exceptions

    certified = write_result(live, converted.writer, recipe, stop, device, side, certify)
    side.close()
    if certified is None:
        return None
    certificate, files = certified
    seconds = time.perf_counter() - started
    print(f"merged {origin.checkpoint} into {recipe.request.path} ({len(recipe.tiles)} layers, {seconds:.1f} s)")
    lines = [f"certificate: {certificate.summary}", *TARGETS[recipe.request.target].hints(recipe, origin.config)]
    lines.append(f"beside the weights: {', '.join(files)}")
    print(*lines, sep="\n", flush=True)
    return certificate


def _require_finite_logits(logits: torch.Tensor, model: str) -> None:
    if not torch.isfinite(logits).all():
        raise NumericError(f"{model} computes logits that are not finite; nothing was written")
