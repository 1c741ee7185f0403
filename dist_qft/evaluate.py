"""`dist-qft eval`: held-out loss and metrics of the base and of the tuned model, side by side."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.base_model.tokenizer import run_tokenizer
from dist_qft.config.load import override_config
from dist_qft.config.schema import RunConfig
from dist_qft.data.batches import eval_batches
from dist_qft.data.prepare import Prepared, prepare
from dist_qft.errors import UserError
from dist_qft.methods.specs import make_spec
from dist_qft.ranks.device import compute_dtype
from dist_qft.ranks.session import place, session
from dist_qft.ranks.world import World
from dist_qft.sharding.engines import package_versions
from dist_qft.storage.checkpoint import ADAPTER_MODEL, Checkpoint, list_checkpoints
from dist_qft.storage.manifest import sha256_of
from dist_qft.tuned_model.assemble import assemble
from dist_qft.tuned_model.checkpointed import config_here, find_checkpoint, open_checkpointed, run_folder, with_date
from dist_qft.tuned_model.held_out import HeldOut, held_out_loss


def evaluate_run(folder: Path, overrides: Sequence[str], checkpoint_path: str | None, as_json: bool) -> None:
    """Evaluate a checkpoint in `folder` with the config it was trained with, wherever the folder lies now.

    Args:
        folder: of a run, whose newest checkpoint is taken, or of a checkpoint.
        overrides: `key.sub=value` settings that replace those of the checkpoint.
        checkpoint_path: another checkpoint to take.

    Raises:
        UserError: there is no checkpoint or no held-out data, or the adapter belongs to another base.
        CorruptFileError: the checkpoint fails verification.
    """
    checkpoint = find_checkpoint(checkpoint_path or folder)
    config = override_config(config_here(checkpoint, World.from_environment()), overrides)
    _evaluate(config, checkpoint, run_folder(folder), as_json)


def evaluate_config(config: RunConfig, checkpoint_path: str | None, as_json: bool) -> None:
    """Evaluate the model that a config describes: the checkpoint given, or the newest in `output_dir`, or the base
    alone.

    Raises:
        UserError: the config names no held-out data, or the adapter belongs to another base.
    """
    path = checkpoint_path or (config.output_dir if list_checkpoints(Path(config.output_dir)) else None)
    _evaluate(config, find_checkpoint(path) if path else None, Path(config.output_dir), as_json)


def _evaluate(config: RunConfig, checkpoint: Checkpoint | None, run: Path, as_json: bool) -> None:
    """Print the figures of the base and, if there is a checkpoint, of the tuned model. `run` gets the token cache."""
    if config.data is None or (config.data.eval is None and not config.data.eval_samples):
        raise UserError("data.eval: there is no held-out data; set data.eval or data.eval_samples")
    world, device = place(config.sharding)
    skeleton = build_skeleton(config.model, config.quantization, compute_dtype(config.train.precision, device))
    cache_dir = Path(config.data.cache_dir or run / "data_cache")
    tokenizer = run_tokenizer(config)
    config = with_date(config, tokenizer, checkpoint)
    assert config.data is not None, "a date takes no data away"
    data = prepare(config.data, tokenizer, skeleton.vocab_size, cache_dir, config.task)
    if world.rank == 0:
        print(*data.notes(), sep="\n", end="\n" * bool(data.notes()), file=sys.stderr)
    assert data.eval is not None, "refused above"
    must_match = _must_match(config, data, checkpoint) | {"compute dtype": str(skeleton.dtype)}
    with session(config.sharding, doing="evaluation", must_match=must_match, crash_dir=run):
        if checkpoint is None:
            parts = assemble(config, skeleton, make_spec(config, skeleton), device)
        else:
            parts, _ = open_checkpointed(checkpoint, config, device)
        micro = config.train.per_device_train_batch_size
        assert data.eval is not None, "a config without held-out data is refused above"
        batches = eval_batches(data.eval, micro, world.rank, world.world_size)
        with parts.bare():
            results = {"base": held_out_loss(parts.base, batches, device, parts.task)}
        if checkpoint is not None:
            with parts.evaluating():
                results["tuned"] = held_out_loss(parts.base, batches, device, parts.task)
    if world.rank == 0:
        _print(results, str(checkpoint.path) if checkpoint else None, as_json)


def _must_match(config: RunConfig, data: Prepared, checkpoint: Checkpoint | None) -> dict[str, str]:
    """Inputs that must be the same on all ranks, by name."""
    return {
        "config": config.model_dump_json(),
        "package versions": package_versions(config),
        "held-out data": data.held_out_digest,
        "adapter": sha256_of(checkpoint.path / ADAPTER_MODEL) if checkpoint else "",
    }


def _print(results: dict[str, HeldOut], checkpoint: str | None, as_json: bool) -> None:
    if as_json:
        table = {
            which: {"loss": held_out.loss, **held_out.figures, "tokens": held_out.tokens}
            for which, held_out in results.items()
        }
        print(json.dumps({"checkpoint": checkpoint, **table}, indent=1))
        return
    for which, held_out in results.items():
        source = f" ({checkpoint})" if which == "tuned" else ""
        figures = "".join(f"  {name} {value:.3f}" for name, value in held_out.figures.items())
        print(f"{which:6} loss {held_out.loss:.4f}{figures}{source}")
